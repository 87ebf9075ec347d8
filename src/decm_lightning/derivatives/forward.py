"""What every engine takes and gives: a direction in (x, t, s), and a student's value with its derivative along it."""

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
    """A direction over (x, t, s): shapes (b, *d), (b,) and (b,); x is None where nothing moves in x."""

    x: Sample | None
    t: Time
    s: Time


@dataclass(frozen=True)
class Jump:
    """Rows of jumps with where they start, and the direction in which the student is to be differentiated, if any.

    Times, and those of the tangent, may be on the CPU whatever the device of x_t: `forward_with_jvp` moves them.
    """

    x_t: Sample
    t: Time
    s: Time
    condition: Condition
    tangent: Tangent | None = None


@dataclass(frozen=True)
class JVPResult:
    """The mean velocity u with its autograd graph, and its directional derivative jvp without one (None: not asked)."""

    u: Sample
    jvp: Float[Tensor, "rows *d"] | None


@runtime_checkable
class Engine(Protocol):
    """Computes a JVPResult in one call. The tangent covers the first rows of the batch; jvp has as many rows as it."""

    def __call__(
        self, network: FlowMapNetwork, x_t: Sample, t: Time, s: Time, condition: Condition, tangent: Tangent | None
    ) -> JVPResult:
        """Return u for all rows (graph kept) and jvp for the rows of the tangent (no graph)."""


def forward_with_jvp(engine: Engine, network: FlowMapNetwork, jumps: Sequence[Jump]) -> list[JVPResult]:
    """Run all jumps through the network as one batch, and give each its own JVPResult, in the order of `jumps`.

    One batch instead of several: the network is called once per step, which is faster and what DDP and FSDP expect.
    Rows with a tangent are put first, because an engine differentiates only those.
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
    """Return the tangents of the first rows of x_t as one, on its device; x is 0 in rows where only times move."""
    t, s = (_join_times([getattr(tangent, name) for tangent in tangents], x_t) for name in ("t", "s"))
    if all(tangent.x is None for tangent in tangents):
        return Tangent(None, t, s)
    like = x_t[: len(t)].split([len(tangent.t) for tangent in tangents])
    moved = zip(tangents, like, strict=True)
    return Tangent(torch.cat([torch.zeros_like(x) if along.x is None else along.x for along, x in moved]), t, s)
