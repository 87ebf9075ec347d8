"""A loss is an edge of the triangle, two end weights, and a weighting. An objective is a set of named losses."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from decm_lightning.derivatives.forward import Jump, JVPResult
from decm_lightning.losses.residual import residual
from decm_lightning.losses.rows import Rows, stratified_levels
from decm_lightning.losses.weighting import (
    NORMALIZATIONS,
    TIME_WEIGHTS,
    Normalization,
    NormalizationName,
    TimeWeight,
    TimeWeightName,
    check_choice,
    cosine_loss,
    normalized,
    stopgrad_mse,
    time_weights,
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
class TeacherVelocities:
    """Where a loss reads the teacher's velocity. Nobody computes one that no loss reads.

    Attributes:
        batch: at the batch's own (x_t, t), computed once for all losses that read it.
        start: at start points of the loss's own edge.
        end: at the end point and end time of the student's jump.
    """

    batch: bool
    start: bool
    end: bool


@dataclass(frozen=True)
class DualEndLoss:
    """The dual-end residual on one edge of the triangle.

    Args:
        edge: where jumps start and end.
        start_weight: weight of the start identity (the paper's gamma), at least 0.
        end_weight: weight of the end identity (the paper's lambda), at least 0.
        weight: factor of this loss in the sum, above 0.
        every: number of steps from one computation of the loss to the next, at least 1.
        batch_fraction: fraction of the batch's rows that it takes, in (0, 1].
        cosine_weight: factor of the cosine loss added to the squared error, at least 0.
        time_weight: factor of each row by its start time t: "constant" 1, "cosine" cos(pi t / 2) (FACM), or a function
            from t, (b,), to weights, (b,).

    Raises:
        ValueError: if a value is out of its range, both end weights are 0, or time_weight is unknown.
    """

    edge: Edge
    start_weight: float = 1.0
    end_weight: float = 0.0
    weight: float = 1.0
    every: int = 1
    batch_fraction: float = 1.0
    cosine_weight: float = 0.0
    time_weight: TimeWeightName | TimeWeight = "constant"

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
        check_choice("time_weight", self.time_weight, TIME_WEIGHTS)

    @property
    def velocities(self) -> TeacherVelocities:
        """The teacher velocities that the residual reads: those with a weight."""
        start, shared = self.start_weight > 0, self.edge.starts_at_batch_times
        return TeacherVelocities(batch=start and shared, start=start and not shared, end=self.end_weight > 0)


@dataclass(frozen=True)
class Objective:
    """What a student is trained on: named losses, and the one normalization N(g) that all of them share.

    Args:
        losses: the losses by name; the names appear in the log.
        normalization: "plain", "clamp", "tangent_norm", "adaptive_l2" (see `weighting`), or a function from the
            residual g, (b, *d), to N(g), or from (g, t) with the start times t, (b,).
        times: the distribution of the batch's start times t.
        warmup_steps: steps over which the derivative term grows from 0 to its full size; 0 for none.

    Raises:
        ValueError: if there are no losses, the normalization is unknown, or warmup_steps is negative.
    """

    losses: Mapping[str, DualEndLoss]
    normalization: NormalizationName | Normalization = "plain"
    times: TimeLaw = field(default_factory=Uniform)
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError("an objective needs at least one loss")
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0: got {self.warmup_steps}")

    def for_run(self, steps: int | None) -> "Objective":
        """Return the objective for a run of `steps` training steps, None if their number is unknown."""
        losses = {name: replace(loss, edge=loss.edge.for_run(steps)) for name, loss in self.losses.items()}
        return replace(self, losses=losses)

    def active_losses(self, step: int) -> dict[str, DualEndLoss]:
        """Return the losses to compute at training step `step`."""
        return {name: loss for name, loss in self.losses.items() if step % loss.every == 0}

    def rows(self, count: int) -> dict[str, Rows]:
        """Return which of `count` rows each loss takes, at least one: consecutive rows, one loss after the other.

        Batch fractions of 1 give every row to every loss, as in the paper. Fractions that sum to 1 divide the batch: a
        step then costs about two fifths. A loss is the mean over its own rows, so its weight means the same. Fractions
        that sum to less than 1 leave out the batch's last rows, which are loaded but never used.
        """
        rows, first = {}, 0
        for name, loss in self.losses.items():
            taken = max(1, round(loss.batch_fraction * count))
            rows[name] = Rows.cyclic(first, taken, count)
            first += taken
        return rows

    def draw_times(self, count: int, generator: torch.Generator) -> Time:
        """Return the start times of `count` rows by the law `times`, stratified within the rows of each loss.

        Losses whose edge draws its own start times are left out. See `rows.stratified_levels`.
        """
        rows = self.rows(count)
        readers = [rows[name] for name, loss in self.losses.items() if loss.edge.starts_at_batch_times]
        return self.times.quantiles(stratified_levels(count, readers, generator))

    def teacher_rows(self, step: int, count: int) -> Rows:
        """Return the rows at whose x_t an active loss reads the teacher's velocity."""
        rows = self.rows(count)
        return Rows.union(rows[name] for name, loss in self.active_losses(step).items() if loss.velocities.batch)

    def term(
        self, loss: DualEndLoss, jump: Jump, result: JVPResult, v_start: Sample | None, v_end: Sample | None, step: int
    ) -> LossTerm:
        """Return one loss's term from the student's JVPResult and the teacher's velocities at the two ends.

        The cosine loss has the target u - g with the residual g itself, not with N(g). For flow matching g = u - v, so
        the target is the guided velocity v, as in the paper: 1 - cos(u, v). The target u - N(g) points elsewhere, and a
        cosine to it would be smallest where u is farthest off. g is float32 or wider.
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
        value = stopgrad_mse(u, normalized(g, jump.t, self.normalization), time_weights(jump.t, loss.time_weight))
        if loss.cosine_weight:
            value = value + loss.cosine_weight * cosine_loss(u, g)
        return LossTerm(loss.weight * value, g.square().mean().sqrt())
