# Every target does its own set-up in .venv. The set-up is reused while pyproject.toml and constraints.txt stay the same.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
EXTRAS := simulation,qlora,demo,dev

# .venv is made anew where its Python does not start, or is another version than that of a PYTHON that was given.
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
HAS := $(shell $(BIN)/python -c 'import pip; $(VERSION)' 2>/dev/null)
WANTS := $(if $(filter file,$(origin PYTHON)),$(HAS),$(shell $(PYTHON) -c '$(VERSION)'))
VENV := $(if $(filter $(HAS),$(WANTS)),,venv)

export FLWR_TELEMETRY_ENABLED := 0
export PYTEST_ADDOPTS
export FLWR_DISABLE_UPDATE_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-deployment exactness lint types check bench constraints clean venv

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(READY)  ## a federation of 39 industries under differential privacy; no network after installing
	$(BIN)/fedlora run experiments/configs/demo.toml

test: $(READY)  ## the fast tests, on up to four processors; with coverage: make test PYTEST_ADDOPTS=--cov
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)  ## the slow tests
	$(BIN)/pytest -m "slow and not gpu"

test-deployment: $(READY)  ## faults and attacks on a federation of processes; needs nginx (apt-get install nginx-light)
	$(BIN)/pytest -m "slow and not gpu" tests/deployment

exactness: $(READY)  ## per-example gradients against one backward pass per example, as a table
	$(BIN)/pytest -s -k exact tests/fedlora/gradients/test_per_sample.py

lint: $(READY)  ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)  ## static types
	$(BIN)/pyright

check: lint types test  ## the gate: format, lint, types, fast tests

bench: $(READY)  ## the table of docs/performance.md; on an idle machine, about half an hour
	$(BIN)/python -m benchmarks.bench $(BENCH)

constraints:  ## write constraints.txt anew, from the newest releases that pyproject.toml allows
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet -e '.[$(EXTRAS)]'
	.venv-constraints/bin/python -m pip freeze --exclude-editable | sed '/^torch==/s/+.*//' > constraints.txt
	rm -rf .venv-constraints

venv:
	@$(PYTHON) -c 'import sys; sys.exit("fedlora needs Python 3.11 or newer, this is %d.%d; set PYTHON=" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear .venv

$(READY): pyproject.toml constraints.txt $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(READY)

clean:  ## remove .venv, what pip built here, and caches
	rm -rf .venv .venv-constraints build dist .pytest_cache .ruff_cache .coverage *.egg-info
