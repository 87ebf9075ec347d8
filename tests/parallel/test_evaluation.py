"""Testing in two processes against one."""

import json
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from decm_lightning import Distiller
from decm_lightning.data import Digits
from decm_lightning.data.images.labelled_images import LabelledImages
from decm_lightning.data.resumable import as_it_is
from decm_lightning.evaluation import Evaluation, SampleWriter
from decm_lightning.even_split import split_evenly
from decm_lightning.metrics import FeatureMetrics
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher
from decm_lightning.training.strategies import FSDP2
from tests.metrics.networks import COLUMNS, Small, uint8_images
from tests.parallel.pair import SIZE

pytestmark = pytest.mark.slow


def measured(batch_size: int, world: int) -> dict[str, float]:
    """All metrics of two sets of images, of which each process sees its part."""
    rank = 0 if world == 1 else torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(0)
    real, made = (uint8_images(number, 8, generator, 1) // part for number, part in ((83, 1), (71, 2)))
    quality = FeatureMetrics(Small())
    for rows in split_evenly(83, batch_size, rank, world):
        quality.update(real[rows.start : rows.stop], real=True)
    for rows in split_evenly(71, batch_size, rank, world):
        quality.update(made[rows.start : rows.stop], real=False)
    return quality.compute()


@pytest.mark.parametrize("batch_size", [9, 1])
def test_two_processes_measure_what_one_does(pair, batch_size):
    expected = measured(100, world=1)
    assert list(expected) == COLUMNS
    for values in pair.run(measured, batch_size, SIZE):
        # Precision, recall and the splits of the score require every image exactly once, and in order.
        assert values == pytest.approx(expected, rel=1e-9, abs=1e-12)


class Plain(Digits):
    """Digits in an ordinary loader, whose rows Lightning distributes; it repeats one to fill the last batch."""

    def test_dataloader(self):
        rows = self.reference
        return DataLoader(LabelledImages(rows.images[:61], rows.labels[:61]), batch_size=8, collate_fn=as_it_is)


def results(
    folder: Path,
    devices: int,
    kind: str,
    reference: str | None = None,
    batches: int | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """A Lightning test run. The student is in float64, so that rounding to pixel levels does not depend on batches."""
    L.seed_everything(0, verbose=False)
    teacher = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.1)
    # With two processes an ordinary loader's order differs: KID is equal only if its subset is the whole set.
    samples = 61 if kind == "plain loader" else 45
    data = Plain() if kind == "plain loader" else Digits()
    callback = Evaluation(Small(), ["student/mix/2"], test_samples=samples, batch_size=batch_size, reference=reference)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="auto" if devices == 1 else "ddp",
        precision="64-true",
        logger=False,
        callbacks=[callback],
        default_root_dir=folder,
        limit_test_batches=batches,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(Distiller(Teacher(teacher)), datamodule=data, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(("kind", "real"), [("loader", 1797), ("plain loader", 61), ("images", 61)])
def test_a_run_of_two_processes_writes_the_table_of_one(pair, tmp_path, kind, real):
    reference = None
    if kind == "images":
        reference = str(tmp_path / "reference.npz")
        images = uint8_images(61, 8, torch.Generator().manual_seed(0), 1).permute(0, 2, 3, 1)
        np.savez(reference, arr_0=images.numpy())
    expected = results(tmp_path / "one", 1, kind, reference)
    for values in pair.run(results, tmp_path / "two", SIZE, kind, reference):
        assert values == pytest.approx(expected, rel=1e-6)
    one, two = (json.loads((tmp_path / name / "quality.json").read_text()) for name in ("one", "two"))
    assert (one["protocol"].pop("processes"), two["protocol"].pop("processes")) == (1, SIZE)
    assert one["protocol"] == two["protocol"]
    assert one["protocol"]["real images"] == real
    rows = [{name: written["rows"][0][name] for name in COLUMNS} for written in (one, two)]
    assert rows[1] == pytest.approx(rows[0], rel=1e-9)
    assert (tmp_path / "two" / "samples.png").read_bytes() == (tmp_path / "one" / "samples.png").read_bytes()


def test_the_first_samples_are_gathered_from_all_processes(pair, tmp_path):
    """With batches of 2 each process has some of the ten images."""
    results(tmp_path / "one", 1, "loader", batches=2)
    pair.run(partial(results, batches=1, batch_size=2), tmp_path / "two", SIZE, "loader")
    assert (tmp_path / "two" / "samples.png").read_bytes() == (tmp_path / "one" / "samples.png").read_bytes()


def test_the_first_batches_of_two_processes_are_the_first_ones_of_one(pair, tmp_path):
    """Two from one process, and one from each of two: 449 of the 1,797 digits."""
    expected = results(tmp_path / "one", 1, "loader", batches=2)
    for values in pair.run(partial(results, batches=1), tmp_path / "two", SIZE, "loader"):
        assert values == pytest.approx(expected, rel=1e-6)
    for name in ("one", "two"):
        assert json.loads((tmp_path / name / "quality.json").read_text())["protocol"]["real images"] == 449


def predicted(
    folder: str, devices: int, batch_size: int, samples: int = 20, sharded: bool = False, wide: bool = True
) -> dict[str, bytes]:
    """The files that `predict` writes; if `wide` in float64, so that rounding to levels does not depend on batches."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=FSDP2() if sharded else "auto" if devices == 1 else "ddp",
        precision="64-true" if wide else "32-true",
        logger=False,
        callbacks=[SampleWriter(folder, samples, "student/consistency/3", batch_size, labels="uniform")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    teacher = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.1)
    trainer.predict(Distiller(Teacher(teacher)), datamodule=Digits(), return_predictions=False)
    trainer.strategy.barrier()
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_samples_do_not_depend_on_batches_nor_processes(pair, tmp_path):
    """Also for samplers that add noise. All files are equal, including settings.json."""
    expected = predicted(str(tmp_path / "seven"), 1, 7)
    assert len(expected) == 21
    assert predicted(str(tmp_path / "three"), 1, 3) == expected
    assert all(files == expected for files in pair.run(predicted, str(tmp_path / "two"), SIZE, 3))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_process_without_a_row_writes_nothing(pair, tmp_path, sharded):
    """It still takes part in the passes of sharded networks."""
    (alone,) = (name for name in predicted(str(tmp_path / "one"), 1, 1, 1) if name.endswith("png"))
    files = pair.run(predicted, str(tmp_path / "two"), SIZE, 1, 1, sharded, not sharded)
    assert all(sorted(names) == sorted([alone, "settings.json"]) for names in files)


def test_sharded_networks_have_the_settings_of_whole_ones(pair, tmp_path):
    expected = predicted(str(tmp_path / "one"), 1, 3, wide=False)
    for files in pair.run(predicted, str(tmp_path / "two"), SIZE, 3, 20, True, False):
        assert files.keys() == expected.keys()
        assert files["settings.json"] == expected["settings.json"]
