#!/usr/bin/env bash
# Compile Transformer Engine's torch binding, of which no wheel exists, against the torch of the active environment
# (requirements/gpu-trainer-*.txt or gpu-sglang-trainer-*.txt). requirements/check_gpu.sh says what it needs; cuBLAS,
# cuSPARSE, cuDNN and NCCL headers come from torch's own nvidia-* wheels. About 19 CPU minutes, and 3 GiB of memory for
# each of MAX_JOBS compilers.
set -euo pipefail
version=2.11.0
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

PYTHON=python bash "$here/requirements/check_gpu.sh" compiler
fits="import importlib.metadata as m, torch; assert torch.version.cuda and m.version('transformer-engine') == '$version'"
if ! python -c "$fits" 2> /dev/null; then
    echo "error: $(command -v python) lacks a torch for CUDA or transformer-engine $version" >&2
    echo "       activate the environment of \`make gpu\`, or install the lock first: docs/install_gpu.md" >&2
    exit 1
fi
gib=$(awk '/MemAvailable/ {print int($2 / 2^20)}' /proc/meminfo)
jobs=$((gib / 3 < $(nproc) ? gib / 3 : $(nproc)))
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} MAX_JOBS=${MAX_JOBS:-$((jobs > 1 ? jobs : 1))}
# without the second, the build first waits for a download that few clusters let through
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE
export CPATH=$site/nvidia/cu13/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include${CPATH:+:$CPATH}
export PATH=$CUDA_HOME/bin:$PATH
echo "compiling transformer_engine_torch $version with $MAX_JOBS compilers: about 19 minutes of one core in all"
python -m pip install --quiet --no-build-isolation --no-deps --no-cache-dir --no-binary transformer_engine_torch \
    "transformer_engine_torch==$version"
python -c 'import transformer_engine.pytorch, megatron.core.extensions.transformer_engine as te; assert te.HAVE_TE'
