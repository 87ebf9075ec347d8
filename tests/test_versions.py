"""The versions that pyproject.toml allows, and the one that compilation needs."""

import sys
import tomllib
from inspect import unwrap
from pathlib import Path

import lightning as L
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch.torch_version import TorchVersion

from decm_lightning import cli
from decm_lightning.cli.trainer import build
from decm_lightning.networks import MLP

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "dev"}
LINES = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
REQUIRED = [requirement for line in LINES if (requirement := Requirement(line)).name != PROJECT["name"]]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {package: Version(version) for package, version in pairs}


def test_the_lowest_versions_are_those_that_are_tested():
    lowest = pins("constraints-lowest.txt")
    floors = {
        requirement.name: Version(bound.version)
        for requirement in REQUIRED
        for bound in requirement.specifier
        if bound.operator in (">=", "==")
    }
    assert floors.keys() == {requirement.name for requirement in REQUIRED}
    assert {name: lowest[name] for name in floors} == floors


def test_the_versions_of_make_env_are_allowed():
    newest = pins("constraints.txt")
    for requirement in REQUIRED:
        if requirement.name in newest:
            assert newest[requirement.name] in requirement.specifier


def test_only_einops_has_an_upper_bound():
    """The dual engine registers a private backend with it."""
    bounded = {requirement.name for requirement in REQUIRED if "<" in str(requirement.specifier)}
    assert bounded == {"einops"}


def test_an_older_torch_is_refused_in_one_line_where_a_fit_compiles(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cu128"))
    with pytest.raises(ValueError, match=r"2\.13.*2\.9\.1"):
        MLP(2).compile_units()
    config = str(ROOT / "configs" / "digits" / "teacher.yaml")
    monkeypatch.setattr(sys, "argv", ["decm", "fit", "--config", config, "--model.init_args.compile", "true"])
    assert cli.main() == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("decm: error:")
    assert "2.13" in line


@pytest.mark.compiled
@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.14.1", "3.0"])
def test_a_newer_torch_compiles(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    MLP(2).compile_units()


def test_one_batch_is_not_read_as_all_batches(monkeypatch):
    """typing gives Lightning's annotation in either order, by what was imported before."""
    for name in ("limit_val_batches", "limit_train_batches"):
        monkeypatch.setitem(unwrap(L.Trainer.__init__).__annotations__, name, float | int | None)
    config = ROOT / "configs" / "digits" / "teacher.yaml"
    options = ("--trainer.limit_val_batches", "1", "--trainer.limit_train_batches", "0.5")
    trainer = build("--config", str(config), *options).config.trainer
    assert repr(trainer.limit_val_batches) == "1"
    assert trainer.limit_train_batches == 0.5
    assert type(trainer.val_check_interval) is int
