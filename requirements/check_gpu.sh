#!/usr/bin/env bash
# check_gpu.sh trainer|one|sglang|vllm|compiler: says all that this machine lacks for an installation on GPUs, each with
# its remedy, and exits with 1. `compiler` is the part that compiling Transformer Engine's binding needs.
# Read from the environment: CUDA_HOME, CXX, PYTHON; DRIVER=unchecked passes over the driver.
set -euo pipefail
kind=${1:?one of trainer, one, sglang, vllm, compiler}
faults=0

fault() { # FAULT REMEDY
    printf 'error: %s\n       %s\n' "$1" "$2" >&2
    faults=$((faults + 1))
}

at_least() { # VERSION LEAST
    [[ $1 =~ ^[0-9.]+$ && $(printf '%s\n' "$2" "$1" | sort -V | sed -n 1p) == "$2" ]]
}

check_driver() {
    local driver
    [[ ${DRIVER:-} != unchecked ]] || return 0
    if ! command -v nvidia-smi > /dev/null; then
        fault "no nvidia-smi, so no NVIDIA driver answers here" \
            "install on a GPU node; on a login node whose GPU nodes have driver 580 or newer: make ... DRIVER=unchecked"
        return
    fi
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1 || true)
    driver=${driver%%$'\n'*}
    at_least "$driver" 580 || fault \
        "the NVIDIA driver is '$driver'; torch and the engines here are built for CUDA 13, which needs 580 or newer" \
        "ask for driver 580 or newer, or for other nodes; NVIDIA's cuda-compat-13-0 may serve on 570/575 (not tried)"
}

check_glibc() {
    local line
    line=$(ldd --version 2>&1 || true)
    line=${line%%$'\n'*}
    at_least "${line##* }" "$1" || fault \
        "glibc is '${line##* }'; $2 need $1 or newer" \
        "use Ubuntu 22.04, Debian 12, RHEL 9 or newer, or a container of such a system (docs/install_gpu.md)"
}

check_compilers() {
    local cuda=${CUDA_HOME:-/usr/local/cuda} cxx=${CXX:-g++} version include
    if [[ ! -x $cuda/bin/nvcc ]]; then
        fault "no $cuda/bin/nvcc: Transformer Engine's binding is compiled with a CUDA 13 toolkit" \
            "module load cuda/13, or install NVIDIA's cuda-toolkit-13-0, and set CUDA_HOME to its folder"
    else
        version=$("$cuda/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
        [[ $version == 13.* ]] || fault "$cuda/bin/nvcc is of CUDA '$version'; torch here is of CUDA 13" \
            "set CUDA_HOME to a CUDA 13 toolkit"
        [[ -f $cuda/include/crt/host_defines.h ]] || fault "$cuda/include has no crt/host_defines.h" \
            "install the toolkit's headers (NVIDIA's cuda-crt-13-0 and cuda-cudart-dev-13-0), or set CUDA_HOME to a whole one"
    fi
    version=$("$cxx" -dumpfullversion -dumpversion 2> /dev/null || true)
    at_least "$version" 11 || fault "the C++ compiler $cxx is '${version:-missing}'; 11 or newer is needed" \
        "module load gcc, or apt-get install g++; CXX=/path/to/g++ names another"
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [[ -f $include/Python.h ]] || fault "$include has no Python.h" \
        "install Python's headers (Debian: python3-dev, RHEL: python3-devel); Triton needs them on the nodes too"
}

python=$(bash "$(dirname "${BASH_SOURCE[0]}")/find_python.sh") || exit 1
case $kind in
    trainer) check_driver && check_glibc 2.28 "torch's wheels" && check_compilers ;;
    one) check_driver && check_glibc 2.34 "SGLang's wheels" && check_compilers ;;
    sglang) check_driver && check_glibc 2.34 "SGLang's wheels" ;;
    vllm) check_driver && check_glibc 2.31 "vLLM's wheels" ;;
    compiler) check_compilers ;;
    *) fault "check_gpu.sh $kind: unknown" "one of trainer, one, sglang, vllm, compiler" ;;
esac
((faults == 0))
