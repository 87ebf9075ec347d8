"""The rows of a batch that a loss takes, and start times that are stratified over the rows of every loss."""

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
    """Rows of a batch as ranges, in order. They are taken by slices, which do not wait for the device."""

    ranges: tuple[range, ...]

    @classmethod
    def cyclic(cls, first: int, count: int, batch: int) -> "Rows":
        """Return `count` consecutive rows from `first` on, modulo the batch; count is at most the batch."""
        first %= batch
        if first + count <= batch:
            return cls((range(first, first + count),))
        return cls((range(first, batch), range(first + count - batch)))

    @classmethod
    def union(cls, parts: Iterable["Rows"]) -> "Rows":
        """Return the rows that are in any of the parts, in increasing order."""
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
        """Return where these rows are among the rows of a union of which they are a part."""
        starts = accumulate((len(whole) for whole in union.ranges), initial=0)
        shifts = {whole: start - whole.start for whole, start in zip(union.ranges, starts, strict=False)}

        def moved(part: range) -> range:
            shift = next(shift for whole, shift in shifts.items() if part.start in whole)
            return range(part.start + shift, part.stop + shift)

        return Rows(tuple(moved(part) for part in self.ranges))

    def indices(self) -> list[int]:
        """Return the rows one by one."""
        return [row for part in self.ranges for row in part]


@dataclass(frozen=True)
class PathSample:
    """Rows of a batch on their paths: noise x_0, data x_1, and the point x_t between them at time t.

    v_t is the teacher's velocity v(x_t, t), None if no loss reads it. Times are on the CPU: how many of them are guided
    is known there without waiting for the device.
    """

    x_0: Sample
    x_1: Sample
    condition: Condition
    t: Time
    x_t: Sample
    v_t: Sample | None = None

    def select(self, rows: Rows) -> "PathSample":
        """Return some of the rows, without a velocity."""
        return PathSample(
            rows.of(self.x_0),
            rows.of(self.x_1),
            rows.of_condition(self.condition),
            rows.of(self.t),
            rows.of(self.x_t),
        )


def stratified_levels(count: int, losses: Sequence[Rows], generator: torch.Generator) -> Time:
    """Return `count` uniform levels in [0, 1): the n rows of a loss have one level in each of n equal parts.

    That holds for losses that share all of their rows or none, and for two losses that overlap in any way. Rows of
    three or more losses that overlap in part are spread as evenly as the free parts of each loss allow.

    Rows in several losses come first: one level in each of their own equal parts. Unless the parts of every loss are
    whole multiples of these, all levels have one offset, so that no two fall into one part. Then the remaining rows of
    each loss take its free parts.
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
    """Return which of the equal parts of [0, 1] have no level yet; a level of NaN is missing."""
    free = torch.ones(parts, dtype=torch.bool, device=levels.device)
    free[(levels[~levels.isnan()].double() * parts).long().clamp(max=parts - 1)] = False
    return free.nonzero().flatten()


# The same at every step.
@lru_cache
def _cells(count: int, losses: tuple[Rows, ...]) -> list[tuple[Tensor, list[Tensor]]]:
    """Return the rows that are in the same losses, and all rows of each such loss; most losses first.

    Losses with the same rows are one.
    """
    members = sorted({tuple(sorted(rows.indices())) for rows in losses})
    inside = [set(member) for member in members]
    cells: dict[tuple[int, ...], list[int]] = {}
    for row in range(count):
        cells.setdefault(tuple(i for i, member in enumerate(inside) if row in member), []).append(row)
    order = sorted(cells.items(), key=lambda cell: -len(cell[0]))
    return [(torch.tensor(rows), [torch.tensor(members[i]) for i in key]) for key, rows in order]
