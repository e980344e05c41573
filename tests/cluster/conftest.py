"""A program in the place of python, which notes what it was given and ends as it is told."""

from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "ds_configs/recipes/10b.yaml"
PROGRAM = """#!/bin/bash
# Called as python -m MODULE OPTIONS. Notes its place and options; what it does is in the folder: a file MODULE holds
# the exit code; one named MODULE.waits lets it wait for SIGUSR1 or SIGTERM and end with 75.
folder={folder}
module=$2
{{
    echo "$RANK $LOCAL_RANK $GROUP_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT ${{*:3}}"
}} > "$folder/$module.${{SLURM_RESTART_COUNT:-0}}.$RANK.txt"
if [ -e "$folder/$module.waits" ]; then
    trap 'exit 75' USR1 TERM
    touch "$folder/$module.ready.$RANK"
    while true; do sleep 0.05; done
fi
exit "$(cat "$folder/$module" 2> /dev/null || echo 0)"
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "python-program"
    path.write_text(PROGRAM.format(folder=tmp_path))
    path.chmod(0o755)
    return path
