"""The paired columns and the floors, on flows and distributions whose values are known."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from decm_lightning.data import Digits
from decm_lightning.demo import DigitsFeatures
from decm_lightning.evaluation.floors import Floor
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.paired import Paired, PairedDistance, runge_kutta
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.even_split import split_evenly
from decm_lightning.flows import Gaussian
from decm_lightning.guidance import Guidance
from decm_lightning.metrics import FeatureMetrics, FeatureNetwork
from decm_lightning.metrics.metric import Frechet
from decm_lightning.samplers import flow_map_of
from decm_lightning.seeds import generator_of
from tests.evaluation.test_evaluation import distiller, evaluation, trainer
from tests.metrics.networks import COLUMNS, Small

SHAPE = (1, 4, 4)
# All samples are inside [-1, 1], so pixels are not clamped.
FLOW = Gaussian(mean=0.2, std=0.1)
SHIFT = 0.25


class Pixels(FeatureNetwork):
    """The pixels as features."""

    num_features = 16

    def forward(self, images):
        return images.flatten(1).double()

    def metrics(self):
        return [Frechet("fd", "features", 16)]


class Flows(L.LightningModule):
    """The Gaussian flow as a teacher, its exact map, and a map that ends `SHIFT` beside it."""

    teacher = None
    guidance = Guidance()
    ema_decay = None
    average = SimpleNamespace(sample_shape=SHAPE)

    def models(self):
        def shifted(x_t, t, s, condition):
            return FLOW(x_t, t, s) + SHIFT

        return {"teacher": flow_map_of(FLOW.velocity), "exact": FLOW, "shifted": shifted}


def paired(spec: str, samples: int = 40, **settings) -> dict[str, float]:
    generator = SampleGenerator(Flows(), SimpleNamespace(num_classes=10))
    quality = FeatureMetrics(Pixels())
    distance = PairedDistance(generator, Paired(**settings), quality)
    distance.prepare(samples, 15, 0, 1)
    for rows in split_evenly(samples, 15, 0, 1):
        x = generator.samples(SamplingSpec.parse(spec), rows)
        distance.update(rows, x, {quality: quality.outputs(generator.images(x))})
    return distance.compute()


def test_exact_map_has_distance_zero_and_a_shifted_map_its_shift():
    for spec in ("exact/mix/1", "exact/consistency/1"):
        assert paired(spec)["paired_rmse"] < 1e-5
    values = paired("shifted/mix/1")
    assert values["paired_rmse"] == pytest.approx(SHIFT, rel=1e-4)
    # 16 pixels, each 127.5 SHIFT levels away, up to rounding.
    assert values["paired_features"] == pytest.approx(4 * 127.5 * SHIFT, rel=0.01)


def test_one_euler_step_has_the_distance_of_the_formula():
    """It ends at the mean of the data, and the ODE at mean + std x_0."""
    x_0 = torch.stack([torch.randn(SHAPE, generator=generator_of(0, row)) for row in range(25)])
    expected = FLOW.std * x_0.square().mean().sqrt()
    assert paired("teacher/euler/1", samples=25)["paired_rmse"] == pytest.approx(expected.item(), rel=1e-4)


def test_error_of_the_teachers_ode_falls_with_the_fourth_power_of_its_steps():
    flow, x_0 = Gaussian(mean=3.0, std=0.5), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = flow.flow_map(x_0, torch.zeros(9), torch.ones(9))
    few, more = ((runge_kutta(flow, x_0, None, steps) - exact).abs().max() for steps in (10, 20))
    assert 10 < few / more < 30


def test_added_noise_counts_as_distance():
    assert paired("exact/consistency/4")["paired_rmse"] > 0.05


@pytest.mark.parametrize("settings", [{"samples": 0}, {"steps": 0}])
def test_settings_below_one_are_refused(settings):
    with pytest.raises(ValueError, match="0"):
        Paired(**settings)


def floor(sizes, mean=0.0, seed=0) -> dict:
    """The floor row of two normal samples of 16 features."""
    quality = FeatureMetrics(Pixels())
    measured, generator = Floor([quality]), torch.Generator().manual_seed(seed)
    for is_first, size in zip((True, False), sizes, strict=True):
        features = torch.randn(size, 16, generator=generator, dtype=torch.float64) + mean * is_first
        measured.update({quality: {"features": features}}, is_first)
    return measured.compute("two samples")


def test_floor_of_equal_distributions_falls_like_one_over_n():
    few, many = ([floor((n, n), seed=seed)["fd"] for seed in range(5)] for n in (500, 4000))
    assert 6 < sum(few) / sum(many) < 10.5
    assert floor((4000, 4000), mean=1.0)["fd"] == pytest.approx(16, rel=0.05)


def test_halves_take_every_other_image_and_the_metrics_of_validation():
    quality = FeatureMetrics(Small(16))
    views = {name: view.repeat_interleave(2, 0) for name, view in quality.outputs(images(30)).items()}
    measured = Floor([quality])
    measured.split({quality: views})
    row = measured.compute("halves")
    assert (row["between"], row["images"]) == ("halves", 30)
    assert row["fid"] == pytest.approx(0, abs=1e-9)
    assert set(row) - {"between", "images"} == {"fid", "kid"} < set(COLUMNS)
    assert Floor([quality]).compute("nothing") == {}


def images(count):
    return torch.randint(256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Distance(DigitsFeatures):
    """The Fréchet distance alone: kernel distances of subsets take seconds."""

    def metrics(self):
        return [Frechet("fd", "features", 64)]


SPECS = ["teacher/euler/2", "teacher/euler/20", "student/mix/2"]


def measured_table(folder, **options) -> dict:
    callback = evaluation(features=Distance(), test_specs=SPECS, **options)
    trainer(folder, callback).test(distiller(), datamodule=Digits(reference_size=101), verbose=False)
    return json.loads((folder / "quality.json").read_text())


def test_a_test_writes_columns_floors_and_settings(tmp_path):
    settings = {"paired": Paired(samples=30, steps=10), "floors": True}
    content = measured_table(tmp_path, test_samples=50, **settings)
    by_spec = {f"{row['model']}/{row['sampler']}/{row['steps']}": row for row in content["rows"]}
    few, many, student = (by_spec[spec] for spec in SPECS)
    assert 0 < many["paired_rmse"] < few["paired_rmse"] / 5
    assert 0 < many["paired_features"] < few["paired_features"]
    assert student["paired_rmse"] > 0
    assert "samples 0 to 29" in content["protocol"]["paired"]
    halves, teacher = content["floors"]
    assert (halves["images"], teacher["images"]) == (50, 50)
    assert halves["paired_rmse"] is None
    # Samples of other noise are farther away than any sampler's.
    assert teacher["paired_rmse"] > few["paired_rmse"]
    assert teacher["fd"] > 0
    assert "teacher/euler/20" in (tmp_path / "quality.md").read_text().splitlines()[-1]

    in_parts = measured_table(tmp_path, test_samples=50, batch_size=7, **settings)
    for row, other in zip(content["rows"] + [teacher], in_parts["rows"] + [in_parts["floors"][1]], strict=True):
        for name in ("fd", "paired_rmse", "paired_features"):
            assert row[name] == pytest.approx(other[name], rel=1e-4)


def test_values_and_files_are_as_before_without_baselines(tmp_path):
    plain = measured_table(tmp_path, test_samples=20)
    assert not {"floors"} & set(plain)
    assert not [name for row in plain["rows"] for name in row if name.startswith("paired")]
    measured = measured_table(tmp_path, test_samples=20, paired=Paired(steps=2), floors=True)
    assert [row["fd"] for row in plain["rows"]] == [row["fd"] for row in measured["rows"]]
