# Two commands: `make train` and `make test`. Both install into .venv once. `make test-slow` adds long matrices.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: train test test-slow lint clean

train: $(STAMP)
	$(BIN)/moe train configs/quickstart.yaml

test: lint
	$(BIN)/pytest

test-slow: lint
	$(BIN)/pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# constraints.txt pins what a CPU install resolves to, so that a clone next year installs the same packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,dev]"
	touch $(STAMP)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
