# Two commands: `make serve` and `make test`. Both may be run again; what exists is not redone.
VENV := .venv
BIN := $(VENV)/bin
# What `make serve` serves: smollm2 (in minutes), or qwen2.5-coder-1.5b (1.1 GB to fetch, then ten minutes to an hour, once).
MODEL ?= smollm2
HOST ?= 127.0.0.1
PORT ?= 8000

.PHONY: install serve demo test test-gpu lint format clean

install:
	@bash scripts/install.sh

demo: install
	@$(BIN)/python scripts/demo.py --model $(MODEL)

serve: demo
	@$(BIN)/python scripts/demo.py --model $(MODEL) --hints $(HOST) $(PORT)
	@$(BIN)/prunepath serve $$($(BIN)/python scripts/demo.py --model $(MODEL) --checkpoint) --host $(HOST) --port $(PORT) \
	    --served-model-name $(MODEL) --max-model-len 2048

test: install
	@$(BIN)/python scripts/demo.py --fetch-only
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: install
	$(BIN)/python -m pytest -m gpu -n 6 --dist load -rA --durations=10

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
