"""Muon in two processes against one, full or sharded, and resumed from shards."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor

from decm_lightning.training import Muon
from tests.parallel import test_checkpoints, test_training
from tests.parallel.pair import SIZE
from tests.training.test_muon import orthogonal

pytestmark = pytest.mark.slow
OPTIMIZER = partial(Muon, lr=1e-2)


def fit(strategy: str, lr: float = 1e-2) -> dict[str, Tensor]:
    return test_training.fit(strategy, optimizer=partial(Muon, lr=lr)).weights


@cache
def alone() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights before and after three steps of one process."""
    return fit("one process", lr=0.0), fit("one process")


def errors(weights: dict[str, Tensor], matrices: bool) -> list[float]:
    """Return the errors of the updates of matrices, or of all other weights, relative to the updates."""
    start, right = alone()
    moved = [name for name in right if not torch.equal(start[name], right[name])]
    assert len(moved) > 40
    chosen = [name for name in moved if (right[name].ndim == 2) == matrices]
    return [((weights[name] - right[name]).norm() / (right[name] - start[name]).norm()).item() for name in chosen]


def test_two_processes_take_the_steps_of_one(pair):
    """Exactly: the same gradients give the same steps."""
    for weights in pair.run(fit, "ddp"):
        assert max(errors(weights, matrices=True) + errors(weights, matrices=False)) < 1e-12


def test_shards_take_the_steps_of_whole_matrices(pair):
    """To the rounding of bfloat16, which Muon enlarges in the directions in which a gradient is small.

    Halves of a matrix that are orthogonalized separately are much farther from the whole one.
    """
    g = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    halves = torch.cat([orthogonal(half) for half in g.chunk(2)]) / 2**0.5
    assert (halves - orthogonal(g)).norm() / orthogonal(g).norm() > 0.4
    for weights in pair.run(fit, "fsdp2"):
        of_matrices = torch.tensor(errors(weights, matrices=True))
        assert of_matrices.max() < 0.3
        assert of_matrices.median() < 0.1
        assert max(errors(weights, matrices=False)) < 1e-2


def test_a_sharded_run_goes_on(pair, tmp_path):
    """Bit-identical: the averaged gradients of the matrices are in the checkpoint, too."""
    whole = pair.run(test_checkpoints.fit, SIZE, True, str(tmp_path), None, None, OPTIMIZER)
    checkpoint = str(tmp_path / f"step={test_checkpoints.BREAK}.ckpt")
    resumed = pair.run(test_checkpoints.fit, SIZE, True, "", checkpoint, None, OPTIMIZER)
    for first, second in zip(whole, resumed, strict=True):
        assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())
