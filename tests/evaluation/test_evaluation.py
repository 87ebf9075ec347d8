import hashlib
import json
import platform
from importlib import metadata

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import DataLoader

from decm_lightning import Distiller, TeacherTraining
from decm_lightning.data import Digits
from decm_lightning.demo import DigitsFeatures
from decm_lightning.errors import NonFiniteError
from decm_lightning.evaluation.evaluation import Evaluation
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.evaluation.table import Table
from decm_lightning.guidance import Guidance
from decm_lightning.image_writer import to_uint8
from decm_lightning.metrics import FeatureMetrics
from decm_lightning.metrics.metric import Counts, Frechet
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher
from tests.metrics.networks import COLUMNS, Small

SPECS = ["student/mix/2", "student/consistency/2"]
TEST_SPECS = ["student/mix/1", "teacher/euler/3"]
GUIDED = Guidance(scale=2.0)


def network() -> DiT:
    return DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)


def distiller(guidance: Guidance = GUIDED) -> Distiller:
    L.seed_everything(0, verbose=False)
    teacher = network()
    # Some of its layers start at zero: all specs would be alike, and all labels.
    for parameter in teacher.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return Distiller(Teacher(teacher), guidance=guidance)


def evaluation(**options) -> Evaluation:
    given = {"features": DigitsFeatures(), "specs": SPECS, "test_specs": TEST_SPECS, "samples": 40}
    return Evaluation(**given | options)


def trainer(folder, *callbacks: L.Callback, **options) -> L.Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 2}
    defaults["num_sanity_val_steps"] = 1
    return L.Trainer(
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | options,
    )


def validated(module, folder, **options) -> dict[str, float]:
    data = Digits(reference_size=300)
    metrics = trainer(folder, evaluation(**options)).validate(module, datamodule=data, verbose=False)[0]
    return {name: value for name, value in metrics.items() if name.startswith(("fd/", "kid/"))}


def test_validation_logs_the_distances_of_the_cells_own_samples(tmp_path):
    module = distiller()
    metrics = validated(module, tmp_path)
    assert set(metrics) == {f"{name}/{spec}" for name in ("fd", "kid") for spec in SPECS}

    data = Digits()
    data.setup("validate")
    quality = FeatureMetrics(DigitsFeatures())
    quality.update(to_uint8(data.reference.images[:300]), real=True)
    quality.update(SampleGenerator(module, data).generate(SamplingSpec.parse(SPECS[0]), range(40)), real=False)
    expected = quality.compute()
    assert metrics["fd/student/mix/2"] == pytest.approx(expected["fd"], rel=1e-5)
    assert metrics["kid/student/mix/2"] == pytest.approx(expected["kid"], rel=1e-5)


def test_values_repeat_whatever_the_global_seed_and_the_batch_size(tmp_path):
    module = distiller()
    first = validated(module, tmp_path)
    torch.manual_seed(1)
    assert validated(module, tmp_path) == first
    in_parts = validated(module, tmp_path, batch_size=7)
    assert in_parts["fd/student/mix/2"] == pytest.approx(first["fd/student/mix/2"], rel=1e-4)
    assert validated(module, tmp_path, seed=1) != first


def test_training_is_the_same_with_and_without(tmp_path):
    def weights(*callbacks):
        module = distiller()
        trainer(tmp_path, *callbacks, max_steps=4, val_check_interval=2).fit(module, datamodule=Digits())
        return torch.cat([p.flatten() for p in module.parameters()]), torch.get_rng_state()

    for plain, measured in zip(weights(), weights(evaluation()), strict=True):
        assert torch.equal(plain, measured)


def test_real_images_are_taken_in_once_and_checkpoints_can_follow_a_distance(tmp_path):
    callback = evaluation(specs=SPECS[:1])
    best = ModelCheckpoint(tmp_path, monitor="fd/student/mix/2", save_top_k=1)
    running = trainer(tmp_path, callback, best, enable_checkpointing=True, max_steps=4, val_check_interval=2)
    running.fit(distiller(), datamodule=Digits(reference_size=300))
    assert callback.qualities[0].counts() == Counts(300, 40)
    assert best.best_model_score > 0
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert all(name.startswith(("network.", "average.")) for name in state)


def test_testing_writes_the_table_and_the_samples(tmp_path, capsys):
    running = trainer(tmp_path, evaluation(test_samples=60))
    metrics = running.test(distiller(), datamodule=Digits(reference_size=300), verbose=False)[0]
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["metric"] == "Fréchet distance on the digits classifier"
    assert (written["protocol"]["real images"], written["protocol"]["generated images"]) == (300, 60)
    keys = [(row["model"], row["sampler"], row["steps"], row["nfe"]) for row in written["rows"]]
    assert keys == [("student", "mix", 1, 1.0), ("teacher", "euler", 3, 6.0)]
    for row, spec in zip(written["rows"], TEST_SPECS, strict=True):
        assert row["fd"] == pytest.approx(metrics[f"test/fd/{spec}"], rel=1e-6)
        assert row["kid"] == pytest.approx(metrics[f"test/kid/{spec}"], rel=1e-6)

    page = (tmp_path / "quality.md").read_text()
    assert "| teacher | euler | 3 | 6 | " in page
    assert "FID" not in page
    width, height = Image.open(tmp_path / "samples.png").size
    assert width > 3 * height > 0
    printed = capsys.readouterr().out
    # The protocol is in the files only.
    assert page.partition("\n\n|")[2] in printed
    assert "- seed: " not in printed
    assert "quality.md, quality.json, samples.png" in printed


@pytest.mark.parametrize("labels", ["balanced", "uniform"])
def test_each_image_is_sampled_once_and_serves_metrics_nfe_and_grid(tmp_path, monkeypatch, labels):
    module, rows, shown = distiller(), {}, {}
    for name, network in (("student", module.average), ("teacher", module.teacher.network)):
        network.register_forward_pre_hook(
            lambda part, args, name=name: rows.update({name: rows.get(name, 0) + len(args[0])})
        )
    monkeypatch.setattr(Table, "write", lambda table, folder, images: shown.update(table=table, images=images) or [])
    callback = evaluation(test_samples=37, batch_size=8, labels=labels, test_specs=["student/mix/3", "teacher/euler/3"])
    data = Digits(reference_size=50)
    trainer(tmp_path, callback).test(module, datamodule=data, verbose=False)
    # The teacher is guided: two passes a step.
    assert rows == {"student": 37 * 3, "teacher": 37 * 6}
    assert [row.nfe for row in shown["table"].rows] == [3, 6]
    generator = SampleGenerator(module, data, labels=labels)
    expected = generator.grid([SamplingSpec.parse("student/mix/3"), SamplingSpec.parse("teacher/euler/3")], 10)
    assert (shown["images"].int() - expected.int()).abs().max() <= 1
    assert shown["table"].columns == [str(label) for label in generator.condition(range(10)).tolist()]


def test_options_of_a_spec_are_a_row_of_the_table(tmp_path):
    specs = ["student/mix/2", "student/mix/2?s1=0.4"]
    written, logged = results(tmp_path, test_specs=specs)
    assert [row.get("options") for row in written["rows"]] == [None, {"s1": 0.4}]
    assert "| student | mix?s1=0.4 | 2 | 2 | " in (tmp_path / "quality.md").read_text()
    assert logged["test/fd/student/mix/2"] != logged["test/fd/student/mix/2?s1=0.4"]
    assert written["protocol"]["times (t -> s)"].endswith("student/mix/2?s1=0.4: 0 -> 0.4, 0.4 -> 1")


def test_a_teacher_in_training_is_tested_on_the_same_cells_by_default(tmp_path):
    module = TeacherTraining(network())
    callback = Evaluation(DigitsFeatures(), ["teacher/euler/2"], samples=20)
    metrics = trainer(tmp_path, callback).test(module, datamodule=Digits(reference_size=50), verbose=False)[0]
    assert set(metrics) == {"test/fd/teacher/euler/2", "test/kid/teacher/euler/2"}


def test_diverged_weights_are_named(tmp_path):
    module = distiller()
    torch.nn.init.constant_(module.average.final_layer.linear.bias, float("nan"))
    with pytest.raises(NonFiniteError, match=r"samples of student/mix/2 are not finite.*'student' have diverged"):
        validated(module, tmp_path)


def test_missing_images_classes_and_models_are_refused(tmp_path):
    data = Digits()
    data.reference_size = 0
    with pytest.raises(ValueError, match="the validation or test loader is empty"):
        trainer(tmp_path, evaluation()).validate(distiller(), datamodule=data, verbose=False)
    with pytest.raises(ValueError, match="num_classes"):
        trainer(tmp_path, evaluation()).validate(distiller(), DataLoader([0]), verbose=False)
    with pytest.raises(ValueError, match="student, teacher: got 'tutor'"):
        validated(distiller(), tmp_path, specs=["tutor/mix/1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"specs": []}, "specs and test_specs must name at least one model/sampler/steps each"),
        ({"test_specs": []}, "specs and test_specs must name at least one model/sampler/steps each"),
        ({"samples": 1}, "samples must be at least 2: got 1"),
        ({"test_samples": 0}, "samples must be at least 2: got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1: got 0"),
        ({"labels": "random"}, "labels must be balanced or uniform: got 'random'"),
        ({"features": []}, "features must be at least one network: got none"),
    ],
)
def test_arguments_out_of_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluation(**options)


def results(folder, data=None, **options) -> tuple[dict, dict[str, float]]:
    """Return the content of quality.json and the logged values."""
    running = trainer(folder, evaluation(**{"test_specs": ["student/mix/2"]} | options))
    logged = running.test(distiller(), datamodule=data or Digits(reference_size=50), verbose=False)[0]
    return json.loads((folder / "quality.json").read_text()), logged


def real_images() -> np.ndarray:
    data = Digits()
    data.setup("test")
    return to_uint8(data.reference.images[:50]).permute(0, 2, 3, 1).numpy()


def moments(images: np.ndarray) -> dict[str, np.ndarray]:
    features = Small()(torch.from_numpy(images).permute(0, 3, 1, 2))
    pool, spatial = features["pool"].numpy(), features["spatial"].numpy()
    return {"mu": pool.mean(0), "sigma": np.cov(pool.T), "mu_s": spatial.mean(0), "sigma_s": np.cov(spatial.T)}


def test_testing_writes_every_column_and_validation_logs_the_cheap_ones(tmp_path):
    written, logged = results(tmp_path, features=Small(), test_samples=60)
    row = written["rows"][0]
    assert list(row) == ["model", "sampler", "steps", "nfe", *COLUMNS]
    assert logged == pytest.approx({f"test/{name}/student/mix/2": row[name] for name in COLUMNS}, rel=1e-6)
    page = (tmp_path / "quality.md").read_text().splitlines()
    assert "| model | sampler | steps | nfe | " + " | ".join(COLUMNS) + " |" in page

    data = Digits(reference_size=50)
    metrics = trainer(tmp_path, evaluation(features=Small())).validate(distiller(), datamodule=data, verbose=False)[0]
    assert {name.split("/")[0] for name in metrics} == {"fid", "kid"}


def test_references_give_what_the_loaders_images_give_and_the_loader_is_then_left_alone(tmp_path):
    images = real_images()
    np.savez(tmp_path / "adm.npz", arr_0=images, **moments(images))
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "facm.npz", **{name: moments(images)[name] for name in ("mu", "sigma")})
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / "folder" / f"{number:02d}.png")

    def values(written: dict) -> dict[str, float]:
        return {name: value for name, value in written["rows"][0].items() if name in COLUMNS}

    expected = values(results(tmp_path, features=Small())[0])
    for name in ("adm.npz", "images.npz", "folder"):
        written, _ = results(tmp_path, Unread(reference_size=3), features=Small(), reference=str(tmp_path / name))
        assert values(written) == pytest.approx(expected, rel=1e-6)
        assert written["protocol"]["real images"] == 50
    written, _ = results(
        tmp_path, Unread(reference_size=3), features=Small(), reference=str(tmp_path / "facm.npz"), batch_size=7
    )
    given = {name: expected[name] for name in ("fid", "inception_score")}
    assert values(written) == pytest.approx(given, rel=1e-6)
    protocol = written["protocol"]
    assert protocol["real images"] == "none: mean and covariance only"
    assert protocol["precision"] == f"not measured: {tmp_path / 'facm.npz'} has no images"
    assert protocol["fid"] == "real mean and covariance from the reference file"


class Unread(Digits):
    """Digits whose real images must not be decoded."""

    def decode(self, x):
        assert len(x) > 3
        return x


def test_the_protocol_says_all_that_figures_depend_on(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", arr_0=real_images())
    written, _ = results(
        tmp_path,
        features=Small(),
        reference=str(tmp_path / "images.npz"),
        labels="uniform",
        seed=5,
        batch_size=16,
        test_specs=["student/mix/4", "student/consistency/3", "teacher/euler/2"],
    )
    digest = hashlib.sha256((tmp_path / "images.npz").read_bytes()).hexdigest()
    packages = ("decm-lightning", "torch", "lightning", "torchmetrics")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    assert written["protocol"] == {
        "checkpoint": "none: weights in memory",
        "weights": "student: exponential moving average (decay 0.9999); teacher: as loaded",
        "weights sha256": distiller().average.identity(),
        "times (t -> s)": "student/mix/4: 0 -> 0.7, 0.7 -> 0.7, 0.8 -> 0.8, 0.9 -> 1; "
        "student/consistency/3: 0 -> 1, 0.7 -> 1, 0.85 -> 1",
        "precision": "32-true",
        "feature network": "small mixtures",
        "reference": str(tmp_path / "images.npz"),
        "reference sha256": digest,
        "reference size": "8 x 8, gray",
        "real images": 50,
        "generated images": 44,
        "generated size": "8 x 8, gray",
        "labels": "uniform over 10 classes, by the seed",
        "pixels": "round(127.5 (x + 1)) clamped to 0..255",
        "guidance": "teacher: scale 2, no limit, t in [0, 1]",
        "seed": 5,
        "batch size": 16,
        "inception_score": "mean over 10 splits, in random order",
        "precision, recall": "k = 3, 44 generated against 50 real images",
        "kid": "mean over 100 subsets of 44, not times 1,000",
        "nfe": "network evaluations per sample, guidance included",
        "device": f"cpu ({platform.machine()})",
        "processes": 1,
        "versions": f"{versions}, Python {platform.python_version()}",
    }
    page = (tmp_path / "quality.md").read_text()
    assert all(f"- {name}: {value}\n" in page for name, value in written["protocol"].items())
    assert page.partition("\n\n|")[2] in capsys.readouterr().out


def test_a_network_may_ask_for_its_number_of_samples():
    assert evaluation(features=Small()).test_samples == 44
    assert evaluation(features=Small(), test_samples=7).test_samples == 7
    assert evaluation().test_samples == 40


def test_several_networks_share_the_samples_and_not_their_columns(tmp_path):
    class Another(Small):
        name = "another"

        def metrics(self):
            return [Frechet("fd_another", "pool", 6)]

    written, _ = results(tmp_path, features=[DigitsFeatures(), Another()])
    assert list(written["rows"][0])[4:] == ["fd", "kid", "fd_another"]
    assert written["metric"] == "Fréchet distance on the digits classifier and another"
    with pytest.raises(ValueError, match="'kid'"):
        results(tmp_path, features=[DigitsFeatures(), Small()])


def test_references_that_do_not_serve_are_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(FileNotFoundError, match="no reference at "):
        results(tmp_path, reference=str(tmp_path / "none.npz"))
    np.savez(tmp_path / "clip.npz", mu=np.zeros(512), sigma=np.eye(512))
    with pytest.raises(ValueError, match="its mean has 512 features: fid needs 6"):
        results(tmp_path, features=Small(), reference=str(tmp_path / "clip.npz"))


def test_labels_change_the_samples_and_batches_do_not(tmp_path):
    def kid(**options) -> float:
        return results(tmp_path, features=Small(), **options)[0]["rows"][0]["kid"]

    uniform = kid(labels="uniform")
    assert kid(labels="uniform", batch_size=5) == pytest.approx(uniform, rel=1e-4)
    assert abs(kid(labels="balanced") / uniform - 1) > 1e-3


class Moved(Small):
    """Records when it is moved to the module's device, and when it is moved back."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[str] = []

    def to(self, device):
        self.moves.append("away" if self.moves and self.moves[-1] == "there" else "there")
        return super().to(device)


class Releasing(Digits):
    """Counts how often its decoder is released, and fails to decode above a limit."""

    def __init__(self, limit=1000, **options) -> None:
        super().__init__(**options)
        self.limit = limit
        self.decoded = self.released = 0

    def decode(self, x):
        self.decoded += 1
        if self.decoded > self.limit:
            raise RuntimeError("no memory")
        return x

    def release(self) -> None:
        self.released += 1


@pytest.mark.parametrize("limit", [1000, 3])
def test_feature_networks_and_decoder_leave_the_accelerator_after_each_evaluation(tmp_path, limit):
    """Also after an error."""
    features, data = Moved(), Releasing(limit, reference_size=50)
    running = trainer(tmp_path, evaluation(features=features, samples=44), max_steps=4, val_check_interval=2)
    if limit == 3:
        with pytest.raises(RuntimeError, match="no memory"):
            running.fit(distiller(), datamodule=data)
        assert features.moves[-1] == "away"
        assert data.released > 0
        return
    running.fit(distiller(), datamodule=data)
    # The sanity check, and two validations.
    assert features.moves == ["there", "away"] * 3
    assert data.released == 3
    running.test(distiller(), datamodule=data, verbose=False)
    assert features.moves == ["there", "away"] * 4
    assert data.released == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_of_an_evaluation_stays_on_a_gpu(tmp_path):
    callback = evaluation(features=[Small(), DigitsFeatures()], samples=44)
    running = trainer(tmp_path, callback, accelerator="gpu", devices=1, max_steps=4, val_check_interval=2)
    running.fit(distiller(), datamodule=Digits(reference_size=50))
    for quality in callback.qualities:
        states = [metric.metric.metric_state for metric in quality.metrics]
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        tensors += [value for state in states for group in state.values() if isinstance(group, list) for value in group]
        tensors += [metric.distance.factor for metric in quality.metrics if isinstance(metric, Frechet)]
        tensors += quality.features.state_dict().values()
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
