"""Split rows evenly among processes, in batches, without repeating a row."""

import math
from collections.abc import Iterator, Sized

from torch.utils.data import Dataset, DistributedSampler


def split_evenly(count: int, batch_size: int, rank: int, world: int) -> list[range]:
    """Return the row numbers of one process, batch by batch. Over all processes each of 0 .. count - 1 occurs once.

    Every process has the same number of batches, because all processes take part in a forward pass of a sharded
    network and in a torchmetrics gather. With fewer rows than processes, some batches are empty. The first batches
    of all processes come before their second ones, so rows gathered batch by batch are in order for every batch size
    and number of processes.

    Args:
        count: number of rows.
        batch_size: largest number of rows in a batch, at least 1.
        rank: this process, 0 .. world - 1.
        world: number of processes.

    Example:
        >>> split_evenly(10, batch_size=3, rank=0, world=2), split_evenly(10, batch_size=3, rank=1, world=2)
        ([range(0, 2), range(5, 7)], [range(2, 5), range(7, 10)])
    """
    if not count:
        return []
    rounds = math.ceil(count / (world * batch_size))
    edges = [count * part // (rounds * world) for part in range(rounds * world + 1)]
    return [range(edges[part], edges[part + 1]) for part in range(rank, rounds * world, world)]


class EvenBatches(DistributedSampler[list[int]]):
    """A sampler of whole batches, for DataLoader(batch_size=None, sampler=...): `split_evenly` over a data set.

    Lightning replaces all samplers except a DistributedSampler by one that repeats rows until all processes have the
    same number. This sampler repeats no rows. For an empty batch of `split_evenly` it returns row 0, because networks
    reject empty batches; `count_own` returns 0 for this batch.

    Args:
        dataset: the rows.
        batch_size: largest number of rows in a batch, at least 1.
        rank: this process, 0 .. world - 1.
        world: number of processes.
    """

    def __init__(self, dataset: Dataset, batch_size: int, rank: int, world: int) -> None:
        super().__init__(dataset, world, rank, shuffle=False)
        assert isinstance(dataset, Sized)
        self.batches = split_evenly(len(dataset), batch_size, rank, world)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch or range(1)) for batch in self.batches)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)


def count_own(sampler: object, batch_idx: int, seen: int, rows: int) -> int:
    """Return the number of rows of a batch that are not padding. The padding repeats rows and comes last.

    Args:
        sampler: the sampler of the loader.
        batch_idx: number of the batch in this process.
        seen: rows of this process in the batches before it.
        rows: rows of the batch.
    """
    if isinstance(sampler, EvenBatches):
        return len(sampler.batches[batch_idx])
    if not isinstance(sampler, DistributedSampler) or not isinstance(sampler.dataset, Sized):
        return rows
    # A DistributedSampler returns the rows rank, rank + world, ..., and then repeats from the start.
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
    return min(max(own - seen, 0), rows)
