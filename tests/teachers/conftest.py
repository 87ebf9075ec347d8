"""Shared by the tests of teachers: one training step with a teacher from a config."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from decm_lightning import cli

CONFIG = str(Path(__file__).parents[2] / "configs/digits/decm.yaml")


@pytest.fixture
def fit(monkeypatch, tmp_path) -> Callable[..., int]:
    """A function from a teacher and its arguments to the exit code of one training step in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # Lightning's log handler still refers to the standard error of the first test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(teacher: str, arguments: dict[str, str], *argv: str) -> int:
        key = "--model.init_args.teacher"
        named = [part for name, value in arguments.items() for part in (f"{key}.init_args.{name}", value)]
        trainer = ["--trainer.max_steps=1", "--trainer.logger=false", "--trainer.callbacks=[]"]
        trainer += ["--trainer.enable_progress_bar=false", "--data.init_args.batch_size=16"]
        teacher = f"decm_lightning.teachers.{teacher}"
        monkeypatch.setattr(sys, "argv", ["decm", "fit", "--config", CONFIG, key, teacher, *named, *trainer, *argv])
        return cli.main()

    return run
