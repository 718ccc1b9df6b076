# Commands for working on latentprior. `make` alone lists them.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Stamps: what has been installed into $(VENV), and when.
TORCH := $(VENV)/.torch-installed
DEV := $(VENV)/.dev-installed
DEMO := $(VENV)/.demo-installed
DOCS := $(VENV)/.docs-installed
OLDEST := .venv-oldest
AUDIT := .venv-audit

OUT ?= demo-out
# Scripts that measure; narrow them with `make benchmarks BENCHMARKS=benchmarks/NAME.py`.
BENCHMARKS ?= $(filter-out benchmarks/report.py benchmarks/_% benchmarks/conftest.py,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-slow test-all test-oldest audit lock doctest lint format docs pictures benchmarks build clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(DEV) ## create .venv with the library and the tools to work on it

$(VENV)/pyvenv.cfg:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "make: '$(PYTHON)' not found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: latentprior needs Python 3.10 or newer, '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1);" \
	    "name another: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' cannot create virtual environments (no venv or ensurepip);" \
	    "install them (Debian, Ubuntu: apt install python3-venv) or name another: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "==> creating $(VENV) with $$("$(PYTHON)" -V 2>&1)"
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# PyTorch is the large download: it comes first and shows its progress, the rest is quick and quiet.
$(TORCH): constraints.txt | $(VENV)/pyvenv.cfg
	@echo "==> installing PyTorch"
	@$(PIP) install -c constraints.txt torch
	@touch $@

$(DEV): pyproject.toml constraints.txt $(TORCH)
	@echo "==> installing latentprior and the tools to work on it"
	@$(PIP) install --quiet -c constraints.txt -e ".[dev,flow,metrics,report,explore,images,datasets,features,tracking,distributed,pyod,hub,onnx,browser]"
	@touch $(DEMO) $(DEV)

$(DEMO): pyproject.toml constraints.txt $(TORCH)
	@echo "==> installing latentprior"
	@$(PIP) install --quiet -c constraints.txt -e ".[metrics,report]"
	@touch $@

$(DOCS): pyproject.toml constraints.txt $(DEV)
	@echo "==> installing the tools that build the documentation"
	@$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

demo: $(DEMO) ## learn a prior on bundled data; pictures and a report in demo-out
	$(BIN)/latentprior demo --out "$(OUT)"

# Two workers of one thread each: on networks this small a second thread costs more than it gives. Tests of a file stay
# in one worker, since they share what they learn from.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -rs

test: lint ## lint, then the fast tests and the docstring examples
	$(PYTEST)

# One by one, whoever is free takes the next: they take seconds to minutes each.
test-slow: $(DEV) ## what `make test` leaves out: long fits, kills, fuzzing, the README and the pages at full length
	$(PYTEST) --dist worksteal -m "slow and not gpu"

test-all: test test-slow ## all tests but those that need a GPU

test-oldest: ## the fast tests on the oldest releases supported; give a Python 3.10: make PYTHON=python3.10 test-oldest
	@"$(PYTHON)" -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt \
	  -e ".[flow,metrics,report,images,features,tracking,distributed,pyod,hub]" pytest pytest-timeout pytest-xdist hypothesis
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 tests --ignore=tests/e2e

audit: ## look the pinned releases up in the database of vulnerabilities; code 3 where it cannot be reached
	@"$(PYTHON)" -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip install --quiet pip-audit
	@$(AUDIT)/bin/python .ci/audit.py constraints.txt

lock: $(DEV) ## rewrite requirements.lock: hashes of the core and of what the demo needs
	$(BIN)/python .ci/lock.py

doctest: $(DEV) ## the examples in docstrings and in docs, and the scripts in examples
	$(PYTEST) --dist worksteal -m "not gpu" src tests/test_docs.py tests/test_examples.py

lint: $(DEV) ## ruff, mypy and the downward-imports rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(DEV) ## sort imports, mend what ruff can mend, reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS) ## the documentation as HTML, in docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html

pictures: $(DEV) ## draw the pictures of the documentation anew, screenshots by the tests of pages (Chromium)
	$(BIN)/python docs/pictures.py
	LATENTPRIOR_SCREENSHOTS="$(CURDIR)/docs/images" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow \
	  tests/report/test_browser.py tests/explorer/test_browser.py

benchmarks: $(DEV) ## run the benchmark scripts, then rewrite benchmarks/RESULTS.md
	@$(PIP) install --quiet -c constraints.txt -e ".[benchmark,fuzz]"
	@set -e; for script in $(BENCHMARKS); do echo "==> $$script"; $(BIN)/python "$$script"; done
	$(BIN)/python benchmarks/report.py

build: $(DEV) ## source distribution and wheel, in dist
	$(BIN)/python -m build

clean: ## remove .venv, caches and everything built
	rm -rf $(VENV) $(OLDEST) $(AUDIT) demo-out dist build docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
