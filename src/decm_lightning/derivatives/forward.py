"""The interface of all engines: jumps with tangents in, mean velocities with their directional derivatives out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from decm_lightning.conditions import join
from decm_lightning.types import Condition, FlowMapNetwork, Sample, Time


@dataclass(frozen=True)
class Tangent:
    """A tangent over (x, t, s) of shapes (b, *d), (b,) and (b,); x is None if it is zero in x."""

    x: Sample | None
    t: Time
    s: Time


@dataclass(frozen=True)
class Jump:
    """A batch of jumps: start points, times, conditions, and the tangent to differentiate along, or None.

    Times, and the times of the tangent, may be on the CPU when x_t is not: `forward_with_jvp` moves them.
    """

    x_t: Sample
    t: Time
    s: Time
    condition: Condition
    tangent: Tangent | None = None


@dataclass(frozen=True)
class JVPResult:
    """The mean velocity u with its autograd graph, and its derivative jvp without a graph (None if skipped)."""

    u: Sample
    jvp: Float[Tensor, "rows *d"] | None


@runtime_checkable
class Engine(Protocol):
    """Computes a JVPResult in one call. The tangent covers the first rows of the batch; jvp has the same rows."""

    def __call__(
        self, network: FlowMapNetwork, x_t: Sample, t: Time, s: Time, condition: Condition, tangent: Tangent | None
    ) -> JVPResult:
        """Return u for all rows, with its graph, and jvp for the rows of the tangent, without a graph."""


def forward_with_jvp(engine: Engine, network: FlowMapNetwork, jumps: Sequence[Jump]) -> list[JVPResult]:
    """Run all jumps through the network in one batch and return one JVPResult per jump, in the order of `jumps`.

    One call of the network per step is faster, and DDP and FSDP expect it. Rows with a tangent come first, because
    engines differentiate only the first rows.
    """
    order = sorted(range(len(jumps)), key=lambda i: jumps[i].tangent is None)
    rows = [jumps[i] for i in order]
    tangents = [row.tangent for row in rows if row.tangent is not None]
    x_t = torch.cat([row.x_t for row in rows])
    result = engine(
        network,
        x_t,
        _join_times([row.t for row in rows], x_t),
        _join_times([row.s for row in rows], x_t),
        join([row.condition for row in rows]),
        _join_tangents(tangents, x_t) if tangents else None,
    )
    sizes = [len(row.t) for row in rows]
    values = result.u.split(sizes)
    derivatives = result.jvp.split(sizes[: len(tangents)]) if result.jvp is not None else ()
    results = {i: JVPResult(values[k], derivatives[k] if k < len(derivatives) else None) for k, i in enumerate(order)}
    return [results[i] for i in range(len(jumps))]


def _join_times(times: Sequence[Tensor], x_t: Tensor) -> Tensor:
    return torch.cat(list(times)).to(x_t.device, non_blocking=True)


def _join_tangents(tangents: Sequence[Tangent], x_t: Sample) -> Tangent:
    """Concatenate the tangents of the first rows of x_t on its device; x is 0 in rows whose tangent has no x."""
    t, s = (_join_times([getattr(tangent, name) for tangent in tangents], x_t) for name in ("t", "s"))
    if all(tangent.x is None for tangent in tangents):
        return Tangent(None, t, s)
    like = x_t[: len(t)].split([len(tangent.t) for tangent in tangents])
    pairs = zip(tangents, like, strict=True)
    return Tangent(torch.cat([torch.zeros_like(x) if part.x is None else part.x for part, x in pairs]), t, s)
