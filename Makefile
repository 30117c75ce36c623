# make run     trains and grows the demo: creates .venv, installs, runs `python -m experiments.grow`
# make test    the fast tests (make test-all: the slow ones too)
# make lint    format, lint and type check
# make docs    build the API pages: docs/api/index.html
# make notebooks   run the notebooks, without changing them
# Another Python gets an environment of its own: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
ARGS ?=
PYTEST_ARGS ?= -q -n auto --maxprocesses 4

.PHONY: run test test-all lint format notebooks docs clean

run: $(VENV)/.demo
	$(BIN)/python -m experiments.grow $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

test-all: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

notebooks: $(VENV)/.dev
	ls notebooks/*.ipynb | xargs -n 1 -P 2 $(BIN)/jupyter execute

docs: $(VENV)/.dev
	$(BIN)/python docs/pages.py docs/api

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf docs/api .venv* build dist *.egg-info .pytest_cache .ruff_cache results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: nothing is installed again until pyproject.toml changes.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
