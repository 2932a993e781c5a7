# `make demo` and `make test` build the environment on first use; nothing has to be activated.
# `make test PYTHON=/path/to/python3.12` tests on another interpreter, in an environment of its own (.venv-3.12).
PYTHON ?= python3
PICTURES ?= ../shared/corpora/photos
ifeq ($(origin PYTHON),file)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
LATEST := $(VENV)-latest
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTS := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-latest soak gpu bench lint format clean

demo: $(READY)
	$(BIN)/tim demo

test: $(READY)
	$(BIN)/python $(TESTS)

# With the newest versions that the index has, for seeing the future early.
test-latest:
	@echo "building $(LATEST): PyTorch and DeepSpeed are about 6 GB, this takes some minutes"
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --upgrade pip
	@$(LATEST)/bin/python -m pip config list | sed -n "s/^.*\.constraint=/not the newest of all: pip's own configuration caps versions by /p"
	$(LATEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	$(LATEST)/bin/python $(TESTS)

soak: $(READY)
	$(BIN)/python -m pytest -m soak --timeout 3600

# What needs a GPU, on one, in under ten minutes.
gpu: $(READY)
	$(BIN)/python -m tests.gpu --out gpu.json

bench: $(READY)
	for what in attention step sample derivative plan index; do echo "tim bench $$what"; $(BIN)/tim bench $$what || exit 1; done
	for what in data prepare; do echo "tim bench $$what"; $(BIN)/tim bench $$what $(PICTURES) --out bench || exit 1; done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	@echo "building $(VENV): PyTorch and DeepSpeed are about 6 GB, this takes some minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv .venv-* demo
