# Every target makes its own environment in .venv; a second run finds it made and starts at once.
#   make train        train the built-in recipe on 2 ranks      make test         run the test suite, in minutes
#   make lint         formatting, lint and types                make bench-peers  compare with peers on this machine
#   make mutants      broken backends, and which test of the suite catches each
#   make test-triton  the Triton kernels without a GPU: interpreted on the host, and compiled for sm_80 and sm_90
#   make test-cuda    the CUDA tests and conformance levels 0 to 3, on a machine with a GPU
#   make bench-gpu    every measurement of a GPU in one command; GPU_PYTHON=python3 uses an environment that you have
#   make test-xla     the XLA tests and conformance levels 0 to 3 on torch_xla, on this machine's CPU; makes .venv-xla

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-triton test-cuda test-xla test-xla-backend test-xla-levels lint mutants bench-gpu bench-peers clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

# Processes of pytest at once. A test waits for its ranks half of its time, so that two keep two cores busy.
PROCESSES ?= 2

# torch_xla works with one version of torch only, so it has an environment of its own.
XLA := .venv-xla
XLA_BIN := $(XLA)/bin
XLA_PIP := $(XLA_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

# Where a torch with CUDA is installed already, its own Python serves, if windlass is installed there: GPU_PYTHON=python3.
GPU_PYTHON ?= $(BIN)/python
GPU_INSTALLED = $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.installed)

# The host as a device with Triton's kernels, for `test-triton` alone: other runs do not see it.
INTERPRETED := $(VENV)/interpreted
INTERPRETED_INPUTS := tests/interpreted/pyproject.toml $(wildcard tests/interpreted/*/*.py)

# The first interpreter that is new enough; override with `make PYTHON=/path/to/python test`.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$name"; break; }; done)

help:
	@grep '^#   ' Makefile | cut -c5-

define new_environment
	@[[ -n "$(PYTHON)" ]] || { echo "windlass needs Python 3.11 or newer: install one, or say make PYTHON=<path>." >&2; exit 2; }
	$(PYTHON) -m venv $(1)
endef

$(BIN)/python:
	$(call new_environment,$(VENV))

# torch goes first and alone: pip then settles on the pinned build before it reads what else wants torch.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch
	touch $@

$(VENV)/.installed: $(INPUTS) $(VENV)/.torch
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.installed-develop: $(VENV)/.installed
	$(PIP) -e '.[test,develop]'
	touch $@

$(XLA_BIN)/python:
	$(call new_environment,$(XLA))

# All that comes from outside: continuous integration keeps a copy of it. The wheel of torch_xla brings an old torchax
# along, without what it needs, and writes it over the right one: torchax comes last.
$(XLA)/.dependencies: constraints-xla.txt | $(XLA_BIN)/python
	$(XLA_PIP) -r constraints-xla.txt
	$(XLA_PIP) --force-reinstall $$(grep ^torchax== constraints-xla.txt)
	touch $@

$(XLA)/.installed: pyproject.toml $(XLA)/.dependencies
	$(XLA_PIP) --no-build-isolation -e .
	touch $@

train: $(VENV)/.installed
	$(BIN)/windlass train --ranks 2

test: $(VENV)/.installed
	$(BIN)/pytest -q -m "not slow" -n $(PROCESSES) --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/pytest -q -m slow

# From a copy: pip builds where the files are.
$(INTERPRETED)/.installed: $(INTERPRETED_INPUTS) $(VENV)/.installed
	rm -rf $(INTERPRETED)
	cp -r tests/interpreted $(INTERPRETED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
		--target $(INTERPRETED)/site $(INTERPRETED)
	touch $@

# The suite compares every kernel with its reference; tests/triton_kernels asks what only these kernels promise.
test-triton: $(INTERPRETED)/.installed
	env -u TRITON_INTERPRET $(BIN)/python -m windlass.backends.triton.compile
	TRITON_INTERPRET=1 $(BIN)/pytest -q -n $(PROCESSES) --dist loadfile tests/triton_kernels
	PYTHONPATH=$(INTERPRETED)/site $(BIN)/windlass conform --accelerator interpreted --level 1

test-cuda: $(GPU_INSTALLED)
	$(GPU_PYTHON) -m pytest -q tests/cuda
	$(GPU_PYTHON) -m windlass.cli conform --accelerator cuda --level 3

bench-gpu: $(GPU_INSTALLED)
	$(GPU_PYTHON) benchmarks/gpu.py

# Most of its time goes into compiling, on every rank anew: XLA's CPU cannot keep programs for the next process. Without
# optimisation that takes half as long. Kernels are tested with it too, since it decides how products and sums are rounded.
# Its parts may run side by side (make -j2) where there are cores for it: XLA's CPU gives replicas some seconds to meet.
test-xla: test-xla-backend test-xla-levels

test-xla-backend test-xla-levels: export PJRT_DEVICE ?= CPU
test-xla-backend test-xla-levels: export XLA_FLAGS ?= --xla_backend_optimization_level=0

test-xla-backend: $(XLA)/.installed
	$(XLA_BIN)/python -m pytest -q tests/xla
	env -u XLA_FLAGS $(XLA_BIN)/windlass conform --accelerator xla --level 1 -k test_l1

test-xla-levels: $(XLA)/.installed
	$(XLA_BIN)/windlass conform --accelerator xla --level 3 $(if $(REPORT),--report $(REPORT))

lint: $(VENV)/.installed-develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants_table.py

bench-peers: $(VENV)/.installed
	$(BIN)/python benchmarks/peers.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
