"""Custom parts named by a config: edge, time law, normalization, time weight, engine, schedule."""

import sys
from pathlib import Path

import torch
import yaml

from decm_lightning import cli

TEACHER = Path(__file__).parents[2] / "weights/digits/teacher"
MODULE = """
from dataclasses import dataclass

from decm_lightning.derivatives import functional
from decm_lightning.path import expand
from decm_lightning.time_laws import TimeLaw
from decm_lightning.triangle import Edge, Times

seen = {}


def norm(g, t):
    seen["g"] = g
    return g * expand(1 - t, g)


def weight(t):
    seen["t"] = t
    return 1 + t


def engine(network, x_t, t, s, condition, tangent):
    seen["s"] = s
    return functional(network, x_t, t, s, condition, tangent)


@dataclass(frozen=True)
class Part(Edge):
    width: float = 0.5

    def draw(self, t, step, generator):
        return Times(t, t + (1 - t) * self.width)


class Squared(TimeLaw):
    def quantiles(self, levels):
        return levels**2
"""
MODEL = {
    "class_path": "decm_lightning.Distiller",
    "init_args": {
        "teacher": {"class_path": "decm_lightning.teachers.PretrainedTeacher", "init_args": {"path": str(TEACHER)}},
        "derivative": "own_parts.engine",
        "objective": {
            "class_path": "decm_lightning.losses.Objective",
            "init_args": {
                "normalization": "own_parts.norm",
                "times": {"class_path": "own_parts.Squared"},
                "losses": {
                    "part": {
                        "edge": {"class_path": "own_parts.Part", "init_args": {"width": 0.25}},
                        "time_weight": "own_parts.weight",
                    }
                },
            },
        },
    },
}
TRAINER = {"accelerator": "cpu", "max_steps": 1, "logger": False, "limit_val_batches": 0}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


def test_parts_of_ones_own_are_used_and_saved_by_their_names(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(MODULE)
    data = {"class_path": "decm_lightning.data.Digits", "init_args": {"batch_size": 4}}
    config = {"trainer": TRAINER | QUIET, "model": MODEL, "data": data}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["decm", "fit", "--config", "own.yaml"])
    assert cli.main() == 0

    seen = sys.modules.pop("own_parts").seen
    t = seen["t"]
    # One squared time in each quarter of the levels; s a quarter of the way from t to 1.
    assert (t.sqrt() * 4).long().sort().values.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(seen["s"], t + (1 - t) * 0.25)
    assert seen["g"].shape == (4, 1, 8, 8)

    (checkpoint,) = tmp_path.glob("checkpoints/*step=1.ckpt")
    settings = torch.load(checkpoint, weights_only=True)["settings"]
    part = "objective.losses.part"
    names = ("derivative", "objective.normalization", "objective.times", f"{part}.time_weight", f"{part}.edge.class")
    found = [settings[name] for name in names]
    assert found == [f"own_parts.{name}" for name in ("engine", "norm", "Squared", "weight", "Part")]
    assert settings[f"{part}.edge.width"] == 0.25
    assert (settings["lr_scheduler.class"], settings["lr_scheduler.steps"]) == ("WarmupCosine", 1)
