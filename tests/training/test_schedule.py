"""The length of a run, the schedule that follows from it, and the defaults of a first run."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from decm_lightning import Distiller, TeacherTraining, losses
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher
from decm_lightning.training import WarmupCosine
from decm_lightning.training.schedule import run_length
from decm_lightning.triangle import NoiseEdge
from tests.training.test_resuming import NETWORK, Few, Stream, same


def schedule(steps, **options):
    weight = torch.nn.Parameter(torch.zeros(1))
    made = WarmupCosine(torch.optim.SGD([weight], 2.0), **options)
    made.set_length(steps)
    return made


def rates(made, steps):
    found = []
    for _ in range(steps):
        found.append(made.optimizer.param_groups[0]["lr"])
        made.optimizer.step()
        made.step()
    return found


def test_warm_up_is_a_twentieth_of_the_run_and_the_rest_a_cosine():
    found = rates(schedule(400), 400)
    assert found[:20] == pytest.approx([2 * (k + 1) / 21 for k in range(20)])
    assert max(found) == found[20] == 2
    assert found[20 + 190] == pytest.approx(2 * 0.55)
    assert found[-1] == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(("steps", "warmup"), [(8, 2), (60, 10), (1000, 50), (312_500, 1000), (None, 1000)])
def test_warm_up_has_bounds(steps, warmup):
    made = schedule(steps, floor=1.0)
    factors = [made.factor(step) for step in range(warmup + 2)]
    assert factors[:warmup] == pytest.approx([(k + 1) / (warmup + 1) for k in range(warmup)])
    assert factors[warmup:] == [1, 1]


def test_floor_of_one_and_a_run_of_unknown_length_are_constant_after_the_warm_up():
    assert rates(schedule(100, floor=1.0), 100)[10:] == [2.0] * 90
    assert schedule(None).factor(10**6) == 1
    assert schedule(100, warmup=0.0).factor(0) == 1


@pytest.mark.parametrize(("options", "value"), [({"warmup": 1.0}, "1.0"), ({"floor": -0.1}, "-0.1")])
def test_values_out_of_range_are_refused(options, value):
    with pytest.raises(ValueError, match=f"got {value}$"):
        schedule(10, **options)


class Recorder(L.Callback):
    """Records the length of the run, and the learning rate at each step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.length = run_length(trainer)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained = trainer.global_step


def fit(module, data, *callbacks, checkpoint=None, **options):
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), callbacks=[recorder, *callbacks],
        **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=checkpoint)
    return recorder


def teacher(**options):
    torch.manual_seed(0)
    return TeacherTraining(DiT(**NETWORK), **options)


# Thirteen images in batches of three.
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_steps": 5}, 5),
        ({"max_epochs": 2}, 8),
        ({"max_epochs": 2, "max_steps": 5}, 5),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4),
        ({"max_epochs": 3, "limit_train_batches": 3}, 9),
    ],
)
def test_length_of_a_run_is_what_it_trains(options, length):
    recorder = fit(teacher(), Few(3), **options)
    assert (recorder.length, recorder.trained) == (length, length)


@pytest.mark.parametrize("scheduling", [{0: 1, 1: 2, 2: 3}, {0: 3, 1: 2}])
def test_length_of_a_run_whose_accumulation_changes(scheduling):
    recorder = fit(teacher(), Few(3), GradientAccumulationScheduler(scheduling), max_epochs=3)
    assert recorder.length == recorder.trained


@pytest.mark.parametrize(("data", "options"), [(Stream(), {"max_epochs": 1}), (Few(3), {"max_time": "00:00:00:01"})])
def test_run_of_unknown_length_warms_up_and_stays(data, options):
    """A stream without a length, and a run that only the clock ends."""
    recorder = fit(teacher(), data, **options)
    assert recorder.length is None
    assert recorder.rates[:3] == pytest.approx([1e-3 * (k + 1) / 1001 for k in range(3)])


def student(**options):
    torch.manual_seed(0)
    network = DiT(**NETWORK)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.2)
    return Distiller(Teacher(network), objective=losses.paper(), **options)


def saving(folder):
    return ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")


def test_run_with_defaults_resumes_bit_for_bit(tmp_path):
    whole, resumed = student(), student()
    first = fit(whole, Few(3), saving(tmp_path), max_epochs=3)
    rest = fit(resumed, Few(3), checkpoint=tmp_path / "step=4.ckpt", max_epochs=3)
    assert first.rates[4:] == rest.rates
    assert same(whole, resumed)


def test_longer_run_has_the_schedule_of_its_length_and_says_so(tmp_path, caplog):
    fit(student(), Few(3), saving(tmp_path), max_steps=8)
    assert "resuming with" not in caplog.text
    longer = student()
    found = fit(longer, Few(3), checkpoint=tmp_path / "step=4.ckpt", max_steps=16)
    assert "lr_scheduler.steps 16 (8 in the checkpoint)" in caplog.text
    assert "objective.losses.noise_to_noisy.edge.decay_steps 4 (2 in the checkpoint)" in caplog.text
    assert found.rates == fit(student(), Few(3), max_steps=16).rates[4:]
    assert longer.objective.losses["noise_to_noisy"].edge == NoiseEdge(0.1, 4)
    # A second run with the same module has its own length.
    fit(longer, Few(3), max_steps=20)
    assert longer.objective.losses["noise_to_noisy"].edge == NoiseEdge(0.1, 5)


def test_default_average_covers_the_last_ninth_of_the_run():
    module = teacher()
    assert module.averaging.decay > (1 + 5000) / (10 + 5000)
