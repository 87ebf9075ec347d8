import io

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from decm_lightning import TeacherTraining
from decm_lightning.data import Digits
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.sample_grid import SampleGrid
from decm_lightning.networks import DiT

SPECS = ["teacher/euler/1", "teacher/euler/3"]


def fit(logger, folder, grids=(), **options):
    L.seed_everything(0, verbose=False)
    module = TeacherTraining(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        limit_val_batches=0,
        logger=logger,
        callbacks=list(grids),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, datamodule=Digits(batch_size=32))
    return module


@pytest.mark.parametrize("accumulated", [1, 2])
def test_grids_are_logged_once_every_n_steps(tmp_path, accumulated):
    logger = TensorBoardLogger(tmp_path)
    fit(logger, tmp_path, [SampleGrid(SPECS, every_n_steps=2)], accumulate_grad_batches=accumulated)
    events = EventAccumulator(logger.log_dir).Reload()
    images = events.Images("samples")
    assert [image.step for image in images] == [2, 4]
    assert (images[0].height, images[0].width) == (2 * 8, 10 * 8)
    # The latest grid, enlarged.
    latest = torch.from_numpy(np.array(Image.open(f"{logger.log_dir}/samples.png")))[::8, ::8]
    logged = torch.from_numpy(np.array(Image.open(io.BytesIO(images[1].encoded_image_string)).convert("L")))
    assert torch.equal(latest, logged)


def test_grids_change_nothing_in_training(tmp_path):
    plain = fit(TensorBoardLogger(tmp_path), tmp_path)
    watched = fit(TensorBoardLogger(tmp_path), tmp_path, [SampleGrid(SPECS, every_n_steps=1, columns=3)])
    assert watched.training
    assert watched.average.training == plain.average.training
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["none", "csv"])
def test_nothing_is_generated_without_tensorboard(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(SampleGenerator, "generate", None)
    fit(CSVLogger(tmp_path) if kind == "csv" else False, tmp_path, [SampleGrid(SPECS, every_n_steps=1)])


@pytest.mark.parametrize(("argument", "message"), [("every_n_steps", "every_n_steps"), ("columns", "columns")])
def test_bad_numbers_are_refused(argument, message):
    with pytest.raises(ValueError, match=f"{message} must be at least 1: got 0"):
        SampleGrid(SPECS, **{argument: 0})
