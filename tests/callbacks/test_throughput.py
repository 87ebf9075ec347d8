"""Throughput against time spent on purpose."""

import time
from contextlib import nullcontext

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from decm_lightning import Distiller
from decm_lightning.callbacks import Throughput
from decm_lightning.data import Digits
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher


class SlowTeacher(Teacher):
    """A teacher that sleeps for most of the step."""

    def velocity(self, x_t, t, condition):
        time.sleep(0.1)
        return super().velocity(x_t, t, condition)


def test_the_teacher_s_share_holds_the_time_it_slept_and_images_are_counted(tmp_path):
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    run = L.Trainer(
        accelerator="cpu",
        max_steps=6,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Throughput(every_n_steps=3)],
    )
    started = time.perf_counter()
    run.fit(Distiller(SlowTeacher(network)), Digits(batch_size=32))
    elapsed = time.perf_counter() - started
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    shares = [logged[f"throughput/{name}"] for name in ("teacher", "derivative", "backward")]
    # Two questions a step at 0.1 s each: at the batch's points and where N2N lands.
    assert shares[0] * 32 / logged["throughput/images_per_s"] >= 0.2
    assert all(share > 0 for share in shares)
    assert sum(shares) <= 1.001
    # Three steps of 32 images within the run; and no step is shorter than what the teacher slept.
    assert 3 * 32 / elapsed <= logged["throughput/images_per_s"] <= 32 / 0.2


def test_validations_closer_than_readings_are_left_out(tmp_path):
    """Two validations of half a second lie within three steps."""

    class SlowValidation(L.Callback):
        def on_validation_batch_end(self, *_, **__):
            time.sleep(0.5)

    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    run = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=1,
        limit_val_batches=1,
        callbacks=[Throughput(every_n_steps=3), SlowValidation()],
    )
    distiller = Distiller(Teacher(network))
    run.fit(distiller, Digits(batch_size=32))
    assert run.callback_metrics["throughput/images_per_s"] > 3 * 32 / (2 * 0.5)
    assert distiller.phase is nullcontext


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match="got 0"):
        Throughput(every_n_steps=0)


def test_the_module_is_left_as_it_was_after_an_error():
    class Failing(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            assert pl_module.phase is not nullcontext
            raise KeyError("stop")

    module = Distiller(Teacher(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)))
    run = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[Throughput(), Failing()],
    )  # fmt: skip
    with pytest.raises(KeyError, match="stop"):
        run.fit(module, Digits(batch_size=32))
    assert module.phase is nullcontext
