"""FSDP2 over any number of processes, and checkpoints that are complete or absent."""

import resource
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from decm_lightning import Distiller, load
from decm_lightning.data import Digits
from decm_lightning.networks import DiT
from decm_lightning.networks.sharded import read_rest
from decm_lightning.teachers import Teacher
from decm_lightning.training.strategies import FSDP2
from tests.parallel.pair import SIZE

pytestmark = pytest.mark.slow


class Left(NamedTuple):
    """The results of a process: the size of its mesh, whether its student is sharded, and the errors of two saves."""

    size: int
    sharded: bool
    errors: list[tuple[type, int, str]]


def fit(folder: str, failing: int | None = None, resumed: str | None = None, steps: int = 2) -> Left:
    """Train two steps and overwrite the first checkpoint while one process may write at most 1 kB."""
    L.seed_everything(0, verbose=False)
    teacher = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.2)
    distiller = Distiller(Teacher(teacher))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy=FSDP2(),
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(distiller, Digits(batch_size=32), ckpt_path=resumed)
    path = Path(folder, "saved.ckpt")
    trainer.save_checkpoint(path)
    errors = []
    if failing is not None:
        with torch.no_grad():
            next(distiller.average.parameters()).add_(1)
        with writes_at_most(1000 if trainer.global_rank == failing else resource.RLIM_INFINITY):
            try:
                trainer.save_checkpoint(path)
            except OSError as error:
                errors.append((type(error), error.errno, str(error.filename)))
    mesh = distiller.device_mesh["data_parallel"].size()
    return Left(mesh, isinstance(distiller.network, FSDPModule), errors)


@contextmanager
def writes_at_most(size: int):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("processes", [1, 2])
def test_networks_are_sharded_over_all_processes_and_resumed(processes, pair, single, tmp_path):
    group = single if processes == 1 else pair
    for left in group.run(fit, str(tmp_path)):
        assert (left.size, left.sharded) == (processes, True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.ckpt"]
    assert read_rest(tmp_path / "saved.ckpt")["global_step"] == 2
    group.run(fit, str(tmp_path), None, str(tmp_path / "saved.ckpt"), 4)
    # The checkpoint of the same name was replaced.
    assert read_rest(tmp_path / "saved.ckpt")["global_step"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["saved.ckpt"]


@pytest.mark.parametrize("failing", range(SIZE))
def test_a_part_that_cannot_be_written_leaves_the_checkpoint_of_before(failing, pair, tmp_path):
    path = tmp_path / "saved.ckpt"
    for left in pair.run(fit, str(tmp_path), failing):
        # A limit on the file size simulates a full disk, with a different errno.
        [(kind, _, named)] = left.errors
        assert kind is OSError
        assert named == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["saved.ckpt"]
    assert read_rest(path)["global_step"] == 2
    start = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    assert next(load(path).parameters()).sub(next(start.parameters())).abs().max() < 1
