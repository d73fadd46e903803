# `make demo` installs Limbeck into a fresh .venv and runs its main job; `make check` does the same and runs every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo check quick format bench docs clean

demo: $(VENV)/.installed
	$(BIN)/limbeck demo

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n auto --dist loadscope --max-worker-restart=0 -m "not slow and not gpu and not served" --durations=10
	$(BIN)/pytest -q -n auto --dist loadscope --max-worker-restart=0 -m "slow and not gpu and not served" --durations=10

quick: $(VENV)/.installed-dev
	$(BIN)/pytest -q -n auto --dist loadscope --max-worker-restart=0 -m "not slow and not gpu and not served"

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks all

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Limbeck needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build -W -n --keep-going -q -b html docs build/docs

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
