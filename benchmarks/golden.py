"""python -m benchmarks.golden --out FILE: record numbers that a refactoring must reproduce bit for bit.

Record them before a change and compare afterwards on the same machine: `--against FILE` prints the differences and
exits with 1. The numbers are the losses of 30 training steps of every preset on digits, hashes of the trained weights,
the quality table of the student in weights/digits, and the SHA-256 of encoded shards.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli

from benchmarks.rehearsal import images
from decm_lightning import Distiller, losses
from decm_lightning.cli.encode import encode
from decm_lightning.data import Digits
from decm_lightning.demo import DigitsFeatures
from decm_lightning.evaluation import Evaluation
from decm_lightning.files import file_sha256, tensors_sha256
from decm_lightning.guidance import Guidance
from decm_lightning.losses import Objective
from decm_lightning.networks import load
from decm_lightning.teachers import PretrainedTeacher

TEACHER, STUDENT, VAE = "weights/digits/teacher", "weights/digits/student", "weights/rehearsal/vae"
SPECS = ["teacher/euler/4", "student/mix/1", "student/mix/4", "student/consistency/4", "student/euler/8"]
PRESETS: dict[str, Callable[[], Objective]] = {
    "paper": lambda: losses.paper(r_decay_steps=20_000),
    "paper, batch divided": lambda: losses.paper(r_decay_steps=20_000, batch_fractions=(0.5, 0.25, 0.25)),
    "end_identity": losses.end_identity,
    "consistency_only": losses.consistency_only,
    "flow_matching_only": losses.flow_matching_only,
    "consistency_and_flow_matching": losses.consistency_and_flow_matching,
    "facm": losses.facm,
    "mean_flow": losses.mean_flow,
    "lagrangian": losses.lagrangian,
}


class Curve(L.Callback):
    """Records the losses of each step as hexadecimal numbers, which are exact."""

    def __init__(self) -> None:
        self.losses: list[dict[str, str]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Append the losses of the step."""
        self.losses.append({name: term.value.item().hex() for name, term in pl_module.terms.items()})


def trainer(**options: Any) -> L.Trainer:
    """Return a quiet trainer on one CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, limit_val_batches=0, enable_checkpointing=False, **quiet, **options)


def training(preset: Callable[[], Objective], steps: int) -> dict[str, Any]:
    """Return the losses of a preset's first steps, and the hash of network and average after them."""
    L.seed_everything(0, verbose=False)
    curve = Curve()
    module = Distiller(
        PretrainedTeacher(TEACHER),
        objective=preset(),
        guidance=Guidance(1.25),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        ema_decay=0.999,
    )
    trainer(max_steps=steps, gradient_clip_val=1.0, callbacks=[curve]).fit(module, Digits())
    return {"losses": curve.losses, "weights": tensors_sha256(module.state_dict())}


def quality(samples: int, folder: str) -> list[dict[str, Any]]:
    """Return the quality table of the student in weights/digits."""
    L.seed_everything(0, verbose=False)
    module = Distiller(PretrainedTeacher(TEACHER), load(STUDENT), guidance=Guidance(1.25))
    measuring = Evaluation(DigitsFeatures(), SPECS, samples=samples)
    trainer(callbacks=[measuring], default_root_dir=folder).test(module, Digits(), verbose=False)
    return json.loads((Path(folder) / "quality.json").read_text())["rows"]


def shards(folder: str) -> dict[str, str]:
    """Encode the digits; return the SHA-256 of each shard by name."""
    images(Path(folder, "images"))
    out = Path(folder, "latents")
    encode(f"{folder}/images", VAE, str(out), size=16, shard_size=500, num_workers=0, accelerator="cpu")
    return {file.name: file_sha256(file) for file in sorted(out.glob("*.safetensors"))}


def main(out: Path, against: Path | None = None, steps: int = 30, samples: int = 200, threads: int = 1) -> None:
    """Record the numbers and compare them with an earlier recording.

    Args:
        out: the JSON file to write.
        against: an earlier recording with the same steps and samples.
        steps: training steps of each preset.
        samples: images per row of the quality table.
        threads: CPU threads. The number affects rounding, because it changes the order of sums.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        numbers: dict[str, Any] = {name: training(preset, steps) for name, preset in PRESETS.items()}
        numbers |= {"quality": quality(samples, folder), "shards": shards(folder)}
    out.write_text(json.dumps(numbers, indent=1) + "\n")
    if against is None:
        return
    expected = json.loads(against.read_text())
    differing = [name for name in {**expected, **numbers} if expected.get(name) != numbers.get(name)]
    if differing:
        sys.exit(f"these differ from {against}: {', '.join(differing)}")
    print(f"all {len(numbers)} parts equal those in {against}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
