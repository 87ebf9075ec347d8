"""Feature networks written by users."""

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from decm_lightning import Distiller
from decm_lightning.data import Digits
from decm_lightning.evaluation import Evaluation
from decm_lightning.metrics import FeatureMetrics, FeatureNetwork
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher


class Rows(nn.Module):
    """A plain module with `num_features`, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 8

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 3)) / 64


class Columns(FeatureNetwork):
    name = "means of the columns"
    num_features = 8
    samples = 30

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 2)) / 64


def test_evaluation_measures_on_a_plain_module(tmp_path):
    callback = Evaluation(Rows(), ["student/mix/1"], samples=20, batch_size=10)
    assert callback.test_samples == 20
    data = Digits(reference_size=40)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Distiller(Teacher(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)))
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    assert set(found) == {"fd/student/mix/1", "kid/student/mix/1"}
    assert found["fd/student/mix/1"] > 0
    assert Evaluation([Rows(), Columns()], ["student/mix/1"], samples=20).test_samples == 30


def test_a_plain_module_is_measured_as_a_feature_network_of_the_same_values(generator):
    real, made = (torch.randint(256, (50, 1, 8, 8), generator=generator, dtype=torch.uint8) for _ in range(2))
    values = []
    for network, turned in ((Rows(), False), (Columns(), True)):
        metrics = FeatureMetrics(network)
        metrics.update(real.mT if turned else real, real=True)
        metrics.update(made.mT if turned else made, real=False)
        values.append(metrics.compute())
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_a_name_is_the_class_unless_one_is_given():
    assert FeatureMetrics(Rows()).name == "Rows"
    assert FeatureMetrics(Columns()).name == "means of the columns"
    assert FeatureMetrics(Rows()).columns == ["fd", "kid"]


def test_a_module_without_num_features_is_refused():
    with pytest.raises(ValueError, match="num_features: got Linear"):
        FeatureMetrics(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_features"):
        Evaluation([Rows(), nn.Linear(2, 2)], ["student/mix/1"])
