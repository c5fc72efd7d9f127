#!/usr/bin/env bash
# install_gpu.sh KIND FOLDER: make an environment for GPU nodes in FOLDER, anew. `make gpu` and its kin call it.
#   trainer  the trainer with Transformer Engine        one   the same and SGLang, in one environment
#   sglang   a server of SGLang alone                   vllm  a server of vLLM alone
set -euo pipefail
kind=${1:?one of trainer, one, sglang, vllm} folder=${2:?the folder of the environment}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash requirements/check_gpu.sh "$kind"
base=$(bash requirements/find_python.sh)
python=$PWD/$folder/bin/python
declare -A locks=([trainer]=gpu-trainer [one]=gpu-sglang-trainer [sglang]=gpu-sglang-engine [vllm]=gpu-vllm-engine)
lock=requirements/${locks[$kind]}-$("$base" -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt

rm -rf "$folder"
mkdir -p "$(dirname "$folder")"
"$base" -m venv --without-pip "$folder"
"$base" -m pip --python "$python" install --quiet --no-deps --requirement "$lock"
"$python" -c 'import torch; assert torch.version.cuda, torch.__version__' || {
    echo "error: pip brought a torch without CUDA: take the index of CPU builds out of pip's configuration" >&2
    exit 1
}
case $kind in
    trainer | one)
        PATH=$PWD/$folder/bin:$PATH bash scripts/install_te.sh
        "$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
        ;;
esac
"$base" -m pip --python "$python" check
