# Every target makes its own environment in .venv; a second run finds it made and starts at once.
#   make train        train the built-in recipe on 2 ranks      make test         run the test suite, in minutes
#   make lint         formatting, lint and types                make bench-peers  compare with peers on this machine
#   make mutants      broken backends, and which test of the suite catches each

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help train test test-slow lint mutants bench-peers clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

# The first interpreter that is new enough; override with `make PYTHON=/path/to/python test`.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$name"; break; }; done)

help:
	@grep '^#   ' Makefile | cut -c5-

$(BIN)/python:
	@[[ -n "$(PYTHON)" ]] || { echo "windlass needs Python 3.11 or newer: install one, or say make PYTHON=<path>." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

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

train: $(VENV)/.installed
	$(BIN)/windlass train --ranks 2

test: $(VENV)/.installed
	$(BIN)/pytest -q -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/pytest -q -m slow

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
