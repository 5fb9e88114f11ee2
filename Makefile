# All a machine needs is Python 3.11 or newer, with venv, and make. What is installed goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_HUB2 := $(VENV)-hub2/.installed
STAMP_OLDEST := $(VENV)-oldest/.installed
# Tools that look at the project from outside: cyclonedx-bom excludes the chardet that lighteval's tree resolves to.
TOOLS := $(VENV)-tools
STAMP_TOOLS := $(TOOLS)/.installed
# Two test processes on few cores: threads of their own would only fight.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=40

.DEFAULT_GOAL := help
.PHONY: help install install-hub2 browser demo test test-fast test-all test-hub2 test-recipes \
	install-oldest test-oldest test-newest test-wheel constraints-oldest build docs sbom audit lint bench

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create $(VENV) and install the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV). The first time this takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval,space,quant]'
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

install-oldest: $(STAMP_OLDEST)

$(STAMP_OLDEST): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-oldest.txt -e '.[dev,eval,space,quant]'
	@touch $@

test-oldest: install-oldest  ## fast tests with the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2 -m 'not gpu and not slow and not long' $(ARGS)

test-newest:  ## fast tests with the newest versions that pyproject.toml allows today, in a new environment
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,eval,space,quant]'
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n 2 -m 'not gpu and not slow and not long' $(ARGS)

test-wheel: install  ## wheel and sdist, built, and installed in an empty environment: the demo offline, types, import
	$(BIN)/python -m pytest -m long -s tests/test_wheel.py $(ARGS)

test-recipes: install  ## every recipe on tiny stand-ins of its models, on a local Hub; takes hours
	RESA_ALL_RECIPES=1 $(PYTEST) tests/test_recipes_on_hub.py $(ARGS)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP_TOOLS): Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1 uv==0.13.9
	@touch $@

constraints-oldest: $(STAMP_TOOLS)  ## write constraints-oldest.txt anew, after a change of pyproject.toml
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z]+\])?>=[^,"]+' pyproject.toml | sed -E 's/"//; s/\[[a-z]+\]//; s/>=/==/' >$(TOOLS)/bounds.txt
	$(TOOLS)/bin/uv pip compile --quiet --no-annotate --all-extras --python-version 3.11 --constraints $(TOOLS)/bounds.txt \
		--custom-compile-command 'make constraints-oldest' --output-file constraints-oldest.txt pyproject.toml

build: install  ## wheel and sdist, into dist
	$(BIN)/python -m hatchling build

docs: install  ## the API's pages, into build/docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m pdoc --docformat google --output-directory build/docs \
		resa_hf resa_hf.evaluation.audit resa_hf.features.causal resa_hf.features.reasoning resa_hf.tiny

sbom: install $(STAMP_TOOLS)  ## what is installed in $(VENV), as CycloneDX, into dist/sbom.json
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file dist/sbom.json $(BIN)/python

audit: $(STAMP_TOOLS)  ## known vulnerabilities of the versions in constraints.txt; needs the network
	$(TOOLS)/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

bench: install  ## speed and memory, each against a baseline in the same run
	$(BIN)/python -m benchmarks stage1
	$(BIN)/python -m benchmarks stage2
	$(BIN)/python -m benchmarks scaling
	$(BIN)/python -m benchmarks memory
	$(BIN)/python -m benchmarks import
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks evaluate
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/feature_extraction.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/top_examples_memory.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/explorer.py
