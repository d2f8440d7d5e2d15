#!/usr/bin/env bash
# Makes or updates the virtual environment: `infra/setup.sh run` installs what serving needs,
# `infra/setup.sh dev` what testing needs as well. Versions come from infra/constraints.txt.
#
#   VENV         folder of the environment (.venv)
#   PYTHON3      interpreter to make it with (the first of python3, python3.14 ... python3.11
#                that is at least 3.11)
#   TORCH_INDEX  package index to take torch from, for a CPU-only build where the default
#                index has a CUDA build of several GB
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${1:?usage: infra/setup.sh run|dev}
venv=${VENV:-.venv}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON3:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "Penstock needs Python 3.11 or newer; set PYTHON3=/path/to/python3" >&2
    return 1
}

make_environment() {
    local python
    python=$(find_python)
    echo "Making the virtual environment $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "$python cannot make virtual environments (on Debian: apt install python3-venv)" >&2
        return 1
    fi
}

install() { "$venv/bin/python" -m pip install --quiet --quiet --constraint infra/constraints.txt "$@"; }

is_recent "$venv/bin/python" || { rm -rf "$venv" && make_environment; }
echo "Installing what pyproject.toml asks for ($extras); the first time takes some minutes"
if [ -n "${TORCH_INDEX:-}" ]; then
    install --index-url "$TORCH_INDEX" "$(grep '^torch==' infra/constraints.txt)"
fi
# The build backend is pinned too, so the package is built with what lies in the environment.
install hatchling editables
case $extras in
    run) install --no-build-isolation --editable . ;;
    dev) install --no-build-isolation --editable '.[dev]' ;;
    *) echo "usage: infra/setup.sh run|dev" >&2 && exit 2 ;;
esac
