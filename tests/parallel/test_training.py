"""Distillation by Lightning in two processes, against one process that runs the steps of both."""

from functools import cache, partial
from typing import NamedTuple
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from decm_lightning import CorrectedDistiller, Distiller, losses, samplers
from decm_lightning.callbacks import GradientNorms
from decm_lightning.data import Digits
from decm_lightning.guidance import Guidance
from decm_lightning.losses.middle import Sigmoid
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher
from decm_lightning.types import Batch
from tests.parallel.pair import SIZE, refusal

pytestmark = pytest.mark.slow
ROWS, STEPS, CLIP = 8, 3, 0.5


class Run(NamedTuple):
    """Results of a run: full weights and averages, and the last logged values."""

    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    logged: dict[str, Tensor]


def student() -> DiT:
    """A small flow map that depends on every argument and weight."""
    torch.manual_seed(0)
    network = DiT(8, 1, patch_size=4, width=16, depth=2, heads=2, num_classes=10, end_time=True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return network


class Exact(Digits):
    """The digits in float64: ModelParallelStrategy refuses precision="64-true"."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train.images = self.train.images.double()


class OfBoth(Distiller):
    """One process that runs the steps of several: the mean of their losses, each with its own rows and noise."""

    def __init__(self, *args, accumulated: int, **options) -> None:
        super().__init__(*args, **options)
        self.accumulated = accumulated
        self.rank = 0

    @property
    def global_rank(self) -> int:
        """The process whose step is run."""
        return self.rank

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        totals = []
        for part in range(self.accumulated):
            terms = []
            for self.rank in range(SIZE):
                # Lightning assigns rows to processes in turn.
                rows = slice(part * SIZE * ROWS + self.rank, (part + 1) * SIZE * ROWS, SIZE)
                share = Batch(batch.x_1[rows], batch.condition[rows])
                totals.append(super().training_step(share, batch_idx * self.accumulated + part))
                terms.append(self.terms)
        values = {name: torch.stack([part[name].value for part in terms]).mean() for name in self.terms}
        self.terms = {name: losses.LossTerm(value, self.terms[name].residual_rms) for name, value in values.items()}
        # Like the processes, it logs only its last batch.
        self.log("loss/total", torch.stack(totals[-SIZE:]).mean(), prog_bar=True)
        return torch.stack(totals).mean()


class OfBothCorrected(OfBoth, CorrectedDistiller):
    """The same with a corrector."""


STRATEGIES = {
    "one process": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=SIZE, tensor_parallel_size=1),
    "fsdp2 by default": ModelParallelStrategy,
}


class Sampling(L.Callback):
    """Samples from average and teacher after each step, before the average is updated."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        x_0 = torch.randn(4, 1, 8, 8, dtype=torch.float64)
        for model, sampler in (("student", samplers.mix), ("teacher", samplers.euler)):
            with torch.no_grad():
                sampler(pl_module.models()[model], x_0, torch.arange(4), 2)


RIVALS = {
    "scm": lambda: losses.scm(warmup_steps=2),
    "shortcut": lambda: losses.shortcut(finest=4),
    "alpha_flow": lambda: losses.alpha_flow(alpha=Sigmoid(steps=2)),
    "corrected": losses.free_flow,
}
"""A learned weight; targets of the average; targets of the student, then derivatives; a third network."""


def fit(
    strategy: str,
    accumulated: int = 1,
    n2n_every: int = 2,
    measured: bool = True,
    sampled: bool = False,
    rival: str | None = None,
    **options,
) -> Run:
    """Train for three steps, as one of two processes or as a single process that runs the steps of both."""
    L.seed_everything(0, verbose=False)
    torch.compiler.reset()
    alone = strategy == "one process"
    corrected = rival == "corrected"
    alone_kind, kind = (OfBothCorrected, CorrectedDistiller) if corrected else (OfBoth, Distiller)
    distiller = (partial(alone_kind, accumulated=accumulated) if alone else kind)(
        Teacher(DiT(8, 1, patch_size=4, width=16, depth=2, heads=2, num_classes=10)),
        student=student(),
        objective=RIVALS[rival]() if rival else losses.paper(n2n_every, batch_fractions=(0.5, 0.25, 0.25)),
        guidance=Guidance(2.0),
        **{"optimizer": partial(torch.optim.SGD, lr=0.1)} | options,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if alone else SIZE,
        strategy=STRATEGIES[strategy](),
        max_steps=STEPS,
        accumulate_grad_batches=1 if alone else accumulated,
        gradient_clip_val=CLIP,
        callbacks=[*[GradientNorms(every_n_steps=1)] * measured, *[Sampling()] * sampled],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(distiller.double(), Exact(batch_size=ROWS * SIZE * accumulated if alone else ROWS))
    networks = (distiller.network, distiller.average)
    assert {isinstance(p, DTensor) for network in networks for p in network.parameters()} == {"fsdp2" in strategy}
    weights = whole(distiller.network) | whole(distiller.log_weights)
    if corrected:
        weights |= {f"fake.{name}": value for name, value in whole(distiller.fake).items()}
    return Run(weights, whole(distiller.average), dict(trainer.callback_metrics))


def fit_compiled(strategy: str) -> Run:
    """Train with compiled blocks; a fast backend and fixed numbers of rows save minutes of compilation."""
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        return fit(strategy, n2n_every=1, compile=True, gradient_checkpointing=True)


def fit_with(strategy: str, options: dict) -> Run:
    return fit(strategy, **options)


def whole(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights, gathered if sharded."""
    return {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in network.state_dict().items()}


@cache
def expected(accumulated: int = 1, n2n_every: int = 2, rival: str | None = None) -> Run:
    """One process that runs the steps of both."""
    return fit("one process", accumulated, n2n_every, rival=rival)


def assert_right(runs: list[Run], right: Run) -> None:
    """Check weights, averages, gradient norms and the mean of the losses, in float64."""
    for run in runs:
        torch.testing.assert_close(run.weights, right.weights, rtol=0, atol=1e-12)
        torch.testing.assert_close(run.averages, right.averages, rtol=0, atol=1e-12)
        for name in norms(run):
            assert run.logged[name].item() == pytest.approx(right.logged[name].item(), rel=1e-12)
    total = torch.stack([run.logged["loss/total"] for run in runs]).mean()
    torch.testing.assert_close(total, right.logged["loss/total"], rtol=0, atol=1e-12)


def norms(run: Run) -> set[str]:
    return {name for name in run.logged if name.startswith("grad_norm/")}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_three_steps_of_two_processes_are_those_of_one(strategy, accumulated, pair):
    """Weights, averages, losses and gradient norms, with and without clipping and accumulation, over two N2N steps."""
    right = expected(accumulated)
    runs = pair.run(fit, strategy, accumulated)
    assert_right(runs, right)
    assert right.logged["grad_norm/total"] > 2 * CLIP
    # Accumulated sharded gradients cannot be separated by loss.
    single = {f"grad_norm/{name}" for name in losses.paper().losses}
    left_out = single if (strategy, accumulated) == ("fsdp2", 2) else set()
    assert all(norms(run) == norms(right) - left_out for run in runs)


@pytest.mark.parametrize(
    "options",
    [
        {"measured": False},
        {"sampled": True},
        {"gradient_checkpointing": True},
        {"derivative": "functional"},
        {"derivative": "central"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_options_change_nothing(strategy, options, pair):
    """The same weights and averages without gradient norms, with sampling, checkpointing, and other engines."""
    tolerance = 1e-5 if options.get("derivative") == "central" else 1e-12
    for run in pair.run(fit_with, strategy, options):
        torch.testing.assert_close(run.weights, expected().weights, rtol=0, atol=tolerance)
        torch.testing.assert_close(run.averages, expected().averages, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_rivals_in_two_processes(strategy, rival, pair):
    """Learned weights are averaged over the processes, and targets come from sharded networks."""
    right = expected(rival=rival)
    for run in pair.run(fit_with, strategy, {"rival": rival}):
        torch.testing.assert_close(run.weights, right.weights, rtol=0, atol=1e-12)
        torch.testing.assert_close(run.averages, right.averages, rtol=0, atol=1e-12)
    if rival == "scm":
        assert right.weights["consistency.linear.bias"].abs().max() > 1e-3


@pytest.mark.compiled
def test_compiled_and_checkpointed_blocks_are_sharded(pair):
    """FSDP2 around compiled blocks trains student and average as one eager process does."""
    assert_right(pair.run(fit_compiled, "fsdp2"), expected(n2n_every=1))


def test_tensor_parallelism_is_refused(pair):
    """With its defaults ModelParallelStrategy shards nothing here: each process would train alone."""
    for text in pair.run(refusal, fit, "fsdp2 by default"):
        assert "data_parallel_size=2 and tensor_parallel_size=1" in text
