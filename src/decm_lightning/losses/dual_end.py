"""A loss is an edge of the triangle, two end weights, and a weighting. An objective is a few of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decm_lightning.derivatives.forward import Jump, JVPResult
from decm_lightning.losses.residual import residual
from decm_lightning.losses.rows import Rows, stratified_levels
from decm_lightning.losses.weighting import (
    NORMALIZATIONS,
    TIME_WEIGHTS,
    NormalizationName,
    TimeWeightName,
    cosine_loss,
    stopgrad_mse,
    warm_up,
)
from decm_lightning.triangle import Edge, TimeLaw, Uniform
from decm_lightning.types import Sample, Time


@dataclass(frozen=True)
class LossTerm:
    """One loss of one step: its weighted value (a scalar with a graph) and the RMS of its residual before N(g)."""

    value: Tensor
    residual_rms: Tensor


@dataclass(frozen=True)
class DualEndLoss:
    """The dual-end residual on one edge of the triangle.

    Args:
        edge: where jumps start and land.
        start_weight: weight of the start identity (the paper's gamma), at least 0.
        end_weight: weight of the end identity (the paper's lambda), at least 0.
        weight: factor of this loss in the sum, above 0.
        every: compute it only at every n-th step, at least 1.
        batch_fraction: part of the batch's rows that it takes, in (0, 1].
        cosine_weight: factor of the cosine-direction loss added to the square error, at least 0.
        time_weight: factor of each row by its start time t: "constant" 1 or "cosine" cos(pi t / 2) (FACM).

    Raises:
        ValueError: if a value is out of its range, both ends weigh 0, or there is no such time_weight.
    """

    edge: Edge
    start_weight: float = 1.0
    end_weight: float = 0.0
    weight: float = 1.0
    every: int = 1
    batch_fraction: float = 1.0
    cosine_weight: float = 0.0
    time_weight: TimeWeightName = "constant"

    def __post_init__(self) -> None:
        if self.start_weight < 0 or self.end_weight < 0 or self.start_weight + self.end_weight == 0:
            raise ValueError(
                f"start_weight and end_weight must be at least 0, one above: got {self.start_weight}, {self.end_weight}"
            )
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0 (leave the loss out instead): got {self.weight}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1: got {self.every}")
        if not 0 < self.batch_fraction <= 1:
            raise ValueError(f"batch_fraction must be in (0, 1]: got {self.batch_fraction}")
        if self.cosine_weight < 0:
            raise ValueError(f"cosine_weight must be at least 0: got {self.cosine_weight}")
        if self.time_weight not in TIME_WEIGHTS:
            raise ValueError(f"time_weight must be one of {', '.join(TIME_WEIGHTS)}: got {self.time_weight!r}")

    @property
    def reads_batch_velocity(self) -> bool:
        """Whether it reads the teacher's velocity at the batch's own x_t, which all such losses share."""
        return self.edge.starts_at_batch_times and self.start_weight > 0


@dataclass(frozen=True)
class Objective:
    """What a student is trained on: named losses, and the one normalization N(g) that all of them share.

    Args:
        losses: the losses by name; the names appear in the log.
        normalization: "plain", "clamp", "tangent_norm" or "adaptive_l2" (see `weighting`).
        times: the law of the batch's start times t.
        warmup_steps: steps over which the derivative term grows from 0 to its full size; 0 for none.

    Raises:
        ValueError: if there is no loss or no such normalization, or warmup_steps is negative.
    """

    losses: Mapping[str, DualEndLoss]
    normalization: NormalizationName = "plain"
    times: TimeLaw = field(default_factory=Uniform)
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError("an objective needs at least one loss")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}: got {self.normalization!r}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0: got {self.warmup_steps}")

    def active_losses(self, step: int) -> dict[str, DualEndLoss]:
        """Return the losses to compute at training step `step`."""
        return {name: loss for name, loss in self.losses.items() if step % loss.every == 0}

    def rows(self, count: int) -> dict[str, Rows]:
        """Return which of `count` rows each loss takes, at least one: consecutive ones, each loss after the other.

        Shares of 1 give every row to every loss, as the paper does. Shares that sum to 1 divide the batch: a step then
        costs about two fifths, and a loss is the mean over its own rows, so that weights mean the same. Shares that sum
        to less leave the batch's last rows out: they are loaded, and no network sees them.
        """
        rows, first = {}, 0
        for name, loss in self.losses.items():
            taken = max(1, round(loss.batch_fraction * count))
            rows[name] = Rows.cyclic(first, taken, count)
            first += taken
        return rows

    def draw_times(self, count: int, generator: torch.Generator) -> Time:
        """Return the start times of `count` rows by the law `times`, stratified within the rows of each loss.

        Losses whose edge draws its own start times do not count. See `rows.stratified_levels`.
        """
        rows = self.rows(count)
        readers = [rows[name] for name, loss in self.losses.items() if loss.edge.starts_at_batch_times]
        return self.times.quantiles(stratified_levels(count, readers, generator))

    def teacher_rows(self, step: int, count: int) -> Rows:
        """Return the rows at whose x_t an active loss reads the teacher's velocity."""
        rows = self.rows(count)
        return Rows.union(rows[name] for name, loss in self.active_losses(step).items() if loss.reads_batch_velocity)

    def term(
        self, loss: DualEndLoss, jump: Jump, result: JVPResult, v_start: Sample | None, v_end: Sample | None, step: int
    ) -> LossTerm:
        """Return one loss's term from the student's JVPResult and the teacher's velocities at the two ends.

        The cosine's target is u - g with the residual g itself, not with N(g). For flow matching g = u - v, so that the
        target is the guided velocity v, as in the paper: 1 - cos(u, v). N(g) shortens the step toward the target, and
        u - N(g) points elsewhere: a cosine to it would say least where u is farthest off. g is float32 or wider.
        """
        u = result.u.to(torch.promote_types(result.u.dtype, torch.float32))
        g = residual(
            u.detach(),
            result.jvp,
            v_start,
            v_end,
            jump.t,
            jump.s,
            loss.start_weight,
            loss.end_weight,
            warm_up(step, self.warmup_steps),
        )
        value = stopgrad_mse(u, NORMALIZATIONS[self.normalization](g), TIME_WEIGHTS[loss.time_weight](jump.t))
        if loss.cosine_weight:
            value = value + loss.cosine_weight * cosine_loss(u, g)
        return LossTerm(loss.weight * value, g.square().mean().sqrt())
