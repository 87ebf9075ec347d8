"""An objective is a set of named losses with one normalization and one distribution of start times."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from decm_lightning.derivatives.forward import Jump, JVPResult
from decm_lightning.losses.loss import FlowMapLoss, LossTerm
from decm_lightning.losses.middle import Composition
from decm_lightning.losses.residual import residual
from decm_lightning.losses.rows import Rows, stratified_levels
from decm_lightning.losses.weighting import (
    NORMALIZATIONS,
    Normalization,
    NormalizationName,
    check_choice,
    cosine_loss,
    normalized,
    stopgrad_mse,
    time_weights,
    warm_up,
)
from decm_lightning.time_laws import TimeLaw, Uniform
from decm_lightning.types import Sample, Time

PUBLISHED_WARMUP = 10_000
"""Training steps of the tangent warm-up in sCM (arXiv 2410.11081)."""


@dataclass(frozen=True)
class Objective:
    """Named losses that train a student, and the normalization N(g) that they share.

    Args:
        losses: the losses by name; names appear in the log.
        normalization: "plain", "clamp", "tangent_norm", "adaptive_l2", a `weighting.Normalize`, or a function from the
            residual g, (b, *d), to N(g), or from g and the start times t, (b,), to N(g).
        times: the distribution of the batch's start times t.
        warmup_steps: steps over which the factor of the derivative term rises from 0 to 1; 0 disables the warm-up. None
            for a tenth of the run, but at most sCM's 10,000.

    Raises:
        ValueError: if losses is empty, the normalization is unknown, or warmup_steps is negative.
    """

    losses: Mapping[str, FlowMapLoss]
    normalization: NormalizationName | Normalization = "plain"
    times: TimeLaw = field(default_factory=Uniform)
    warmup_steps: int | None = 0

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError("an objective needs at least one loss")
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0: got {self.warmup_steps}")

    def __str__(self) -> str:
        """Return the arguments that differ from their defaults, as Python code for records and model cards."""
        return _brief(self)

    def for_run(self, steps: int | None) -> "Objective":
        """Return the objective for a run of `steps` training steps; None if the number is unknown."""
        losses = {name: loss.for_run(steps) for name, loss in self.losses.items()}
        warmup = self.warmup_steps
        if warmup is None and steps is not None:
            warmup = min(steps // 10, PUBLISHED_WARMUP)
        return replace(self, losses=losses, warmup_steps=warmup)

    def active_losses(self, step: int) -> dict[str, FlowMapLoss]:
        """Return the losses to compute at training step `step`."""
        return {name: loss.at(step) for name, loss in self.losses.items() if step % loss.every == 0}

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

    def check_without_teacher(self) -> None:
        """Check that the losses only read velocities on the paths of the batch's rows.

        Raises:
            ValueError: if a loss has the end identity, which reads the velocity where a jump ends.
        """
        for name, loss in self.losses.items():
            if loss.velocities.end:
                raise ValueError(f"the end identity of the loss {name} reads a teacher's velocity: pass a teacher")

    def term(
        self,
        loss: FlowMapLoss,
        jump: Jump,
        result: JVPResult,
        v_start: Sample | None,
        v_end: Sample | None,
        step: int,
        composition: Composition | None = None,
        log_weight: Tensor | None = None,
    ) -> LossTerm:
        """Compute one loss from the student's JVPResult, the teacher's velocities, and the middle identity's target.

        The cosine loss uses the target u - g, not u - N(g). For flow matching g = u - v, so the target is the guided
        velocity v, as in the paper: 1 - cos(u, v). The direction of u - N(g) differs from that of v, and the cosine
        loss to it would be smallest where the error of u is largest. g is float32 or wider.

        Args:
            loss: one of the active losses.
            jump: its jumps.
            result: the student's mean velocities and their derivatives.
            v_start: the teacher's velocity at the start; None if the residual does not read it.
            v_end: the teacher's velocity at the end; None if the residual does not read it.
            step: the training step.
            composition: the target of the middle identity; None if its weight is 0.
            log_weight: w(t) of a learned weight, (b,), with a graph; None without one.
        """
        u = result.u.to(torch.promote_types(result.u.dtype, torch.float32))
        t, s = jump.t, jump.s
        warmup = warm_up(step, PUBLISHED_WARMUP if self.warmup_steps is None else self.warmup_steps)
        # With the teacher's first part, v_start belongs to the middle identity.
        start = v_start if loss.start_weight else None
        g = residual(u.detach(), result.jvp, start, v_end, t, s, loss.start_weight, loss.end_weight, warmup)
        weight = time_weights(t, s, loss.time_weight)
        if composition is not None:
            g = g + loss.middle_weight * loss.middle.residual(u.detach(), composition)
            weight = weight * composition.alpha if loss.middle.weighted else weight
        normalized_g = normalized(g, t, self.normalization if loss.normalization is None else loss.normalization)
        if log_weight is None:
            value = stopgrad_mse(u, normalized_g, weight)
        else:
            value = stopgrad_mse(u, normalized_g, weight.to(log_weight) * log_weight.exp()) - log_weight.mean()
        if loss.cosine_weight:
            value = value + loss.cosine_weight * cosine_loss(u, g)
        return LossTerm(loss.weight * value, g.square().mean().sqrt())


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_brief(part)}' for key, part in value.items())}}}"
    if not is_dataclass(value):
        return getattr(value, "__name__", repr(value))
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory() for each in fields(value)
    }
    given = {name: getattr(value, name) for name in defaults if getattr(value, name) != defaults[name]}
    return f"{type(value).__name__}({', '.join(f'{name}={_brief(part)}' for name, part in given.items())})"
