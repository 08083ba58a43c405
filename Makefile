# Every target sets up what it needs in .venv. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart test lint format clean

quickstart: $(READY) ## train on real digits with two processes, then evaluate the result
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node=2 scripts/train.py --config configs/quickstart.yaml
	$(BIN)/python scripts/validate.py --checkpoint runs/quickstart/checkpoints/best.pt

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## forget the environment and what the quickstart made
	rm -rf .venv runs/quickstart data/digits

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(READY)
