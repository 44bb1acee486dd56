# `make demo` and `make test` need nothing but Python 3.11 or newer: they set up a private environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin

# Benchmarks run with this Python. One that has torch and pytest but can install nothing works from the source tree:
# make bench-gpu RUN=python3
RUN ?= $(BIN)/python
# How many tests run side by side, each on one thread; a file's stay together.
JOBS ?= 2
READY := .venv/ready
ifneq ($(RUN),$(BIN)/python)
READY := runs/site/ready
bench bench-history bench-gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/backbones:$(CURDIR)/plugins:$(CURDIR)/runs/site$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
# What pytest is told besides: make bench-gpu ARGS=--fresh
ARGS ?=
# 75 is the exit code of a process that a kernel has lost the GPU to; more than so many are not worth their time.
RESTARTS := 50
GPU_TESTS = $(shell grep -rl --include='test_*.py' 'mark\.gpu' tests)
GPU_BENCHMARKS = $(filter-out benchmarks/test_attention.py,$(shell grep -l 'mark\.gpu' benchmarks/test_*.py))

.PHONY: demo test prove coverage test-oldest test-newest lint bench bench-history bench-gpu clean

demo: .venv/ready  ## train, retrofit, tune and generate: LCT seen to work, in runs/demo
	$(BIN)/lct demo

# What `make test` runs: short draws.
SHORT = -n $(JOBS) --dist loadfile -m "not prove"

test: .venv/ready  ## the whole test suite, with short draws
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHORT) $(ARGS)

prove: .venv/ready  ## the same with long draws: hours
	HYPOTHESIS_PROFILE=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

coverage: .venv/ready  ## which lines of lct_core no test runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHORT) --cov=lct_core --cov-report=term-missing:skip-covered

test-oldest: .venv-oldest/ready  ## `make test` with every dependency at its lower bound
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(SHORT) $(ARGS)

test-newest: .venv-newest/ready  ## `make test` with the newest of every dependency
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(SHORT) $(ARGS)

lint: .venv/ready  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## benchmarks that a CPU can run, into benchmarks/results
	$(RUN) -m pytest benchmarks -m "not gpu" $(ARGS); code=$$?; \
	$(RUN) -m benchmarks.figure1; figure=$$?; \
	$(RUN) -m benchmarks.report; exit $$((code | figure | $$?))

bench-history: $(READY) runs/demo/causal.pt  ## what a history is worth, on the demo's model, into benchmarks/results
	$(RUN) -m benchmarks.history runs/demo/causal.pt
	$(RUN) -m benchmarks.report

runs/demo/causal.pt:
	$(MAKE) demo

bench-gpu: $(READY)  ## correctness on a GPU, then the Hopper cases; goes on where it was interrupted
	$(RUN) -m pytest $(GPU_TESTS) -m gpu -W default; tests=$$?; \
	$(RUN) -m pytest benchmarks/test_attention.py -m gpu -W default $(ARGS); cases=$$?; \
	restarts=0; while [ $$cases -eq 75 ] && [ $$restarts -lt $(RESTARTS) ]; do \
		restarts=$$((restarts + 1)); \
		$(RUN) -m pytest benchmarks/test_attention.py -m gpu -W default $(filter-out --fresh,$(ARGS)); cases=$$?; \
	done; \
	$(RUN) -m pytest $(GPU_BENCHMARKS) -m gpu -W default $(ARGS); others=$$?; \
	$(RUN) -m benchmarks.figure1; figure=$$?; \
	$(RUN) -m benchmarks.report; exit $$((tests | cases | others | figure | $$?))

runs/site/ready: pyproject.toml
	$(RUN) -m benchmarks.source_tree $(@D)
	@touch $@

.venv/ready: pyproject.toml
	@echo "setting up .venv (a few minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv-oldest/ready: RESOLUTION := lowest-direct
.venv-newest/ready: RESOLUTION := highest
.venv-oldest/ready .venv-newest/ready: pyproject.toml | .venv/ready
	@echo "setting up $(@D) (a few minutes, once)"
	$(BIN)/uv venv --quiet --clear --seed --python $(BIN)/python $(@D)
	$(BIN)/uv pip install --quiet --python $(@D)/bin/python --resolution $(RESOLUTION) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest runs
