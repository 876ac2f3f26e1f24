# Every target does its own set-up in .venv; it is reused while pyproject.toml stays the same.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

export FLWR_TELEMETRY_ENABLED := 0
export PYTEST_ADDOPTS
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: demo test test-slow test-deployment exactness lint types check bench clean

demo: $(READY)
	$(BIN)/fedlora run experiments/configs/demo.toml

test: $(READY)
	$(BIN)/pytest

test-slow: $(READY)
	$(BIN)/pytest -m "slow and not gpu"

test-deployment: $(READY)  ## faults and attacks on a federation of processes; needs nginx (apt-get install nginx-light)
	$(BIN)/pytest -m "slow and not gpu" tests/deployment

exactness: $(READY)  ## per-example gradients against one backward pass per example, as a table
	$(BIN)/pytest -s -k exact tests/fedlora/test_per_sample.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright

check: lint types test

bench: $(READY)  ## docs/performance.md's table, both sides in turn; on an idle machine, about an hour and a half
	$(BIN)/python -m benchmarks.bench $(BENCH)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("fedlora needs Python 3.11 or newer, this is %d.%d; set PYTHON=" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -e '.[demo,dev]'
	@touch $(READY)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .coverage *.egg-info
