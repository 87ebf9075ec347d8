import json

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import DataLoader

from decm_lightning import Distiller, TeacherTraining
from decm_lightning.callbacks.cells import Cell, draw, evaluations
from decm_lightning.callbacks.evaluation import Evaluation
from decm_lightning.data import Digits
from decm_lightning.errors import NonFiniteError
from decm_lightning.guidance import Guidance
from decm_lightning.metrics import DigitsFeatures, Quality
from decm_lightning.networks import DiT
from decm_lightning.pictures import to_uint8
from decm_lightning.teachers import Teacher

CELLS = ["student/mix/2", "student/consistency/2"]
TEST_CELLS = ["student/mix/1", "teacher/euler/3"]
GUIDED = Guidance(scale=2.0)


def network() -> DiT:
    return DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)


def distiller(guidance: Guidance = GUIDED) -> Distiller:
    L.seed_everything(0, verbose=False)
    teacher = network()
    # Its output layer starts at zero, and a zero velocity would make all cells alike.
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.1)
    return Distiller(Teacher(teacher), guidance=guidance)


def evaluation(**options) -> Evaluation:
    return Evaluation(DigitsFeatures(), **{"cells": CELLS, "test_cells": TEST_CELLS, "samples": 40} | options)


def trainer(folder, *callbacks: L.Callback, **options) -> L.Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "max_steps": 2, "num_sanity_val_steps": 1}
    return L.Trainer(
        accelerator="cpu",
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


@pytest.mark.parametrize("text", ["student/mix/2", "teacher/euler/100", "student/mix_renoised/4"])
def test_a_cell_is_what_it_was_read_from(text):
    assert str(Cell.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "student/mix", "student/heun/2", "student/mix/0", "student/mix/two", "student/mix/-1", "/mix/1", "a/b/c/d"],
)
def test_bad_cells_are_refused_with_the_form_expected(text):
    with pytest.raises(ValueError, match=r"model/sampler/steps, such as student/mix/2, .* got '.*'") as error:
        Cell.parse(text)
    assert repr(text) in str(error.value)


def test_validation_logs_the_distances_of_the_cells_own_samples(tmp_path):
    module = distiller()
    metrics = validated(module, tmp_path)
    assert set(metrics) == {f"{name}/{cell}" for name in ("fd", "kid") for cell in CELLS}

    data = Digits()
    data.setup("validate")
    quality = Quality(DigitsFeatures())
    quality.real(to_uint8(data.reference.images[:300]))
    quality.generated(draw(module, Cell.parse(CELLS[0]), range(40), 10, seed=0))
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
    callback = evaluation(cells=CELLS[:1])
    best = ModelCheckpoint(tmp_path, monitor="fd/student/mix/2", save_top_k=1)
    running = trainer(tmp_path, callback, best, enable_checkpointing=True, max_steps=4, val_check_interval=2)
    running.fit(distiller(), datamodule=Digits(reference_size=300))
    assert callback.quality.counts() == (300, 40)
    assert best.best_model_score > 0
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert all(name.startswith(("network.", "average.")) for name in state)


def test_testing_writes_the_table_and_the_samples(tmp_path, capsys):
    running = trainer(tmp_path, evaluation(test_samples=60))
    metrics = running.test(distiller(), datamodule=Digits(reference_size=300), verbose=False)[0]
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["metric"] == "Fréchet distance on the digits classifier"
    assert (written["protocol"]["real images"], written["protocol"]["generated images"]) == (300, 60)
    keys = [(row["model"], row["sampler"], row["steps"], row["evaluations"]) for row in written["rows"]]
    assert keys == [("student", "mix", 1, 1.0), ("teacher", "euler", 3, 6.0)]
    for row, cell in zip(written["rows"], TEST_CELLS, strict=True):
        assert row["fd"] == pytest.approx(metrics[f"test/fd/{cell}"], rel=1e-6)
        assert row["kid"] == pytest.approx(metrics[f"test/kid/{cell}"], rel=1e-6)

    page = (tmp_path / "quality.md").read_text()
    assert "| teacher | euler | 3 | 6 | " in page
    assert "FID" not in page
    width, height = Image.open(tmp_path / "samples.png").size
    assert width > 3 * height > 0
    printed = capsys.readouterr().out
    assert page in printed
    assert str(tmp_path / "samples.png") in printed


def test_a_teacher_in_training_is_tested_on_the_same_cells_by_default(tmp_path):
    module = TeacherTraining(network())
    callback = Evaluation(DigitsFeatures(), ["teacher/euler/2"], samples=20)
    metrics = trainer(tmp_path, callback).test(module, datamodule=Digits(reference_size=50), verbose=False)[0]
    assert set(metrics) == {"test/fd/teacher/euler/2", "test/kid/teacher/euler/2"}


def test_evaluations_are_counted_in_and_out_of_the_guidance_interval():
    cell = Cell("teacher", "euler", 4)
    assert evaluations(distiller(Guidance()), cell, 10) == 4
    assert evaluations(distiller(GUIDED), cell, 10) == 8
    # Of the starts 0, 1/4, 1/2, 3/4 two lie in the interval.
    assert evaluations(distiller(Guidance(scale=2.0, interval=(0.2, 0.6))), cell, 10) == 6


def test_samples_do_not_depend_on_their_company_nor_change_modes():
    module = distiller()
    cell = Cell("student", "mix", 2)
    module.train()
    module.average.final_layer.eval()
    modes = [part.training for part in module.modules()]
    before = torch.get_rng_state()
    together = draw(module, cell, range(6), 10, seed=3)
    apart = torch.cat([draw(module, cell, rows, 10, seed=3) for rows in ([0], [1, 2, 3], [4, 5])])
    # One level of 255 is left to the order in which a matrix product is summed.
    assert (together.int() - apart.int()).abs().max() <= 1
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in module.modules()] == modes


@pytest.mark.parametrize(("world", "samples", "batch_size"), [(1, 10, 4), (2, 9, 4), (3, 10, 2), (4, 8, 500)])
def test_processes_share_the_samples_and_draw_as_many_batches(world, samples, batch_size):
    class Ranked:
        world_size = world

        def __init__(self, rank):
            self.global_rank = rank

    callback = evaluation(batch_size=batch_size)
    parts = [callback._parts(Ranked(rank), samples) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(0 < len(rows) <= batch_size for part in parts for rows in part)
    assert sorted(row for part in parts for rows in part for row in rows) == list(range(samples))


def test_diverged_weights_are_named(tmp_path):
    module = distiller()
    torch.nn.init.constant_(module.average.final_layer.linear.bias, float("nan"))
    with pytest.raises(NonFiniteError, match=r"samples of student/mix/2 are not finite.*'student' have diverged"):
        validated(module, tmp_path)


def test_missing_images_classes_and_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no real images to measure against"):
        trainer(tmp_path, evaluation()).validate(distiller(), datamodule=Digits(reference_size=0), verbose=False)
    with pytest.raises(ValueError, match="give the trainer a datamodule with num_classes"):
        trainer(tmp_path, evaluation()).validate(distiller(), DataLoader([0]), verbose=False)
    with pytest.raises(ValueError, match="cell tutor/mix/1: model must be one of student, teacher: got 'tutor'"):
        validated(distiller(), tmp_path, cells=["tutor/mix/1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples must be at least 2: got 1"),
        ({"test_samples": 0}, "samples must be at least 2: got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1: got 0"),
    ],
)
def test_numbers_that_are_too_small_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluation(**options)
