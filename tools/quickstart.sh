#!/usr/bin/env bash
# From a fresh clone to a trained model and a page that shows it: environment, data, tokenizer, training, evaluation.
#   tools/quickstart.sh                    about 10 minutes on 2 cores
#   tools/quickstart.sh --minutes 10       trains longer (m2 quickstart --help tells all options)
#   tools/quickstart.sh --data scenes      generated pictures; needs no network once the environment is there
# What is there already is used again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case " $* " in *" --help "* | *" -h "*) [ -x .venv/bin/m2 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0; } ;; esac

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "m2_ds needs Python 3.11 or newer; name one: PYTHON=python3.12 $0" >&2; exit 2; }

stamp=.venv/requirements.installed
if ! cmp -s requirements.txt "$stamp"; then
    echo "[0/5] environment: installing requirements.txt into .venv (about 1.5 GB, 1 to 2 minutes)"
    "$python" -m venv .venv
    pip=(.venv/bin/python -m pip install --disable-pip-version-check)
    # One line a package; what pip says beside it is shown only if it fails.
    "${pip[@]}" -r requirements.txt 2> .venv/pip.log | grep --line-buffered -E '^(Collecting|Installing|Successfully)' ||
        { cat .venv/pip.log >&2; exit 1; }
    "${pip[@]}" --quiet -e . --no-deps 2>> .venv/pip.log || { cat .venv/pip.log >&2; exit 1; }
    cp requirements.txt "$stamp"
fi
exec .venv/bin/m2 quickstart "$@"
