"""Cells of the table of quality, each a (model, sampler, steps), and the samples that fill them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, cast, get_args

import lightning as L
import torch
from numpy.random import SeedSequence
from torch import Tensor, nn

from decm_lightning.errors import NonFiniteError
from decm_lightning.networks import Network
from decm_lightning.pictures import to_uint8
from decm_lightning.samplers import SamplerName
from decm_lightning.types import Condition, FlowMapNetwork, Sample

SAMPLERS = get_args(SamplerName)


@dataclass(frozen=True)
class Cell:
    """One way of drawing samples, written "model/sampler/steps".

    Args:
        model: a name that the module's `models()` has, such as "student" or "teacher".
        sampler: "euler", "consistency", "mix" or "mix_renoised".
        steps: steps of the sampler, at least 1.
    """

    model: str
    sampler: SamplerName
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Read what `str` writes.

        Raises:
            ValueError: if the text is of another form.
        """
        model, sampler, steps = parts if len(parts := text.split("/")) == 3 else ("", "", "")
        if not model or sampler not in SAMPLERS or not steps.isdecimal() or int(steps) < 1:
            form = "model/sampler/steps, such as student/mix/2"
            limits = f"with sampler one of {', '.join(SAMPLERS)} and steps at least 1"
            raise ValueError(f"a cell must be {form}, {limits}: got {text!r}")
        return cls(model, cast(SamplerName, sampler), int(steps))

    def __str__(self) -> str:
        return f"{self.model}/{self.sampler}/{self.steps}"


class SampleSource(Protocol):
    """What a LightningModule must have for samples to be drawn from it; `FlowTraining` has it."""

    average: Network

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return what can be sampled, by name."""

    def sample(
        self,
        x_0: Sample,
        condition: Condition,
        model: str,
        sampler: SamplerName,
        steps: int,
        generator: torch.Generator | None,
    ) -> Sample:
        """Return samples from noise x_0."""


def check(cells: Sequence[Cell], trainer: L.Trainer, pl_module: L.LightningModule) -> int:
    """Return the number of classes, after making sure that every cell can be drawn.

    Raises:
        ValueError: if the data have no classes, the samples are no images, or a cell's model does not exist.
    """
    source = cast(SampleSource, pl_module)
    num_classes = getattr(trainer.datamodule, "num_classes", None)  # type: ignore[attr-defined]
    if num_classes is None:
        raise ValueError("samples need labels: give the trainer a datamodule with num_classes, such as data.Digits")
    if len(source.average.sample_shape) != 3:
        raise ValueError(f"samples must be images (c, h, w): the network makes {source.average.sample_shape}")
    for cell in cells:
        if cell.model not in source.models():
            raise ValueError(f"cell {cell}: model must be one of {', '.join(source.models())}: got {cell.model!r}")
    return int(num_classes)


def draw(pl_module: L.LightningModule, cell: Cell, rows: Sequence[int], num_classes: int, seed: int) -> Tensor:
    """Return samples number `rows` of a cell, uint8 (len(rows), c, h, w); number i has the label i mod num_classes.

    Noise x_0 depends on the seed and the number of the sample alone: it is the same for every cell, batch size, device
    and number of processes. Noise that a sampler puts back also depends on the device and on which rows go together.
    Neither torch's global generators nor the training mode of any module change.

    Raises:
        NonFiniteError: if a sample is NaN or infinite.
    """
    source = cast(SampleSource, pl_module)
    shape = source.average.sample_shape
    # Drawn row by row on the CPU: one generator for all would tie a sample's noise to its batch.
    x_0 = torch.stack([torch.randn(shape, generator=_generator("cpu", seed, row)) for row in rows])
    labels = torch.tensor([row % num_classes for row in rows], device=source.device)
    with _evaluating(pl_module):
        x = source.sample(
            x_0.to(source.device, source.dtype),
            labels,
            model=cell.model,
            sampler=cell.sampler,
            steps=cell.steps,
            generator=_generator(source.device, seed, rows[0], 1),
        )
    if not x.isfinite().all():
        raise NonFiniteError(f"samples of {cell} are not finite: the weights of {cell.model!r} have diverged")
    return to_uint8(x)


def draw_grid(pl_module: L.LightningModule, cells: Sequence[Cell], columns: int, num_classes: int, seed: int) -> Tensor:
    """Return samples as uint8 (cells, columns, c, h, w): one row a cell, and the first classes across."""
    columns = min(columns, num_classes)
    return torch.stack([draw(pl_module, cell, range(columns), num_classes, seed) for cell in cells])


def evaluations(pl_module: L.LightningModule, cell: Cell, num_classes: int) -> float | None:
    """Return how many evaluations of a network one sample of a cell costs, counted: a guided step can cost two.

    None if no network was seen, as for an exact teacher.
    """
    networks = [pl_module.average, getattr(getattr(pl_module, "teacher", None), "network", None)]
    seen = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        nonlocal seen
        seen += len(next(chain(args, kwargs.values())))

    hooks = [n.register_forward_pre_hook(count, with_kwargs=True) for n in networks if isinstance(n, nn.Module)]
    try:
        drawn = len(draw(pl_module, cell, range(2), num_classes, seed=0))
    finally:
        for hook in hooks:
            hook.remove()
    return seen / drawn if seen else None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _generator(device: str | torch.device, *entropy: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(SeedSequence(entropy).generate_state(1)[0]))
