#!/usr/bin/env bash
# Makes the environment of one peer of `make bench-peers`, unless it is there and up to date:
# `infra/peers/install.sh vllm|llamacpp FOLDER` makes FOLDER from the versions in infra/peers/.
#
#   PYTHON3      interpreter to make it with (python3)
#   TORCH_INDEX  package index to take torch from, for a CPU-only build where the default
#                index has a CUDA build of several GB
set -euo pipefail
cd "$(dirname "$0")"

name=${1:?usage: infra/peers/install.sh vllm|llamacpp FOLDER}
folder=${2:?usage: infra/peers/install.sh vllm|llamacpp FOLDER}
versions=$name.txt

install() { "$folder/bin/python" -m pip install --quiet --quiet "$@"; }

cmp --silent "$versions" "$folder/installed.txt" && exit
rm -rf "$folder"
"${PYTHON3:-python3}" -m venv "$folder"
case $name in
    vllm)
        # First, so that nothing else chooses a build. The versions are complete, without
        # torchvision, torchaudio and torchcodec, whose builds do not load beside this torch,
        # and without triton, which is for GPUs: so no dependencies are followed.
        install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' "$versions")"
        install --no-deps --requirement "$versions"
        ;;
    llamacpp)
        # Compiles llama.cpp for this machine's instructions, which takes about ten minutes.
        CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" install --requirement "$versions"
        ;;
    *) echo "no such peer: $name" >&2 && exit 2 ;;
esac
cp "$versions" "$folder/installed.txt"
