#!/usr/bin/env bash
# Makes the peer's own environment: open_clip trains there, m2_ds never imports from it.
#   benchmarks/peer/setup.sh FOLDER        (default build/peer-venv; about 6 GB, since its torch is a CUDA build)
# Another interpreter: PYTHON=python3.12 benchmarks/peer/setup.sh FOLDER
set -euo pipefail

folder=${1:-build/peer-venv}
if [ -e "$folder" ] && [ ! -x "$folder/bin/python" ]; then
    echo "$folder exists and is no Python environment: give another folder or remove it" >&2
    exit 2
fi
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install -qq --disable-pip-version-check \
    -r "$(dirname "${BASH_SOURCE[0]}")/requirements.txt"
# A broken environment fails here rather than in the middle of a benchmark.
"$folder/bin/python" -c "import open_clip, open_clip_train.main, torch; print(f'peer ready: open_clip {open_clip.__version__}, torch {torch.__version__}')"
