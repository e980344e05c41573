#!/usr/bin/env bash
# Lint, types and tests, in this order, from anywhere in the checkout:
#   tools/run_tests.sh                    what a change has to pass (slow tests left out)
#   tools/run_tests.sh -m slow            only the slow tests
#   tools/run_tests.sh tests/data -x      other arguments go to pytest (-n 0: in one process; three by default)
# Takes the active virtual environment, else .venv; PYTHON=... names another one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
# Distributed tests start up to eight processes: more threads than cores makes each of them several times slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy --no-error-summary
exec "$PYTHON" -m pytest -n 3 --dist loadfile --durations=5 "$@"
