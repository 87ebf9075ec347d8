"""Throughput compared with deliberate delays, and the parts of a step in the profiler's report."""

import time

import lightning as L
import pytest
from lightning.pytorch.profilers import SimpleProfiler

from decm_lightning import Distiller
from decm_lightning.callbacks import Throughput
from decm_lightning.data import Digits
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher


class SlowTeacher(Teacher):
    """A teacher that sleeps in every call."""

    def velocity(self, x_t, t, condition):
        time.sleep(0.05)
        return super().velocity(x_t, t, condition)


def fit(*callbacks, steps, **options):
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    run = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks],
        **options,
    )
    started = time.perf_counter()
    run.fit(Distiller(SlowTeacher(network)), Digits(batch_size=32))
    return run.callback_metrics, time.perf_counter() - started


def test_images_are_counted():
    logged, elapsed = fit(Throughput(every_n_steps=3), steps=6, limit_val_batches=0)
    # Three steps of 32 images within the run; and no step is shorter than the teacher's two calls.
    assert 3 * 32 / elapsed <= logged["throughput/images_per_s"] <= 32 / 0.1


def test_validation_and_what_callbacks_do_at_its_end_are_left_out():
    """Three validations of two seconds lie within three steps."""

    class SlowValidation(L.Callback):
        def on_validation_epoch_end(self, *_, **__):
            time.sleep(2)

    options = {"val_check_interval": 1, "limit_val_batches": 1}
    logged, elapsed = fit(Throughput(every_n_steps=3), SlowValidation(), steps=3, **options)
    assert elapsed > 6
    assert logged["throughput/images_per_s"] > 3 * 32 / (elapsed - 4)


def test_profiler_reports_teacher_and_derivative():
    """Two calls of the teacher in each of three steps: at the batch's points, and at the ends of N2N's jumps."""
    profiler = SimpleProfiler()
    fit(steps=3, limit_val_batches=0, profiler=profiler)
    teacher, derivative = (profiler.recorded_durations[name] for name in ("teacher", "derivative"))
    assert (len(teacher), len(derivative)) == (6, 3)
    assert min(teacher) >= 0.05
    assert min(derivative) > 0


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match="got 0"):
        Throughput(every_n_steps=0)
