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
# What tests run on a stand-in for a GPU. It unpacks into the same package as onnxruntime, so it lies apart.
ONNXRUNTIME_GPU ?= onnxruntime-gpu==1.31.1

VENV := .venv
PY := $(VENV)/bin/python
# Written last and holding the folder that was set up, so that neither a set-up that was interrupted
# nor a copy of the tree (whose editable install points at the original) looks finished.
STAMP := $(VENV)/set-up-for
SET_UP_FOR := $(shell cat $(STAMP) 2>/dev/null)
GPU_WHEEL := $(VENV)/onnxruntime-gpu
GPU_STAMP := $(VENV)/onnxruntime-gpu-is
GPU_FETCHED := $(shell cat $(GPU_STAMP) 2>/dev/null)

.PHONY: help setup demo test lint bench clean
help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

# The GPU wheel is there for Linux on x86-64. A demo, the linters and the benchmark go without its 0.3 GB.
setup: $(STAMP) $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(GPU_STAMP))

ifneq ($(SET_UP_FOR),$(CURDIR))
.PHONY: $(STAMP) $(GPU_STAMP)
FRESH := --clear
endif
ifneq ($(GPU_FETCHED),$(ONNXRUNTIME_GPU))
.PHONY: $(GPU_STAMP)
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

$(GPU_STAMP): | $(STAMP)
	@rm -rf $(GPU_STAMP) $(GPU_WHEEL)
	@echo "Fetching $(ONNXRUNTIME_GPU) (256 MB) for the tests, once."
	$(PY) -m pip install -qq --no-deps --target $(GPU_WHEEL) "$(ONNXRUNTIME_GPU)"
	@printf '%s' "$(ONNXRUNTIME_GPU)" > $(GPU_STAMP)

demo: $(STAMP)
	$(PY) -m exporter demo

# pytest comes last: its closing line is the verdict. A file stays with one process, whose bundles its tests share.
test: lint setup
	$(PY) -m pytest -n $(JOBS) --dist loadfile

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(STAMP)
	$(PY) -m benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
