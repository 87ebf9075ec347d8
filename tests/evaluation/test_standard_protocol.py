"""The whole protocol of `decm test` for ImageNet, on the Inception network with random weights."""

import hashlib
import json

import lightning as L
import numpy as np
import pytest
import torch

from decm_lightning import Distiller
from decm_lightning.data import Digits
from decm_lightning.evaluation import Evaluation
from decm_lightning.metrics import InceptionFeatures
from decm_lightning.metrics.inception_network import Inception
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher
from tests.metrics.networks import COLUMNS, seeded, uint8_images

pytestmark = pytest.mark.slow


def test_all_columns_are_written_against_a_file_of_adms_form(tmp_path, generator):
    torch.save(seeded(Inception(), 0), tmp_path / "weights.pth")
    features = InceptionFeatures(str(tmp_path / "weights.pth"))
    images = uint8_images(12, 8, generator)
    with torch.no_grad():
        views = {name: value.double().numpy() for name, value in features(images).items()}
    reference = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(
        reference,
        arr_0=images.permute(0, 2, 3, 1).numpy(),
        mu=views["pool"].mean(0),
        sigma=np.cov(views["pool"].T),
        mu_s=views["spatial"].mean(0),
        sigma_s=np.cov(views["spatial"].T),
    )
    callback = Evaluation(features, ["student/mix/1"], reference=str(reference), test_samples=12, labels="uniform")
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert Evaluation(features, ["student/mix/1"]).test_samples == 50_000
    student = Distiller(Teacher(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)))
    trainer.test(student, datamodule=Digits(reference_size=2), verbose=False)
    written = json.loads((tmp_path / "quality.json").read_text())
    row = written["rows"][0]
    assert list(row)[4:] == COLUMNS
    assert all(np.isfinite(row[name]) for name in COLUMNS)
    assert row["fid"] > 0
    assert row["sfid"] > 0
    assert row["inception_score"] >= 1
    assert written["protocol"]["reference sha256"] == hashlib.sha256(reference.read_bytes()).hexdigest()
    assert written["protocol"]["sfid"] == "real mean and covariance from the reference file"
