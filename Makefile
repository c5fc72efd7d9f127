# `make demo` and `make test` need python3.11 (or 3.12) and pip; they create .venv themselves. `make engines` adds the
# servers of a CPU machine, each in an environment of its own, because each pins a torch of its own.
export PYTHON
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -q

.PHONY: demo test test-all test-engines test-slurm engines lint clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: lint
	$(PYTEST) -m "not slow and not engines and not slurm"

test-all: lint
	$(PYTEST) -m "not engines and not slurm"

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

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .engines build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# Made anew when the locked versions change, and only then. The file is the last thing written: an interrupted
# installation starts over. --without-pip and `pip --python`: some systems' Python comes without ensurepip.
$(VENV)/.installed: requirements/cpu.txt requirements/find_python.sh
	rm -rf $(VENV)
	python="$$(bash requirements/find_python.sh)" && \
	"$$python" -m venv --without-pip $(VENV) && \
	"$$python" -m pip --python $(BIN)/python install --quiet --requirement requirements/cpu.txt
	touch $@

.engines/%/.installed: requirements/%-cpu.txt requirements/find_python.sh
	rm -rf .engines/$*
	mkdir -p .engines
	python="$$(bash requirements/find_python.sh)" && \
	"$$python" -m venv --without-pip .engines/$* && \
	"$$python" -m pip --python .engines/$*/bin/python install --quiet --no-deps --requirement $<
	touch $@

$(READY): $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
