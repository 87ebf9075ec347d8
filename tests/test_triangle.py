"""The triangle: start and end times of jumps, and their stratification."""

import pytest
import torch

from decm_lightning.time_laws import LogitNormal, Uniform
from decm_lightning.triangle import DataEdge, Diagonal, NoiseEdge, Times, Triangle

EDGES = [DataEdge(), Diagonal(), NoiseEdge(), NoiseEdge(0.1), Triangle()]


def strata(levels: torch.Tensor) -> list[int]:
    """Return the sorted indices of the n equal parts of [0, 1] that contain the n levels."""
    return (levels.double() * len(levels)).floor().long().sort().values.tolist()


def normal_levels(t: torch.Tensor, law: LogitNormal) -> torch.Tensor:
    """Return the levels of logit-normal times under their law's distribution function."""
    return torch.special.ndtr((torch.logit(t.double()) - law.mean) / law.std)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1000])
def test_uniform_draws_one_time_in_every_part(count, generator):
    """Every [k / n, (k + 1) / n) contains exactly one of n times."""
    assert strata(Uniform().draw(count, generator)) == list(range(count))


def test_uniform_times_come_in_random_order(generator):
    """The order of the strata is a permutation that changes with every call."""
    first, second = (Uniform().draw(100, generator).argsort().tolist() for _ in range(2))
    assert first != list(range(100))
    assert first != second


def test_uniform_times_are_random_within_their_parts(generator):
    """Offsets within the parts fill [0, 1): they are not all in the middle."""
    offsets = (Uniform().draw(1000, generator).double() * 1000) % 1
    assert offsets.min() < 0.02
    assert offsets.max() > 0.98
    assert offsets.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("law", [LogitNormal(), LogitNormal(-0.4, 1.0), LogitNormal(0.8, 1.6)])
def test_logit_normal_draws_one_time_between_neighbouring_quantiles(law, generator):
    """Every part of probability 1 / n contains exactly one of n times."""
    t = law.draw(100, generator)
    assert strata(normal_levels(t, law)) == list(range(100))


def test_logit_normal_has_the_stated_median_and_spread(generator):
    """The logits of many times have the law's mean and standard deviation."""
    logits = torch.logit(LogitNormal(-0.4, 1.3).draw(20_000, generator).double())
    assert logits.mean() == pytest.approx(-0.4, abs=1e-3)
    assert logits.std() == pytest.approx(1.3, abs=1e-2)


@pytest.mark.parametrize("law", [Uniform(), LogitNormal(-0.4, 1.0)])
def test_the_same_seed_gives_the_same_times(law):
    """A law's only randomness is its generator."""
    first, again, other = (law.draw(50, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("edge", EDGES, ids=repr)
def test_the_same_seed_gives_the_same_jumps(edge):
    """An edge's only randomness is its generator."""
    t = torch.rand(50, generator=torch.Generator().manual_seed(1))
    first, again = (edge.draw(t, 0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.t, again.t)
    assert torch.equal(first.s, again.s)


@pytest.mark.parametrize("edge", EDGES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jumps_stay_in_the_triangle(edge, dtype, generator):
    """0 <= t <= s <= 1 for every edge, including the corners t = 0 and t = 1, in the dtype of t."""
    t = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(5000, generator=generator)]).to(dtype)
    times = edge.draw(t, 0, generator)
    assert times.t.dtype == times.s.dtype == dtype
    assert times.t.min() >= 0
    assert (times.t <= times.s).all()
    assert times.s.max() <= 1


@pytest.mark.parametrize("edge", [DataEdge(), Diagonal(), Triangle()], ids=repr)
def test_edges_that_share_the_start_keep_the_batch_times(edge, generator):
    """starts_at_batch_times is true if and only if the returned t is the batch's t."""
    t = torch.rand(8, generator=generator)
    assert edge.starts_at_batch_times
    assert torch.equal(edge.draw(t, 0, generator).t, t)
    assert not NoiseEdge.starts_at_batch_times


def test_data_edge_lands_on_data_and_diagonal_where_it_starts(generator):
    """s = 1 and s = t exactly; only the diagonal has length 0."""
    t = torch.rand(8, generator=generator)
    assert torch.equal(DataEdge().draw(t, 0, generator).s, torch.ones(8))
    assert torch.equal(Diagonal().draw(t, 0, generator).s, t)
    assert [edge.has_length for edge in EDGES] == [True, False, True, True, True]


@pytest.mark.parametrize(("step", "r"), [(0, 0.1), (250, 0.075), (500, 0.05), (999, 0.0001), (1000, 0.0), (5000, 0.0)])
def test_noise_edge_start_falls_linearly_to_the_noise(step, r, generator):
    """r = start max(0, 1 - step / decay_steps), and s has one end time in every part of [r, 1]."""
    times = NoiseEdge(0.1, 1000).draw(torch.rand(100, generator=generator).double(), step, generator)
    torch.testing.assert_close(times.t, torch.full((100,), r, dtype=torch.float64), rtol=0, atol=1e-12)
    assert strata((times.s - r) / (1 - r)) == list(range(100))


def test_noise_edge_starts_at_the_noise_by_default(generator):
    """Without arguments r is exactly 0 from the first step on."""
    assert torch.equal(NoiseEdge().draw(torch.ones(5), 0, generator).t, torch.zeros(5))


def test_triangle_lands_uniformly_over_what_is_left(generator):
    """(s - t) / (1 - t) has one value in every part of [0, 1], and is independent of t."""
    t = 0.9 * torch.rand(1000, generator=generator, dtype=torch.float64)
    levels = (Triangle().draw(t, 0, generator).s - t) / (1 - t)
    assert strata(levels) == list(range(1000))
    assert abs(torch.corrcoef(torch.stack([t, levels]))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "value"), [((-0.1,), "-0.1"), ((1.0,), "1.0"), ((0.1, 0), "0"), ((0.1, -5), "-5")]
)
def test_noise_edge_refuses_what_is_out_of_range(arguments, value):
    """The message contains the value."""
    with pytest.raises(ValueError, match=f"got {value}$"):
        NoiseEdge(*arguments)


def test_times_keep_their_names():
    """Times are t and s, in this order."""
    times = Times(torch.zeros(1), torch.ones(1))
    assert (times.t.item(), times.s.item()) == (0, 1)
