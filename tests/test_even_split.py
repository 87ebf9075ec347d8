"""The rows of several processes, computed in one process."""

from itertools import product

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from decm_lightning.data.images.labelled_images import LabelledImages
from decm_lightning.data.resumable import as_it_is
from decm_lightning.even_split import EvenBatches, count_own, split_evenly


def images(count: int) -> LabelledImages:
    return LabelledImages(torch.arange(count).float()[:, None, None, None], torch.arange(count))


@pytest.mark.parametrize(
    ("count", "world", "workers"), [*product([0, 1, 2, 3, 7, 8, 9, 61, 513], [1, 2, 3], [0]), (9, 2, 1)]
)
def test_loaders_of_all_processes_have_each_row_once_in_equally_many_batches(count, world, workers):
    rows, seen, batches = images(count), [], set()
    for rank in range(world):
        sampler = EvenBatches(rows, 4, rank, world)
        loader = DataLoader(rows, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=as_it_is)
        read = list(loader)
        assert all(1 <= len(batch.x_1) <= 4 for batch in read)
        assert len(read) == len(loader)
        batches.add(len(read))
        for number, batch in enumerate(read):
            seen += batch.condition[: count_own(sampler, number, 0, len(batch.x_1))].tolist()
    assert len(batches) == 1
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(("count", "world"), [(7, 2), (8, 2), (7, 3), (1, 3)])
def test_rows_that_a_distributed_sampler_repeats_are_not_counted(count, world):
    rows, kept = images(count), []
    for rank in range(world):
        sampler = DistributedSampler(rows, world, rank, shuffle=False)
        seen = 0
        for number, batch in enumerate(DataLoader(rows, 2, sampler=sampler, collate_fn=as_it_is)):
            own = count_own(sampler, number, seen, len(batch.x_1))
            kept += batch.condition[:own].tolist()
            seen += len(batch.x_1)
    assert sorted(kept) == list(range(count))


def test_all_rows_of_other_samplers_count():
    assert count_own(SequentialSampler(range(3)), 0, 0, 3) == 3
    assert count_own(None, 5, 2, 4) == 4


@pytest.mark.parametrize(("count", "batch_size", "world"), [(10, 3, 2), (11, 4, 3), (5, 1, 2)])
def test_gathered_batch_by_batch_rows_are_in_order(count, batch_size, world):
    shares = [split_evenly(count, batch_size, rank, world) for rank in range(world)]
    assert [row for batches in zip(*shares, strict=True) for batch in batches for row in batch] == list(range(count))
