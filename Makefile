# `make demo` and `make test` need nothing but Python 3.11 or newer: they set up a private environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-gpu clean

demo: .venv/ready  ## train, retrofit, tune and generate: LCT seen to work, in runs/demo
	$(BIN)/lct demo

test: .venv/ready  ## the whole test suite
	$(BIN)/python -m pytest

lint: .venv/ready  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/ready  ## benchmarks that a CPU can run, into benchmarks/results
	$(BIN)/python -m pytest benchmarks -m "not gpu"

bench-gpu: .venv/ready  ## the Hopper cases
	$(BIN)/python -m pytest benchmarks -m gpu

.venv/ready: pyproject.toml
	@echo "setting up .venv (a few minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs
