"""How many images are dealt out to processes and batches."""

import math


def shares(count: int, batch_size: int, rank: int, world: int) -> list[range]:
    """Return the numbers that a process takes, batch by batch; all processes together take 0 .. count - 1 once.

    Every process has as many batches as the others, for the forward pass of a sharded network is common to all; where
    numbers are few, a batch may be empty. The first batches of all processes come before their second ones: gathered
    batch by batch, as torchmetrics does, numbers are in order whatever the batch size and the number of processes.

    Args:
        count: how many numbers.
        batch_size: at most so many in a batch.
        rank: this process, 0 .. world - 1.
        world: number of processes.
    """
    rounds = math.ceil(count / (world * batch_size))
    edges = [count * part // (rounds * world) for part in range(rounds * world + 1)]
    return [range(edges[part], edges[part + 1]) for part in range(rank, rounds * world, world)]
