# All a machine needs is Python 3.11 or newer, with venv, and make. What is installed goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_HUB2 := $(VENV)-hub2/.installed
# Two test processes on few cores: threads of their own would only fight.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help install install-hub2 browser demo test test-fast test-all test-hub2 test-recipes lint bench

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create $(VENV) and install the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV). The first time this takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval,space]'
	@touch $@

demo: install  ## the whole way on the tiny reasoner, offline; options in ARGS, for example ARGS=--full
	$(BIN)/resa-hf demo $(ARGS)

browser:  ## Chromium for the tests of the explorer, by apt-get, where there is none
	tests/install_chromium.sh

test: install browser  ## the tests, the slow ones too
	$(PYTEST) -m 'not gpu and not long' $(ARGS)

test-fast: install  ## the tests that take seconds
	$(PYTEST) -m 'not gpu and not slow and not long' $(ARGS)

test-all: install browser  ## all tests: round trips in fresh processes, thousands of broken files, simulations in full
	$(PYTEST) -m 'not gpu' $(ARGS)

install-hub2: $(STAMP_HUB2)

$(STAMP_HUB2): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-hub2
	grep -vE '^(huggingface-hub|math-verify|latex2sympy2-extended)==' constraints.txt > $(VENV)-hub2/constraints.txt
	$(VENV)-hub2/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(VENV)-hub2/constraints.txt -e '.[dev]' 'huggingface_hub>=2,<3' 'math-verify>=0.9'
	@touch $@

test-hub2: install-hub2  ## fast tests of what touches huggingface_hub 2 or the newest math-verify, which the extra `eval` excludes
	OMP_NUM_THREADS=1 $(VENV)-hub2/bin/python -m pytest -n 2 -m 'not gpu and not slow and not long' $(ARGS) \
		$$(grep -lE 'HubServer|is_correct|licence_of' tests/test_*.py)

test-recipes: install  ## every recipe on tiny stand-ins of its models, on a local Hub; takes hours
	RESA_ALL_RECIPES=1 $(PYTEST) tests/test_recipes_on_hub.py $(ARGS)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## speed and memory, each against a baseline in the same run
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluation_speed.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/feature_extraction.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/top_examples_memory.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/explorer.py
