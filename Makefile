# `make demo` and `make test` build the environment on first use; nothing has to be activated.
PYTHON ?= python3
PICTURES ?= ../shared/corpora/photos
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test soak bench lint format clean

demo: $(READY)
	$(BIN)/tim demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(READY)
	$(BIN)/python -m pytest -m soak --timeout 3600

bench: $(READY)
	for what in attention step sample plan index; do echo "tim bench $$what"; $(BIN)/tim bench $$what || exit 1; done
	for what in data prepare; do echo "tim bench $$what"; $(BIN)/tim bench $$what $(PICTURES) --out bench || exit 1; done

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
