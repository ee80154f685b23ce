# Two commands for a newcomer, on a machine that has Python 3.11 or newer, git and make:
#     make demo     sets everything up and runs the whole pipe on the two shipped checkpoints
#     make test     sets everything up and runs ruff, mypy and the tests
# The others: make setup, lint, bench, clean.
# Override on the command line: PYTHON=python3.12, JOBS=4 (test processes), TORCH_PIP_ARGS="--index-url URL".

PYTHON ?= python3
JOBS ?= 2
# One exact version: a range admits builds that bring several gigabytes of CUDA libraries along.
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# Written last and holding the folder that was set up, so that neither a set-up that was interrupted
# nor a copy of the tree (whose editable install points at the original) looks finished.
STAMP := $(VENV)/set-up-for
SET_UP_FOR := $(shell cat $(STAMP) 2>/dev/null)

.PHONY: help setup demo test lint bench clean
help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

setup: $(STAMP)

ifneq ($(SET_UP_FOR),$(CURDIR))
.PHONY: $(STAMP)
FRESH := --clear
endif

$(STAMP): pyproject.toml Makefile
	@command -v "$(PYTHON)" >/dev/null || { echo "No '$(PYTHON)' found. Cierzo needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "'$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); Cierzo needs Python 3.11 or newer. Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@rm -f $(STAMP)
	@echo "Setting up $(VENV): PyTorch, then Cierzo with what its tests need. This takes a minute or so, once."
	"$(PYTHON)" -m venv $(FRESH) $(VENV)
	$(PY) -m pip install -qq $(TORCH_PIP_ARGS) "$(TORCH)"
	$(PY) -m pip install -qq -e ".[test]"
	@printf '%s' "$(CURDIR)" > $(STAMP)

demo: setup
	$(PY) -m exporter demo

# pytest comes last: its closing line is the verdict. A file stays with one process, whose bundles its tests share.
test: lint
	$(PY) -m pytest -n $(JOBS) --dist loadfile

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: setup
	$(PY) -m benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
