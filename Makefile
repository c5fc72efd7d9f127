# `make demo` and `make test` need python3.11 (or 3.12) and pip; they create .venv themselves. `make engines` adds the
# servers of a CPU machine, each in an environment of its own, because each pins a torch of its own.
# What GPU nodes need is made by gpu, gpu-one, gpu-engine-sglang and gpu-engine-vllm: docs/install_gpu.md.
export PYTHON DRIVER
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -q
GPU_VENV := .venv-gpu

.PHONY: demo demo-smollm2 test test-all test-engines test-slurm test-te test-gpu test-gpu-wheels engines gpu gpu-one gpu-engine-sglang gpu-engine-vllm lint clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

# fetches a real model of 135M parameters, 93 MB, when models/smollm2_135m is not there
demo-smollm2: $(READY)
	$(BIN)/python scripts/get_smollm2.py
	$(BIN)/python scripts/demo.py smollm2_135m

test: lint
	$(PYTEST) -m "not slow and not engines and not slurm and not te"

test-all: lint
	$(PYTEST) -m "not engines and not slurm and not te"

engines: .engines/sglang/.installed .engines/vllm/.installed

test-engines: $(READY) engines
	$(PYTEST) -m engines

# Debian's packages; the tests start and stop daemons of their own, on loopback.
SLURM_PROGRAMS := munged slurmctld slurmd shellcheck
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
test-slurm: $(READY)
	PATH="$$PATH:/usr/sbin" command -v $(SLURM_PROGRAMS) | wc -l | grep -qx $(words $(SLURM_PROGRAMS)) || \
	{ $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y --no-install-recommends slurm-wlm munge shellcheck; }
	$(SUDO) $(PYTEST) -m slurm

# Builds the models of Transformer Engine on a machine without a GPU; needs a CUDA 13 toolkit. Not in CI.
test-te: .te/.installed
	PYTHONPATH="$$PWD" .te/bin/python -m pytest -q -m te tests/te

# On a machine with one GPU and PyTorch, whatever else it lacks; without a GPU a dry run. WHEELS: what test-gpu-wheels made.
TEST_GPU_PYTHON = $(or $(PYTHON),$(firstword $(wildcard $(GPU_VENV)/bin/python $(BIN)/python) python3))
WHEELS :=
test-gpu:
	$(TEST_GPU_PYTHON) scripts/gpu/run.py $(if $(WHEELS),--wheels $(WHEELS))

test-gpu-wheels:
	$(or $(PYTHON),$(firstword $(wildcard $(BIN)/python) python3)) scripts/gpu/pack.py .wheels

gpu: $(GPU_VENV)/.trainer
gpu-one: $(GPU_VENV)/.one
gpu-engine-sglang gpu-engine-vllm: gpu-engine-%: .engines/%/.gpu

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(GPU_VENV) .engines .te build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# Made anew when the locked versions change, and only then. The file is the last thing written: an interrupted
# installation starts over. --without-pip and `pip --python`: some systems' Python comes without ensurepip.
$(VENV)/.installed: requirements/cpu.txt requirements/find_python.sh
	rm -rf $(VENV)
	python="$$(bash requirements/find_python.sh)" && \
	"$$python" -m venv --without-pip $(VENV) && \
	"$$python" -m pip --python $(BIN)/python install --quiet --requirement requirements/cpu.txt
	touch $@

# Of servers without their dependencies, which would bring CUDA packages that a CPU server never imports.
.engines/sglang/.installed .engines/vllm/.installed: ALONE := --no-deps
.engines/%/.installed: requirements/%-cpu.txt requirements/find_python.sh
	rm -rf .engines/$*
	mkdir -p .engines
	python="$$(bash requirements/find_python.sh)" && \
	"$$python" -m venv --without-pip .engines/$* && \
	"$$python" -m pip --python .engines/$*/bin/python install --quiet $(ALONE) --requirement $<
	touch $@

# Of GPU nodes. A folder holds one kind at a time; making the other kind replaces it.
$(GPU_VENV)/.trainer: requirements/install_gpu.sh scripts/install_te.sh $(wildcard requirements/gpu-trainer-*.txt)
	bash requirements/install_gpu.sh trainer $(@D)
	touch $@

$(GPU_VENV)/.one: requirements/install_gpu.sh scripts/install_te.sh $(wildcard requirements/gpu-sglang-trainer-*.txt)
	bash requirements/install_gpu.sh one $(@D)
	touch $@

.engines/%/.gpu: requirements/install_gpu.sh requirements/gpu-%-engine-py311.txt requirements/gpu-%-engine-py312.txt
	bash requirements/install_gpu.sh $* $(@D)
	touch $@

# what the tests import, in the versions of the CPU's lock
TESTED_WITH := pytest pytest-timeout iniconfig pluggy beartype jaxtyping wadler_lindig hypothesis sortedcontainers
.te/.installed: requirements/install_gpu.sh scripts/install_te.sh $(wildcard requirements/gpu-trainer-*.txt)
	DRIVER=unchecked nice -n 19 bash requirements/install_gpu.sh trainer $(@D)
	.te/bin/python -m pip install --quiet --no-deps $(foreach name,$(TESTED_WITH),$$(grep -x "$(name)==.*" requirements/cpu.txt))
	touch $@

$(READY): $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
