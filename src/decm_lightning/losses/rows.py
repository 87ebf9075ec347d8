"""The rows of a batch that each loss uses, and start times that are stratified within the rows of each loss."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.types import Condition, Sample, Time


@dataclass(frozen=True)
class Rows:
    """Rows of a batch as ordered ranges. They are selected by slices, which need no device synchronization."""

    ranges: tuple[range, ...]

    @classmethod
    def cyclic(cls, first: int, count: int, batch: int) -> "Rows":
        """Return `count` consecutive rows from `first`, modulo the batch size; count is at most the batch size."""
        first %= batch
        if first + count <= batch:
            return cls((range(first, first + count),))
        return cls((range(first, batch), range(first + count - batch)))

    @classmethod
    def union(cls, parts: Iterable["Rows"]) -> "Rows":
        """Return the union of the parts, in increasing order."""
        merged: list[range] = []
        for part in sorted((part for rows in parts for part in rows.ranges), key=lambda part: part.start):
            if merged and part.start <= merged[-1].stop:
                merged[-1] = range(merged[-1].start, max(merged[-1].stop, part.stop))
            else:
                merged.append(part)
        return cls(tuple(merged))

    def __len__(self) -> int:
        return sum(map(len, self.ranges))

    def of(self, values: Tensor) -> Tensor:
        """Return these rows of a tensor."""
        parts = [values[part.start : part.stop] for part in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def of_condition(self, condition: Condition) -> Condition:
        """Return these rows of a condition; None stays None."""
        return _pytree.tree_map_only(Tensor, self.of, condition)

    def within(self, union: "Rows") -> "Rows":
        """Return the positions of these rows among the rows of a union that contains them."""
        starts = accumulate((len(whole) for whole in union.ranges), initial=0)
        shifts = {whole: start - whole.start for whole, start in zip(union.ranges, starts, strict=False)}

        def moved(part: range) -> range:
            shift = next(shift for whole, shift in shifts.items() if part.start in whole)
            return range(part.start + shift, part.stop + shift)

        return Rows(tuple(moved(part) for part in self.ranges))

    def indices(self) -> list[int]:
        """Return the row numbers as a list."""
        return [row for part in self.ranges for row in part]


@dataclass(frozen=True)
class PathSample:
    """Rows of a batch on their paths: noise x_0, data x_1, and the point x_t between them at time t.

    v_t is the teacher's velocity v(x_t, t), or None if no loss reads it. Times are on the CPU, where the number of
    guided rows is known without a device synchronization.
    """

    x_0: Sample
    x_1: Sample
    condition: Condition
    t: Time
    x_t: Sample
    v_t: Sample | None = None

    def select(self, rows: Rows) -> "PathSample":
        """Return the selected rows, without a velocity."""
        return PathSample(
            rows.of(self.x_0),
            rows.of(self.x_1),
            rows.of_condition(self.condition),
            rows.of(self.t),
            rows.of(self.x_t),
        )


def stratified_levels(count: int, losses: Sequence[Rows], generator: torch.Generator) -> Time:
    """Sample `count` uniform levels in [0, 1) so that the n rows of each loss have one level in each of n equal parts.

    This holds for losses that share all or none of their rows, and for any overlap of two losses. If three or more
    losses overlap partially, levels are spread as evenly as the free parts of each loss allow.

    Rows in several losses are assigned first, one level in each of their own equal parts. Unless the number of parts of
    each loss is a multiple of theirs, these levels share one offset, so that no two fall into the same part. Then the
    remaining rows of each loss fill its free parts.
    """
    levels = torch.full((count,), torch.nan, dtype=torch.float32, device=generator.device)
    for rows, members in _cells(count, tuple(losses)):
        free = torch.arange(len(rows), device=levels.device)
        parts, offsets = len(rows), len(rows)
        if len(members) == 1:
            parts = len(members[0])
            free = _free_parts(levels[members[0]], parts)
        elif any(len(member) % parts for member in members):
            offsets = 1
        order = torch.randperm(len(free), generator=generator, device=levels.device)[: len(rows)]
        jitter = torch.rand(offsets, generator=generator, dtype=torch.float32, device=levels.device)
        levels[rows] = (free[order] + jitter) / parts
    return levels


def _free_parts(levels: Tensor, parts: int) -> Tensor:
    """Return the equal parts of [0, 1] without a level; NaN marks a row that has no level yet."""
    free = torch.ones(parts, dtype=torch.bool, device=levels.device)
    free[(levels[~levels.isnan()].double() * parts).long().clamp(max=parts - 1)] = False
    return free.nonzero().flatten()


# Cached because the rows are the same at every step.
@lru_cache
def _cells(count: int, losses: tuple[Rows, ...]) -> list[tuple[Tensor, list[Tensor]]]:
    """Group rows by the losses that use them; return each group with all rows of its losses, most losses first.

    Losses with the same rows count as one.
    """
    members = sorted({tuple(sorted(rows.indices())) for rows in losses})
    inside = [set(member) for member in members]
    cells: dict[tuple[int, ...], list[int]] = {}
    for row in range(count):
        cells.setdefault(tuple(i for i, member in enumerate(inside) if row in member), []).append(row)
    order = sorted(cells.items(), key=lambda cell: -len(cell[0]))
    return [(torch.tensor(rows), [torch.tensor(members[i]) for i in key]) for key, rows in order]
