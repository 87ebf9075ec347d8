"""Distillation with FreeFlow's corrector (arXiv 2511.19428), which compares distributions instead of trajectories."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from decm_lightning import path
from decm_lightning.distiller import Distiller
from decm_lightning.losses import Cost, LossTerm
from decm_lightning.losses.rows import Rows
from decm_lightning.losses.weighting import normalized, stopgrad_mse
from decm_lightning.networks import Network
from decm_lightning.networks.record import Record
from decm_lightning.path import DATA, NOISE
from decm_lightning.teachers import Teacher
from decm_lightning.time_laws import LogitNormal, TimeLaw
from decm_lightning.types import Batch


@dataclass(frozen=True)
class Corrector:
    """The settings of the corrector.

    Args:
        batch_fraction: fraction of the batch's rows that are corrected, the last ones, in (0, 1].
        weight: size of the correction relative to the residuals of the objective (FreeFlow's alpha), above 0.
        times: the law of the time r of the noise that is added to samples; by default toward noise.

    Raises:
        ValueError: if batch_fraction or weight is out of its range.
    """

    batch_fraction: float = 0.25
    weight: float = 1.0
    times: TimeLaw = field(default_factory=lambda: LogitNormal(-0.8, 1.0))

    def __post_init__(self) -> None:
        if not 0 < self.batch_fraction <= 1:
            raise ValueError(f"batch_fraction must be in (0, 1]: got {self.batch_fraction}")
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0: got {self.weight}")

    def added_to(self, cost: Cost, guided: float) -> Cost:
        """Return a step's cost with the corrector's: each row is a pass of the student, of v_fake, and of the teacher.

        Args:
            cost: the cost without the corrector.
            guided: teacher passes per guided velocity (`Guidance.passes`).
        """
        rows = self.batch_fraction
        return replace(cost, student=cost.student + 2 * rows, teacher=cost.teacher + rows * guided)


class CorrectedDistiller(Distiller):
    """A `Distiller` that also corrects the distribution of its one-step samples.

        x_hat = f(x_0, 0, 1),  x_r = (1 - r) noise + r x_hat
        g = c (v_fake(x_r, r) - v(x_r, r)),  u(x_0, 0, 1) is regressed toward u - N(g)

    v is the guided teacher's velocity, and v_fake that of the student's samples, which a second network learns by flow
    matching on (x_hat, noise). If both distributions are equal, g is 0 on average, whatever the student's error on each
    trajectory. c makes g as large as the residuals of the objective, times the corrector's weight. A third network is
    in memory, with its optimizer state; samples, exports and the average do not contain it.

    FreeFlow trains its predictor, `losses.free_flow`, on 75 % of the rows: give the objective batch fractions that sum
    to 1 - batch_fraction. The corrector acts on one jump from noise to data, so it helps 1 step most.

    Args:
        teacher: as in `Distiller`, but not None.
        corrector: the settings of the corrector.
        fake: the network of v_fake; None for a trainable copy of the teacher.
        **options: the other arguments of `Distiller`.

    Raises:
        ValueError: if there is no teacher, or `Distiller` refuses an argument.
    """

    def __init__(
        self,
        teacher: Teacher,
        corrector: Corrector = Corrector(),
        fake: Network | None = None,
        **options: Any,
    ) -> None:
        if teacher is None:
            raise ValueError("the corrector compares samples with a teacher: got teacher None")
        super().__init__(teacher, **options)
        self.corrector = corrector
        self.fake = fake or teacher.student()

    def sharded(self) -> list[Network]:
        """Return the networks of `Distiller`, and that of v_fake."""
        return [*super().sharded(), self.fake]

    def compiled(self) -> list[Network]:
        """Return the networks of `Distiller`, and that of v_fake."""
        return [*super().compiled(), self.fake]

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of `Distiller`, and those of v_fake."""
        return [*super().trained_parameters(), *self.fake.parameters()]

    def settings(self) -> dict[str, Any]:
        """Return the settings of `Distiller`, and those of the corrector."""
        return super().settings() | {"corrector": self.corrector}

    def record(self) -> Record:
        """Return the record of `Distiller`, with the corrector after the objective."""
        found = super().record()
        return replace(found, objective=f"{found.objective}, {self.corrector}")

    def cost(self) -> Cost:
        """Return the cost of a step, in forward passes per sample, with the corrector's."""
        return self.corrector.added_to(super().cost(), self.guidance.passes)

    def more_terms(
        self, batch: Batch, generator: torch.Generator, cpu_generator: torch.Generator
    ) -> dict[str, LossTerm]:
        """Return the loss that corrects the student, and the flow matching of v_fake."""
        x_1, condition = batch
        count = max(1, round(self.corrector.batch_fraction * len(x_1)))
        condition = Rows((range(len(x_1) - count, len(x_1)),)).of_condition(condition)
        x_0, noise = torch.randn(2, count, *x_1.shape[1:], generator=generator, device=x_1.device, dtype=x_1.dtype)
        r = self.corrector.times.draw(count, cpu_generator).to(path.time_dtype(x_1))
        start, end = torch.full_like(r, NOISE), torch.full_like(r, DATA)

        u = self.student(x_0, start.to(self.device), end.to(self.device), condition)
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        x_hat = path.jump(x_0, u.detach(), start, end)
        x_r = path.interpolate(noise, x_hat, r)
        v_fake = self.fake(x_r, r.to(self.device), r.to(self.device), condition)
        with self.part("teacher"):
            v = self.velocity(x_r, r, condition)

        g = v_fake.detach() - v
        rms = torch.stack([term.residual_rms for term in self.terms.values()]).mean()
        correction = g * (self.corrector.weight * rms / g.square().mean().sqrt().clamp(min=1e-12))
        correction = normalized(correction, start, self.objective.normalization)
        error = v_fake - path.velocity(noise, x_hat)
        return {
            "corrector": LossTerm(stopgrad_mse(u, correction, torch.ones_like(start)), g.square().mean().sqrt()),
            "fake": LossTerm(error.square().mean(), error.detach().square().mean().sqrt()),
        }
