#!/usr/bin/env bash
# Prints the Python that .venv is made with: the first that runs and is 3.11 or 3.12 (set PYTHON to choose another).
set -euo pipefail

fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'
for python in ${PYTHON:-python3.11 python3.12 python3 python}; do
    if "$python" -c "$fits" 2>/dev/null; then
        if ! "$python" -m pip --version >/dev/null 2>&1; then
            echo "error: $python has no pip; install it (Debian: apt-get install python3-pip)" >&2
            exit 1
        fi
        echo "$python"
        exit 0
    fi
done
seen=$(python3 --version 2>&1 || true)
echo "error: need Python 3.11 or 3.12 (Megatron-Core 0.16.1 and the locked versions run there), found: ${PYTHON:-$seen}" >&2
echo "       install python3.11, or name one: make PYTHON=/path/to/python3.11 ..." >&2
exit 1
