# `make demo` and `make test` build the environment on first use; nothing has to be activated.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test soak lint format clean

demo: $(READY)
	$(BIN)/tim demo

test: $(READY)
	$(BIN)/python -m pytest

soak: $(READY)
	$(BIN)/python -m pytest -m soak --timeout 3600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml
	@echo "building .venv: PyTorch and DeepSpeed are about 6 GB, this takes some minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv demo
