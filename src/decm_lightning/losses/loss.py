"""A loss: a region of the triangle, a weight for each identity, and a normalization."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from decm_lightning.losses.middle import Middle
from decm_lightning.losses.weighting import (
    NORMALIZATIONS,
    TIME_WEIGHTS,
    Normalization,
    NormalizationName,
    TimeWeight,
    TimeWeightName,
    check_choice,
)
from decm_lightning.triangle import Edge


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
class FlowMapLoss:
    """One residual on one region of the triangle: a weight for each of the three identities, and a normalization.

    Args:
        edge: the start and end times of the jumps.
        start_weight: weight of the start identity (the paper's gamma), at least 0.
        end_weight: weight of the end identity (the paper's lambda), at least 0.
        middle_weight: weight of the middle identity, at least 0.
        middle: the middle of a step, if middle_weight is above 0.
        weight: factor of this loss in the sum, above 0.
        every: the loss is computed at every `every`-th step; at least 1.
        batch_fraction: fraction of the batch's rows that the loss uses, in (0, 1].
        cosine_weight: factor of the cosine loss added to the squared error, at least 0.
        time_weight: weight of each row by its times: "constant" (1), "cosine" (cos(pi t / 2), FACM), "one_minus_root"
            (1 - t^0.5), or a function from t, or from t and s, (b,), to weights, (b,).
        normalization: N(g) of this loss, as in `Objective`; None for the objective's.
        learned_weight: multiply the loss of each row by exp(w(t)) and subtract w(t), with w learned during training
            (sCM, arXiv 2410.11081, appendix; EDM2's uncertainty, arXiv 2312.02696).

    Raises:
        ValueError: if a value is out of its range, all three weights are 0, or a name is unknown.
    """

    edge: Edge
    start_weight: float = 1.0
    end_weight: float = 0.0
    middle_weight: float = 0.0
    middle: Middle = field(default_factory=Middle)
    weight: float = 1.0
    every: int = 1
    batch_fraction: float = 1.0
    cosine_weight: float = 0.0
    time_weight: TimeWeightName | TimeWeight = "constant"
    normalization: NormalizationName | Normalization | None = None
    learned_weight: bool = False

    def __post_init__(self) -> None:
        weights = (self.start_weight, self.end_weight, self.middle_weight)
        if min(weights) < 0 or sum(weights) == 0:
            raise ValueError(
                "start_weight, end_weight and middle_weight must be at least 0 and not all 0: "
                f"got {', '.join(map(str, weights))}"
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
        if self.normalization is not None:
            check_choice("normalization", self.normalization, NORMALIZATIONS)

    @property
    def velocities(self) -> TeacherVelocities:
        """The teacher velocities that the residual reads."""
        is_euler = self.middle_weight > 0 and self.middle.first == "teacher"
        start, shared = self.start_weight > 0 or is_euler, self.edge.starts_at_batch_times
        return TeacherVelocities(batch=start and shared, start=start and not shared, end=self.end_weight > 0)

    @property
    def needs_derivative(self) -> bool:
        """Whether the residual has a derivative of u: not for s = t, and not for the middle identity alone."""
        return self.edge.has_length and self.start_weight + self.end_weight > 0

    def at(self, step: int) -> "FlowMapLoss":
        """Return the loss at training step `step`. Where alpha is 0 the middle identity is the start identity."""
        if not (self.middle_weight and self.middle.alpha.vanishes(step)):
            return self
        return replace(self, start_weight=self.start_weight + self.middle_weight, middle_weight=0.0)

    def for_run(self, steps: int | None) -> "FlowMapLoss":
        """Return the loss for a run of `steps` training steps; None if the number is unknown."""
        middle = replace(self.middle, alpha=self.middle.alpha.for_run(steps))
        return replace(self, edge=self.edge.for_run(steps), middle=middle)
