"""The exact flows agree with each other, with quadrature and with finite differences."""

import pytest
import torch

from decm_lightning.derivatives import Tangent, functional
from decm_lightning.flows import Gaussian, GaussianMixture
from decm_lightning.path import expand, jump
from decm_lightning.triangle import DataEdge, NoiseEdge, Triangle

EDGES = [DataEdge(), NoiseEdge(), Triangle()]


def close(actual, expected, atol=1e-12):
    """Assert equality up to an absolute error."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture
def mixture():
    """Three components of unequal weight in the plane."""
    means = torch.tensor([[1.0, 0.5], [-1.5, 0.2], [0.3, -1.2]], dtype=torch.float64)
    return GaussianMixture(means, 0.4, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


@pytest.fixture
def times(generator):
    """Three ordered times for each of 16 rows."""
    return torch.rand(3, 16, generator=generator, dtype=torch.float64).sort(0).values


def test_gaussian_mean_velocity_is_the_flow_map_over_the_length(flow, draw_jump):
    """x_t + (s - t) u is f(x_t, t, s)."""
    for edge in EDGES:
        row = draw_jump(edge)
        close(jump(row.x_t, flow(row.x_t, row.t, row.s), row.t, row.s), flow.flow_map(row.x_t, row.t, row.s))


def test_gaussian_mean_velocity_on_the_diagonal_is_the_velocity(flow, draw_jump):
    """u(x, t, t) = v(x, t)."""
    row = draw_jump(Triangle())
    close(flow(row.x_t, row.t, row.t), flow.velocity(row.x_t, row.t))


def test_gaussian_jumps_compose(flow, generator, times):
    """Jumping t -> s -> r is jumping t -> r."""
    start, middle, end = times
    x_t = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    half_way = jump(x_t, flow(x_t, start, middle), start, middle)
    close(jump(half_way, flow(half_way, middle, end), middle, end), jump(x_t, flow(x_t, start, end), start, end))


def test_gaussian_map_from_noise_to_data_is_affine(flow, generator):
    """f(x_0, 0, 1) = mean + std x_0."""
    x_0 = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    zeros, ones = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    close(flow.flow_map(x_0, zeros, ones), flow.mean + flow.std * x_0)


def test_gaussian_velocity_is_the_time_derivative_of_the_flow_map(flow, draw_jump):
    """d f(x_t, t, s) / ds = v(f, s), by a central difference in s."""
    row, h = draw_jump(Triangle()), 1e-5
    quotient = (flow.flow_map(row.x_t, row.t, row.s + h) - flow.flow_map(row.x_t, row.t, row.s - h)) / (2 * h)
    close(quotient, flow.velocity(flow.flow_map(row.x_t, row.t, row.s), row.s), 1e-8)


def test_gaussian_velocity_is_the_conditional_expectation(generator):
    """v(x, t) = E[x_1 - x_0 | x_t = x], by quadrature over x_1 in one dimension."""
    flow = Gaussian(0.7, 0.5)
    x_t = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.05, 0.9, 20, dtype=torch.float64)
    x_1 = torch.linspace(-6, 8, 20_001, dtype=torch.float64)
    log_joint = -((x_1 - 0.7) ** 2) / 0.5 - (x_t - t[:, None] * x_1) ** 2 / (2 * (1 - t[:, None]) ** 2)
    # Given x_t, x_1 - x_0 = (x_1 - x_t) / (1 - t).
    expected = (log_joint.softmax(1) * (x_1 - x_t)).sum(1, keepdim=True) / (1 - t[:, None])
    close(flow.velocity(x_t, t), expected, 1e-10)


@pytest.mark.parametrize("edge", EDGES, ids=repr)
def test_gaussian_derivative_along_the_trajectory(edge, flow, draw_jump):
    """Along (v, 1, 0): jvp = (u - v) / (s - t)."""
    row = draw_jump(edge)
    v = flow.velocity(row.x_t, row.t)
    direction = Tangent(v, torch.ones_like(row.t), torch.zeros_like(row.t))
    result = functional(flow, row.x_t, row.t, row.s, None, direction)
    close(expand(row.s - row.t, v) * result.jvp, result.u - v)


@pytest.mark.parametrize("edge", EDGES, ids=repr)
def test_gaussian_derivative_in_the_landing_time(edge, flow, draw_jump):
    """du/ds = (v(f, s) - u) / (s - t)."""
    row = draw_jump(edge)
    direction = Tangent(torch.zeros_like(row.x_t), torch.zeros_like(row.t), torch.ones_like(row.t))
    result = functional(flow, row.x_t, row.t, row.s, None, direction)
    v_end = flow.velocity(flow.flow_map(row.x_t, row.t, row.s), row.s)
    close(expand(row.s - row.t, v_end) * result.jvp, v_end - result.u)


def test_gaussian_derivatives_on_the_diagonal_have_their_limit(flow, draw_jump):
    """Both derivatives are std^2 / (2 a(t)^4) (x - t mean) at s = t."""
    row = draw_jump(Triangle())
    zeros, ones = torch.zeros_like(row.t), torch.ones_like(row.t)
    limit = expand(flow.std**2 / (2 * flow.scale(row.t) ** 4), row.x_t) * (row.x_t - row.t[:, None] * flow.mean)
    direction = Tangent(flow.velocity(row.x_t, row.t), ones, zeros)
    close(functional(flow, row.x_t, row.t, row.t, None, direction).jvp, limit, 1e-11)
    direction = Tangent(torch.zeros_like(row.x_t), zeros, ones)
    close(functional(flow, row.x_t, row.t, row.t, None, direction).jvp, limit, 1e-11)


def test_gaussian_marginal_at_t_has_the_stated_scale(flow, generator):
    """Noise mapped to time t is N(t mean, a(t)^2): the map preserves the standard score."""
    x_0 = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    t = torch.full((16,), 0.6, dtype=torch.float64)
    score = (flow.flow_map(x_0, torch.zeros_like(t), t) - 0.6 * flow.mean) / (0.4**2 + 0.6**2 * flow.std**2) ** 0.5
    close(score, x_0)


def test_gaussian_samples_have_its_mean_and_std(flow, generator):
    """The moments of 100,000 samples, within five standard errors."""
    x_1 = flow.sample(100_000, 3, generator, torch.float64)
    close(x_1.mean(0), flow.mean, 5 * flow.std / 100_000**0.5)
    close(x_1.std(0), torch.full_like(flow.mean, flow.std), 5 * flow.std / 200_000**0.5)


def test_mixture_velocity_is_the_conditional_expectation(mixture, generator):
    """v(x, t) = E[x_1 - x_0 | x_t = x], by quadrature over x_1 in the plane."""
    axis = torch.linspace(-4, 4, 201, dtype=torch.float64)
    x_1 = torch.cartesian_prod(axis, axis)
    log_prior = torch.logsumexp(
        mixture.weights.log() - torch.cdist(x_1, mixture.means).square() / (2 * mixture.std**2), 1
    )
    x_t = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    distance = (x_t[:, None] - t[:, None, None] * x_1).square().sum(-1)
    posterior = (log_prior - distance / (2 * (1 - t[:, None]) ** 2)).softmax(1)
    close(mixture(x_t, t), (posterior @ x_1 - x_t) / (1 - t[:, None]), 1e-9)


def test_mixture_velocity_is_the_mean_of_its_components_under_the_posterior(mixture, generator):
    """v = sum_k p(k | x_t, t) v_k, with the posterior by Bayes' rule from the components' densities."""
    x_t = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, 16, dtype=torch.float64)
    parts = [Gaussian(mean, mixture.std) for mean in mixture.means]
    density = [
        torch.distributions.Normal(t[:, None] * part.mean, part.scale(t)[:, None]).log_prob(x_t).sum(1).exp()
        for part in parts
    ]
    joint = torch.stack(density, 1) * mixture.weights
    velocities = torch.stack([part.velocity(x_t, t) for part in parts], 1)
    close(mixture(x_t, t), (joint[:, :, None] * velocities).sum(1) / joint.sum(1, keepdim=True))


def test_mixture_condition_chooses_a_component_row_by_row(mixture, generator):
    """Class k is the Gaussian of component k; class K or None is the whole mixture."""
    x_t = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    v = mixture(x_t, t, torch.tensor([0, 1, 2, 3]))
    for k in range(3):
        expected = Gaussian(mixture.means[k], mixture.std).velocity(x_t[k : k + 1], t[k : k + 1])
        close(v[k : k + 1], expected)
    close(v[3:], mixture(x_t, t)[3:])
    close(mixture(x_t, t, mixture.null(torch.tensor([0, 1, 2, 0]))), mixture(x_t, t))
    assert mixture.null(None) is None


def test_mixture_of_one_component_has_the_gaussian_flow_map(flow, generator, times):
    """The solver matches the closed form, with a separate interval for each row."""
    single = GaussianMixture(flow.mean[None], flow.std)
    x_t = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    close(single.flow_map(x_t, times[0], times[2]), flow.flow_map(x_t, times[0], times[2]), 1e-7)


def test_mixture_jumps_compose(mixture, generator, times):
    """f(f(x_t, t, s), s, r) = f(x_t, t, r), up to the solver's tolerance."""
    start, middle, end = times
    x_t = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    half_way = mixture.flow_map(x_t, start, middle)
    close(mixture.flow_map(half_way, middle, end), mixture.flow_map(x_t, start, end), 1e-6)


def test_mixture_velocity_is_the_time_derivative_of_its_flow_map(mixture, generator, times):
    """d f(x_t, t, s) / ds = v(f, s), by a central difference in s."""
    start, end, _ = times
    x_t, h = torch.randn(16, 2, generator=generator, dtype=torch.float64), 1e-4
    ahead, behind = mixture.flow_map(x_t, start, end + h), mixture.flow_map(x_t, start, end - h)
    close((ahead - behind) / (2 * h), mixture(mixture.flow_map(x_t, start, end), end), 1e-4)


def test_mixture_flow_map_follows_the_condition(mixture, generator, times):
    """For class k the map is that of component k."""
    x_t = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    end = mixture.flow_map(x_t, times[0], times[2], torch.ones(16, dtype=torch.int64))
    close(end, Gaussian(mixture.means[1], mixture.std).flow_map(x_t, times[0], times[2]), 1e-7)


def test_mixture_flow_map_carries_noise_to_the_mixture(generator):
    """Each component of a ring receives its fraction of 2,000 noise points, within five standard deviations."""
    ring = GaussianMixture.ring(components=4, radius=2.0, std=0.2, dtype=torch.float64)
    x_0 = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    zeros, ones = torch.zeros(2000, dtype=torch.float64), torch.ones(2000, dtype=torch.float64)
    distance, nearest = torch.cdist(ring.flow_map(x_0, zeros, ones, tolerance=1e-6), ring.means).min(1)
    assert distance.max() < 1.0
    shares = torch.bincount(nearest, minlength=4) / 2000
    close(shares, torch.full((4,), 0.25), 0.04)


def test_mixture_samples_have_their_labels_weights_and_moments(mixture, generator):
    """Rows with label k are from component k and occur with its weight."""
    x_1, labels = mixture.sample(50_000, generator)
    close(torch.bincount(labels).double() / 50_000, mixture.weights, 0.01)
    for k in range(3):
        rows = x_1[labels == k]
        close(rows.mean(0), mixture.means[k], 0.03)
        close(rows.std(0), torch.full((2,), mixture.std, dtype=torch.float64), 0.02)


def test_ring_puts_equal_components_on_a_circle():
    """All means are on the circle, with equal distances between neighbors."""
    ring = GaussianMixture.ring(components=6, radius=2.0, std=0.1, dtype=torch.float64)
    close(ring.means.norm(dim=1), torch.full((6,), 2.0, dtype=torch.float64))
    gaps = (ring.means - ring.means.roll(1, 0)).norm(dim=1)
    close(gaps, torch.full((6,), 2.0, dtype=torch.float64))
    close(ring.weights, torch.full((6,), 1 / 6, dtype=torch.float64))
