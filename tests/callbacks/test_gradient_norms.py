"""Gradient norms against gradients taken by hand."""

import csv
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import lightning as L
import pytest
import torch
import torch._functorch.config
from lightning.pytorch.loggers import CSVLogger
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils._python_dispatch import TorchDispatchMode

from decm_lightning import Distiller, losses
from decm_lightning.callbacks import GradientNorms
from decm_lightning.data import Digits
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher

SGD = partial(torch.optim.SGD, lr=1e-3)


def fit(callbacks, steps, objective=None, logger=False, optimizer=torch.optim.AdamW, module=Distiller, **options):
    torch.manual_seed(0)
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.5)
    distiller = module(Teacher(network), objective=objective or losses.end_identity(), optimizer=optimizer)
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
    """The paper's N2N is active at steps 0, 3, 6. Norms are computed at 0, 6, 12, and the logger reads at 3, 7, 11."""
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


class Operations(TorchDispatchMode):
    """Counts norms of all gradients and values that are read on the host, from the backward pass to the step's end."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.counting = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.counting:
            self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


class Watched(L.Callback):
    def __init__(self, operations: Operations) -> None:
        self.operations = operations

    def on_after_backward(self, trainer, pl_module):
        self.operations.counting = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.operations.counting = False


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}])
def test_the_norm_is_taken_once_a_step_and_read_once(options):
    """On a GPU each value read on the host waits for the device; here the check for finite values does."""
    with Operations() as operations:
        fit([GradientNorms(every_n_steps=0), Watched(operations)], 12, optimizer=SGD, **options)
    assert operations.counts["aten::_foreach_norm"] == 12
    # And one of Lightning, for the loss in its progress bar.
    assert operations.counts["aten::_local_scalar_dense"] <= 2 * 12


@pytest.mark.parametrize(
    ("algorithm", "precision"),
    [("norm", "32-true"), ("value", "32-true"), ("norm", "bf16-true"), ("norm", "bf16-mixed")],
)
def test_gradients_are_clipped_as_torch_does(algorithm, precision):
    seen = {}

    class Clipped(Distiller):
        def configure_gradient_clipping(self, *args, **kwargs):
            parameters = [p for p in self.network.parameters() if p.grad is not None]
            before = [p.grad.clone() for p in parameters]
            super().configure_gradient_clipping(*args, **kwargs)
            seen["clipped"] = [p.grad.clone() for p in parameters]
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient.clone()
            clip = {"norm": clip_grad_norm_, "value": clip_grad_value_}[algorithm]
            clip(parameters, 0.01)
            seen["expected"] = [p.grad for p in parameters]
            assert not all(torch.equal(gradient, p.grad) for p, gradient in zip(parameters, before, strict=True))

    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm, "precision": precision}
    fit([GradientNorms()], 1, module=Clipped, **options)
    for clipped, expected in zip(seen["clipped"], seen["expected"], strict=True):
        assert torch.equal(clipped, expected)


def test_a_norm_that_is_not_finite_is_no_spike_and_not_in_the_median():
    callback = GradientNorms(every_n_steps=0)
    callback.load_state_dict({"spikes": 0, "recent": [1.0] * 10})
    for step, norm in enumerate((torch.inf, torch.nan, 5.0, 11.0, 1.0)):
        module = SimpleNamespace(network=None, terms={}, origin=str, gradient_norm=torch.tensor(norm))
        module.log = module.log_dict = Mock()
        callback.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, step)
    assert callback.state_dict() == {"spikes": 1, "recent": [1.0] * 10 + [5.0, 11.0, 1.0]}


class Failing(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert not torch._functorch.config.donated_buffer
        if trainer.global_step == 1:
            raise KeyError("stop")


@pytest.mark.parametrize("before", [True, False])
def test_the_setting_of_the_process_is_restored(before):
    """After a fit, after an error, and after the last of several callbacks."""
    with torch._functorch.config.patch(donated_buffer=before):
        fit([GradientNorms()], 1)
        assert torch._functorch.config.donated_buffer == before
        with pytest.raises(KeyError, match="stop"):
            fit([GradientNorms(), Failing()], 3)
        assert torch._functorch.config.donated_buffer == before
        first, second = GradientNorms(), GradientNorms()
        first.setup(None, None, "fit")
        second.setup(None, None, "fit")
        # The second time changes nothing.
        for _ in range(2):
            first.teardown(None, None, "fit")
            assert not torch._functorch.config.donated_buffer
        second.teardown(None, None, "fit")
        assert torch._functorch.config.donated_buffer == before


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
    state = {"spikes": 3, "recent": [float(norm) for norm in range(30)]}
    first.load_state_dict(state)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == state
    # A shorter window keeps the last norms and continues in order.
    shorter = GradientNorms(window=12)
    shorter.load_state_dict(state)
    assert shorter.state_dict() == {"spikes": 3, "recent": [float(norm) for norm in range(18, 30)]}
    fit([shorter], 3)
    assert shorter.state_dict()["recent"][:9] == [float(norm) for norm in range(21, 30)]


def test_another_module_is_refused():
    class Foreign(L.LightningModule):
        pass

    with pytest.raises(TypeError, match="Foreign"):
        GradientNorms().on_train_batch_end(SimpleNamespace(global_step=1), Foreign(), None, None, 0)


@pytest.mark.parametrize(("options", "text"), [({"every_n_steps": -1}, "got -1"), ({"window": 3}, "got 3")])
def test_values_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        GradientNorms(**options)
