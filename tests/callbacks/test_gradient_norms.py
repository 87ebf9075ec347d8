"""Gradient norms against gradients taken by hand."""

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from decm_lightning import Distiller, losses
from decm_lightning.callbacks import GradientNorms
from decm_lightning.data import Digits
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher


def fit(callbacks, steps, objective=None, logger=False, **options):
    torch.manual_seed(0)
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.5)
    distiller = Distiller(Teacher(network), objective=objective or losses.recommended())
    run = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
        **options,
    )
    run.fit(distiller, Digits(batch_size=32))
    return run.callback_metrics, distiller


def test_each_loss_and_the_total_have_the_norm_of_their_own_gradient_before_clipping():
    by_hand = {}

    class ByNames(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            parameters = [p for p in pl_module.network.parameters() if p.requires_grad]
            parts = {}
            for name, term in pl_module.terms.items():
                found = torch.autograd.grad(term.value, parameters, retain_graph=True)
                parts[name] = torch.cat([g.flatten() for g in found])
                by_hand[name] = parts[name].norm().item()
            by_hand["total"] = sum(parts.values()).norm().item()

    logged, _ = fit([ByNames(), GradientNorms(every_n_steps=1)], 1, gradient_clip_val=1e-6)
    for name in ("consistency", "flow_matching", "noise_to_noisy", "total"):
        assert logged[f"grad_norm/{name}"].item() == pytest.approx(by_hand[name], rel=1e-5)


def test_a_loss_of_every_third_step_is_measured_and_no_logger_s_interval_misses_it(tmp_path):
    """N2N of the paper is due at steps 0, 3, 6; the norms are taken at 0, 6, 12, and the logger asks at 3, 7, 11."""
    taken = []

    class Taken(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step in (0, 6):
                value = pl_module.terms["noise_to_noisy"].value
                parameters = [p for p in pl_module.network.parameters() if p.requires_grad]
                found = torch.autograd.grad(value, parameters, retain_graph=True)
                taken.append(torch.cat([g.flatten() for g in found]).norm().item())

    logger = CSVLogger(tmp_path, name="", version="")
    fit([Taken(), GradientNorms(every_n_steps=6)], 13, losses.paper(), logger, log_every_n_steps=4)
    rows = csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines())
    logged = {int(row["step"]): float(row["grad_norm/noise_to_noisy"]) for row in rows}
    assert logged == pytest.approx({3: taken[0], 7: taken[1], 11: taken[1]}, rel=1e-5)


def test_measuring_leaves_the_training_as_it_is():
    _, measured = fit([GradientNorms(every_n_steps=1)], 4)
    _, plain = fit([], 4)
    for a, b in zip(measured.network.parameters(), plain.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_spike_is_ten_times_the_median():
    class Spike(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            factor = 1000.0 if trainer.global_step in (12, 15) else 1.0
            for p in pl_module.network.parameters():
                if p.grad is not None:
                    p.grad.mul_(factor)

    logged, _ = fit([Spike(), GradientNorms(every_n_steps=0)], 20)
    assert logged["grad_norm/spikes"] == 2


def test_counting_goes_on_after_a_resume():
    first, second = GradientNorms(), GradientNorms()
    first.spikes, first.recent = 3, type(first.recent)([1.0, 2.0], maxlen=200)
    second.load_state_dict(first.state_dict())
    assert (second.spikes, list(second.recent)) == (3, [1.0, 2.0])


@pytest.mark.parametrize(("options", "text"), [({"every_n_steps": -1}, "got -1"), ({"window": 3}, "got 3")])
def test_values_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        GradientNorms(**options)
