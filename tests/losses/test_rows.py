"""Rows of a batch, and start times that are stratified within the rows of each loss."""

import pytest
import torch

from decm_lightning.losses import FlowMapLoss, Objective, end_identity, paper
from decm_lightning.losses.rows import Rows, stratified_levels
from decm_lightning.time_laws import LogitNormal, Uniform
from decm_lightning.triangle import DataEdge, Diagonal, NoiseEdge, Triangle
from tests.test_triangle import normal_levels, strata

LAWS = [Uniform(), LogitNormal(-0.4, 1.2)]
DISJOINT_OR_FULL = [(1.0, 1.0), (0.5, 0.25), (0.25, 0.75), (0.3, 0.3), (0.01, 0.01)]
OVERLAPPING = [(1.0, 0.5), (0.5, 1.0), (0.75, 0.5), (0.9, 0.4), (0.75, 1.0), (0.97, 0.98)]


def make_objective(batch_fractions, times=LAWS[0]) -> Objective:
    """Consistency and flow matching with these batch_fractions, and between them N2N, which has its own times."""
    first, second = batch_fractions
    losses = {
        "consistency": FlowMapLoss(DataEdge(), batch_fraction=first),
        "noise_to_noisy": FlowMapLoss(NoiseEdge(), every=3, batch_fraction=1 - first if first < 1 else 1.0),
        "flow_matching": FlowMapLoss(Diagonal(), every=2, batch_fraction=second),
    }
    return Objective(losses, times=times)


def readers(objective: Objective, count: int) -> list[Rows]:
    return [rows for name, rows in objective.rows(count).items() if name != "noise_to_noisy"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 7, 128])
@pytest.mark.parametrize("batch_fractions", DISJOINT_OR_FULL + OVERLAPPING)
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_every_loss_has_one_time_in_each_of_its_parts(law, batch_fractions, count, seed):
    """The n rows of a loss have one time in each of n parts of equal probability."""
    objective = make_objective(batch_fractions, law)
    t = objective.draw_times(count, torch.Generator().manual_seed(seed))
    assert t.dtype == torch.float32
    for rows in readers(objective, count):
        own = rows.of(t)
        levels = own if law == LAWS[0] else normal_levels(own, law)
        assert strata(levels) == list(range(len(rows)))


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("preset", [paper, end_identity])
def test_losses_that_share_every_row_have_one_draw_of_the_law(preset, law):
    """Bit-identical to the law's times for the whole batch."""
    objective = Objective(preset().losses, times=law)
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    assert torch.equal(objective.draw_times(64, first), law.draw(64, second))
    assert torch.equal(first.get_state(), second.get_state())


@pytest.mark.parametrize("batch_fractions", [(0.5, 0.25), (0.75, 0.5), (1.0, 0.5), (0.9, 0.4)])
def test_times_are_uniform_and_in_random_order(batch_fractions):
    """In every row over many batches: the part of a row is random, and offsets fill the parts."""
    objective = make_objective(batch_fractions)
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack([objective.draw_times(16, generator) for _ in range(4000)]).double()
    # Five standard errors of the mean of a uniform, and of its square.
    assert (samples.mean(0) - 1 / 2).abs().max() < 5 * (1 / 12 / 4000) ** 0.5
    assert (samples.square().mean(0) - 1 / 3).abs().max() < 5 * (4 / 45 / 4000) ** 0.5
    for rows in readers(objective, 16):
        offsets = (rows.of(samples.T) * len(rows)) % 1
        assert (offsets.mean() - 1 / 2).abs() < 0.02


def cut(law, rows, count, generator):
    """For comparison: one permutation over the batch, split into the rows of the losses."""
    return rows.of(law.draw(count, generator))


@pytest.mark.parametrize("count", [32, 128])
def test_variance_of_a_loss_s_mean_falls_with_the_cube_of_its_rows(count):
    """1 / (12 n^3) for the mean of t over n rows; a split permutation has about 1 / (24 n), half of independent."""
    objective, generator = make_objective((0.5, 0.25)), torch.Generator().manual_seed(0)
    for rows in readers(objective, count):
        n = len(rows)
        own = torch.stack([rows.of(objective.draw_times(count, generator)) for _ in range(1000)]).double()
        before = torch.stack([cut(Uniform(), rows, count, generator) for _ in range(1000)]).double()
        assert own.mean(1).var() * 12 * n**3 == pytest.approx(1, rel=0.2)
        assert before.mean(1).var() * 12 * n == pytest.approx(1 - n / count, rel=0.2)


def test_rows_of_many_overlapping_losses_are_spread_evenly():
    """Three losses on three quarters each: the mean of t varies much less than with a split permutation."""
    losses = {name: FlowMapLoss(Triangle(), batch_fraction=0.75) for name in "abc"}
    objective, generator = Objective(losses), torch.Generator().manual_seed(0)
    for rows in objective.rows(128).values():
        means = torch.stack([rows.of(objective.draw_times(128, generator)).double().mean() for _ in range(500)])
        cuts = torch.stack([cut(Uniform(), rows, 128, generator).double().mean() for _ in range(500)])
        assert means.var() < cuts.var() / 5


def test_levels_do_not_follow_torch_s_default_dtype():
    """Lightning sets it to bfloat16 in runs with precision bf16-true."""
    rows = [Rows.cyclic(0, 64, 128), Rows.cyclic(64, 64, 128)]
    expected = stratified_levels(128, rows, torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        for law in LAWS:
            assert law.draw(128, torch.Generator().manual_seed(0)).dtype == torch.float32
        assert torch.equal(stratified_levels(128, rows, torch.Generator().manual_seed(0)), expected)
        t = torch.rand(128, dtype=torch.float32)
        for edge in (NoiseEdge(0.1), Triangle()):
            s = edge.draw(t, 0, torch.Generator().manual_seed(0)).s
            assert not torch.equal(s, s.bfloat16().float())
    finally:
        torch.set_default_dtype(torch.float32)


def test_shares_below_one_leave_the_last_rows_out():
    """Half of 16 rows, and a quarter."""
    rows = make_objective((0.5, 0.25)).rows(16)
    assert [rows[name].indices() for name in ("consistency", "flow_matching")] == [list(range(8)), list(range(4))]


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_of_index_arithmetic(seed):
    """Slices, unions and places within a union, against lists of indices."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 30, (), generator=generator))
    parts, lists = [], []
    for _ in range(3):
        first, size = torch.randint(1, count + 1, (2,), generator=generator).tolist()
        parts.append(Rows.cyclic(first, size, count))
        lists.append([(first + i) % count for i in range(size)])
    values = torch.arange(100, 100 + count)
    union = Rows.union(parts)
    assert union.indices() == sorted(set().union(*lists))
    for part, indices in zip(parts, lists, strict=True):
        assert part.indices() == indices
        assert len(part) == len(indices)
        assert part.of(values).tolist() == [100 + i for i in indices]
        assert torch.equal(part.within(union).of(union.of(values)), part.of(values))
