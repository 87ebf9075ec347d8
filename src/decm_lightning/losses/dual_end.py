"""A loss has an edge of the triangle, two weights, and a weighting. An objective is a set of named losses."""

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
    """One loss at one step: its weighted value (a scalar with a graph) and the RMS of its residual g before N(g)."""

    value: Tensor
    residual_rms: Tensor


@dataclass(frozen=True)
class TeacherVelocities:
    """The points at which a loss reads the teacher's velocity. Velocities that no loss reads are not computed.

    Attributes:
        batch: at the batch's (x_t, t), computed once for all losses that read it.
        start: at the start points of an edge with its own start times.
        end: at the end point and end time of the student's jump.
    """

    batch: bool
    start: bool
    end: bool


@dataclass(frozen=True)
class DualEndLoss:
    """The dual-end residual on one edge of the triangle.

    Args:
        edge: the start and end times of the jumps.
        start_weight: weight of the start identity (the paper's gamma), at least 0.
        end_weight: weight of the end identity (the paper's lambda), at least 0.
        weight: factor of this loss in the sum, above 0.
        every: the loss is computed at every `every`-th step; at least 1.
        batch_fraction: fraction of the batch's rows that the loss uses, in (0, 1].
        cosine_weight: factor of the cosine loss added to the squared error, at least 0.
        time_weight: weight of each row by its start time t: "constant" (1), "cosine" (cos(pi t / 2), FACM), or a
            function from t, (b,), to weights, (b,).

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
                f"start_weight and end_weight must be at least 0 and not both 0: "
                f"got {self.start_weight}, {self.end_weight}"
            )
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0 (to disable the loss, remove it): got {self.weight}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1: got {self.every}")
        if not 0 < self.batch_fraction <= 1:
            raise ValueError(f"batch_fraction must be in (0, 1]: got {self.batch_fraction}")
        if self.cosine_weight < 0:
            raise ValueError(f"cosine_weight must be at least 0: got {self.cosine_weight}")
        check_choice("time_weight", self.time_weight, TIME_WEIGHTS)

    @property
    def velocities(self) -> TeacherVelocities:
        """The teacher velocities that the residual reads: those with a weight above 0."""
        start, shared = self.start_weight > 0, self.edge.starts_at_batch_times
        return TeacherVelocities(batch=start and shared, start=start and not shared, end=self.end_weight > 0)


@dataclass(frozen=True)
class Objective:
    """Named losses that train a student, and the normalization N(g) that they share.

    Args:
        losses: the losses by name; names appear in the log.
        normalization: "plain", "clamp", "tangent_norm", "adaptive_l2" (see `weighting`), or a function from the
            residual g, (b, *d), to N(g), or from g and the start times t, (b,), to N(g).
        times: the distribution of the batch's start times t.
        warmup_steps: steps over which the factor of the derivative term rises from 0 to 1; 0 disables the warm-up.

    Raises:
        ValueError: if losses is empty, the normalization is unknown, or warmup_steps is negative.
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
        """Return the objective for a run of `steps` training steps; None if the number is unknown."""
        losses = {name: replace(loss, edge=loss.edge.for_run(steps)) for name, loss in self.losses.items()}
        return replace(self, losses=losses)

    def active_losses(self, step: int) -> dict[str, DualEndLoss]:
        """Return the losses to compute at training step `step`."""
        return {name: loss for name, loss in self.losses.items() if step % loss.every == 0}

    def rows(self, count: int) -> dict[str, Rows]:
        """Return the rows of a batch of `count` that each loss uses: consecutive ranges, at least one row each.

        With batch fractions of 1 every loss uses every row, as in the paper. Fractions that sum to 1 split the batch
        among the losses, which reduces the cost of a step to about two fifths. Each loss is the mean over its own rows,
        so the weights keep their meaning. With a sum below 1 the last rows of the batch are not used.
        """
        rows, first = {}, 0
        for name, loss in self.losses.items():
            size = max(1, round(loss.batch_fraction * count))
            rows[name] = Rows.cyclic(first, size, count)
            first += size
        return rows

    def draw_times(self, count: int, generator: torch.Generator) -> Time:
        """Sample the start times of `count` rows from `times`, stratified within the rows of each loss.

        Losses whose edge samples its own start times are ignored. See `rows.stratified_levels`.
        """
        rows = self.rows(count)
        readers = [rows[name] for name, loss in self.losses.items() if loss.edge.starts_at_batch_times]
        return self.times.quantiles(stratified_levels(count, readers, generator))

    def teacher_rows(self, step: int, count: int) -> Rows:
        """Return the rows for which an active loss reads the teacher's velocity at x_t."""
        rows = self.rows(count)
        return Rows.union(rows[name] for name, loss in self.active_losses(step).items() if loss.velocities.batch)

    def term(
        self, loss: DualEndLoss, jump: Jump, result: JVPResult, v_start: Sample | None, v_end: Sample | None, step: int
    ) -> LossTerm:
        """Compute one loss from the student's JVPResult and the teacher's velocities at the two ends.

        The cosine loss uses the target u - g, not u - N(g). For flow matching g = u - v, so the target is the guided
        velocity v, as in the paper: 1 - cos(u, v). The direction of u - N(g) differs from that of v, and the cosine
        loss to it would be smallest where the error of u is largest. g is float32 or wider.
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
