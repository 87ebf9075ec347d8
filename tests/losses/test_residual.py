"""The dual-end residual is zero for the exact flow map, and not zero with any known mistake."""

import random

import pytest
import torch

from decm_lightning.derivatives import Jump, Tangent, functional
from decm_lightning.losses import residual, tangent
from decm_lightning.networks import MLP
from decm_lightning.path import expand, jump
from decm_lightning.triangle import DataEdge, Diagonal, NoiseEdge, Triangle

EDGES = [DataEdge(), NoiseEdge(), NoiseEdge(0.1), Triangle()]


def unequal_weights(count: int) -> list[tuple[float, float]]:
    """Return random pairs (gamma, lam), both above 0.1 and at least 0.3 apart."""
    numbers = random.Random(0)
    pairs = ((round(numbers.uniform(0.1, 2), 3), round(numbers.uniform(0.1, 2), 3)) for _ in range(100))
    return [(gamma, lam) for gamma, lam in pairs if abs(gamma - lam) > 0.3][:count]


RANDOM = unequal_weights(5)
NAMED = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)]


def derivative(flow, row: Jump, direction: Tangent):
    """Return jvp of the exact flow along a tangent."""
    return functional(flow, row.x_t, row.t, row.s, None, direction).jvp


def ends(flow, row: Jump):
    """Return v_start, the end point and v_end of exact jumps."""
    end = flow.flow_map(row.x_t, row.t, row.s)
    return flow.velocity(row.x_t, row.t), end, flow.velocity(end, row.s)


def correct(flow, row: Jump, gamma: float, lam: float):
    """Return g of the exact flow."""
    v_start, _, v_end = ends(flow, row)
    direction = tangent(v_start, row.t, gamma, lam)
    u, jvp = flow(row.x_t, row.t, row.s), derivative(flow, row, direction)
    return residual(u, jvp, v_start, v_end, row.t, row.s, gamma, lam)


def printed_tangent(flow, row: Jump, gamma: float, lam: float):
    """Return g with the published tangent (lam v, lam, -gamma)."""
    v_start, _, v_end = ends(flow, row)
    u, jvp = (
        flow(row.x_t, row.t, row.s),
        derivative(flow, row, Tangent(*scaled(v_start, row, lam, -gamma))),
    )
    return residual(u, jvp, v_start, v_end, row.t, row.s, gamma, lam)


def reversed_tangent(flow, row: Jump, gamma: float, lam: float):
    """Return g with the sign of the tangent flipped."""
    v_start, _, v_end = ends(flow, row)
    u, jvp = (
        flow(row.x_t, row.t, row.s),
        derivative(flow, row, Tangent(*scaled(v_start, row, -gamma, lam))),
    )
    return residual(u, jvp, v_start, v_end, row.t, row.s, gamma, lam)


def swapped_weights(flow, row: Jump, gamma: float, lam: float):
    """Return g with the two weights exchanged but the correct tangent."""
    v_start, _, v_end = ends(flow, row)
    u, jvp = (
        flow(row.x_t, row.t, row.s),
        derivative(flow, row, Tangent(*scaled(v_start, row, gamma, -lam))),
    )
    return residual(u, jvp, v_start, v_end, row.t, row.s, lam, gamma)


def end_velocity_at_the_start_point(flow, row: Jump, gamma: float, lam: float):
    """Return g with v_end = v(x_t, s)."""
    return with_v_end(flow, row, gamma, lam, flow.velocity(row.x_t, row.s))


def end_velocity_at_the_start_time(flow, row: Jump, gamma: float, lam: float):
    """Return g with v_end = v(f, t)."""
    return with_v_end(flow, row, gamma, lam, flow.velocity(flow.flow_map(row.x_t, row.t, row.s), row.t))


def with_v_end(flow, row: Jump, gamma: float, lam: float, v_end):
    """Return g with another velocity at the end point."""
    v_start = flow.velocity(row.x_t, row.t)
    u, jvp = (
        flow(row.x_t, row.t, row.s),
        derivative(flow, row, Tangent(*scaled(v_start, row, gamma, -lam))),
    )
    return residual(u, jvp, v_start, v_end, row.t, row.s, gamma, lam)


def scaled(v, row: Jump, start: float, end: float):
    """Return the components (start v, start, end) of a tangent."""
    return start * v, torch.full_like(row.t, start), torch.full_like(row.t, end)


END_MISTAKES = [end_velocity_at_the_start_point, end_velocity_at_the_start_time]
MISTAKES = [printed_tangent, reversed_tangent, swapped_weights, *END_MISTAKES]


def rms(g) -> float:
    """Return the root mean square of all elements."""
    return g.square().mean().sqrt().item()


@pytest.mark.parametrize("edge", EDGES, ids=repr)
@pytest.mark.parametrize(("gamma", "lam"), NAMED + RANDOM)
def test_residual_of_the_exact_flow_map_is_zero(gamma, lam, edge, flow, draw_jump):
    """g = 0 for any weights on any edge."""
    assert correct(flow, draw_jump(edge), gamma, lam).abs().max() < 1e-12


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("edge", EDGES, ids=repr)
@pytest.mark.parametrize(("gamma", "lam"), RANDOM)
def test_each_mistake_leaves_a_residual_at_unequal_weights(gamma, lam, edge, mistake, flow, draw_jump):
    """With gamma != lam, both above 0, each wrong tangent, weight or end point is detected."""
    row = draw_jump(edge)
    assert correct(flow, row, gamma, lam).abs().max() < 1e-12
    assert rms(mistake(flow, row, gamma, lam)) > 1e-2


@pytest.mark.parametrize(
    ("name", "edge", "gamma", "lam", "mistakes"),
    [
        ("consistency", DataEdge(), 1.0, 0.0, MISTAKES[:3]),
        ("mean flow", Triangle(), 1.0, 0.0, MISTAKES[:3]),
        ("lagrangian", Triangle(), 0.0, 1.0, MISTAKES),
        ("noise to noisy, end identity", NoiseEdge(), 0.0, 1.0, MISTAKES),
        ("noise to noisy, paper", NoiseEdge(0.1), 1.0, 0.5, MISTAKES),
        ("noise to noisy, paper at the end", NoiseEdge(), 1.0, 0.5, MISTAKES),
    ],
)
def test_each_mistake_leaves_a_residual_in_the_named_losses(name, edge, gamma, lam, mistakes, flow, draw_jump):
    """With an end weight of 0 only the tangent and the weights can be wrong; otherwise all five can."""
    row = draw_jump(edge)
    assert correct(flow, row, gamma, lam).abs().max() < 1e-12
    for mistake in mistakes:
        assert rms(mistake(flow, row, gamma, lam)) > 1e-2, mistake.__name__


def test_the_printed_tangent_passes_at_equal_weights(flow, draw_jump):
    """This is why the weights above are unequal: for gamma = lam the published tangent is correct."""
    row = draw_jump(Triangle())
    assert rms(printed_tangent(flow, row, 0.7, 0.7)) < 1e-12


def test_tangent_is_gamma_over_x_and_t_and_minus_lambda_over_s(flow, draw_jump):
    """The components are (gamma v, gamma, -lam)."""
    row = draw_jump(Triangle(), rows=4)
    v = flow.velocity(row.x_t, row.t)
    direction = tangent(v, row.t, 0.3, 1.7)
    assert torch.equal(direction.x, 0.3 * v)
    assert torch.equal(direction.t, torch.full_like(row.t, 0.3))
    assert torch.equal(direction.s, torch.full_like(row.t, -1.7))


def test_tangent_of_the_landing_end_needs_no_teacher_at_the_start(flow, draw_jump):
    """At gamma = 0 the tangent is (None, 0, -lam) with and without v_start, and g is still 0."""
    row = draw_jump(NoiseEdge())
    v_start, _, v_end = ends(flow, row)
    direction = tangent(None, row.t, 0.0, 1.0)
    assert direction.x is None
    assert tangent(v_start, row.t, 0.0, 1.0).x is None
    assert torch.equal(direction.t, torch.zeros_like(row.t))
    assert torch.equal(direction.s, -torch.ones_like(row.s))
    g = residual(flow(row.x_t, row.t, row.s), derivative(flow, row, direction), None, v_end, row.t, row.s, 0.0, 1.0)
    assert g.abs().max() < 1e-12


def test_tangent_of_the_start_needs_the_teacher():
    """A missing velocity is not replaced by 0."""
    with pytest.raises(ValueError, match=r"start_weight = 0\.5"):
        tangent(None, torch.zeros(2), 0.5, 1.0)


def test_residual_on_the_diagonal_is_flow_matching(flow, draw_jump):
    """At s = t with (1, 0), g = u - v, with or without a derivative."""
    row = draw_jump(Diagonal())
    v = flow.velocity(row.x_t, row.t)
    u, jvp = torch.sin(row.x_t), torch.cos(row.x_t)
    assert torch.equal(residual(u, None, v, None, row.t, row.s, 1.0, 0.0), u - v)
    assert torch.equal(residual(u, jvp, v, None, row.t, row.s, 1.0, 0.0), u - v)


def test_residual_of_a_constant_error_is_that_error_on_the_data_edge(flow, draw_jump):
    """For u + eps, g = eps: the residual of consistency equals the error of u."""
    row, eps = draw_jump(DataEdge()), torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    v_start = flow.velocity(row.x_t, row.t)
    jvp = derivative(flow, row, tangent(v_start, row.t, 1.0, 0.0))
    g = residual(flow(row.x_t, row.t, row.s) + eps, jvp, v_start, None, row.t, row.s, 1.0, 0.0)
    torch.testing.assert_close(g, eps.expand_as(g), rtol=0, atol=1e-12)


@pytest.mark.parametrize("edge", EDGES, ids=repr)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.5), (0.0, 1.0), *RANDOM])
def test_residual_of_a_constant_error_knows_where_it_lands(gamma, lam, edge, flow, draw_jump):
    """For u + eps, g = [(gamma + lam) - lam (s - t) q(s) / a(s)^2] eps: v_end moves with the end point."""
    row, eps = draw_jump(edge), torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    v_start = flow.velocity(row.x_t, row.t)
    u = flow(row.x_t, row.t, row.s) + eps
    v_end = flow.velocity(jump(row.x_t, u, row.t, row.s), row.s)
    jvp = derivative(flow, row, tangent(v_start, row.t, gamma, lam))
    g = residual(u, jvp, v_start, v_end, row.t, row.s, gamma, lam)
    q = row.s * flow.std**2 - (1 - row.s)
    factor = (gamma + lam) - lam * (row.s - row.t) * q / flow.scale(row.s) ** 2
    torch.testing.assert_close(g, factor[:, None] * eps, rtol=0, atol=1e-12)


def test_warmup_scales_the_derivative_term_alone(flow, draw_jump):
    """From warmup 0 to 1, g moves by -(s - t) jvp; at 0 the derivative has no effect."""
    row = draw_jump(Triangle())
    v_start, _, v_end = ends(flow, row)
    jvp = derivative(flow, row, tangent(v_start, row.t, 0.6, 1.3))
    parts = (v_start, v_end, row.t, row.s, 0.6, 1.3)
    u = flow(row.x_t, row.t, row.s)
    none, some, full = (residual(u, jvp, *parts, warmup) for warmup in (0.0, 0.25, 1.0))
    assert torch.equal(none, residual(u, None, *parts))
    torch.testing.assert_close(none - some, 0.25 * expand(row.s - row.t, u) * jvp, rtol=0, atol=1e-12)
    torch.testing.assert_close(none - full, expand(row.s - row.t, u) * jvp, rtol=0, atol=1e-12)


def test_consistency_residual_is_the_gradient_of_two_squares(flow, draw_jump):
    """|u - v|^2 + |u - (u^- + (1 - t) jvp)|^2 has gradient 2 du/dtheta^T g at the data edge."""
    torch.manual_seed(0)
    student = MLP(dimensions=3, width=16).double()
    torch.nn.init.normal_(student.end_time.weight)
    parameters = list(student.parameters())
    row = draw_jump(DataEdge())
    v = flow.velocity(row.x_t, row.t)
    result = functional(student, row.x_t, row.t, row.s, None, tangent(v, row.t, 1.0, 0.0))
    u_target = result.u.detach() + expand(1 - row.t, v) * result.jvp
    squares = (result.u - v).square().sum() + (result.u - u_target).square().sum()
    g = residual(result.u.detach(), result.jvp, v, None, row.t, row.s, 1.0, 0.0)
    assert rms(g) > 0.1
    actual = torch.autograd.grad(squares, parameters, retain_graph=True)
    expected = torch.autograd.grad(result.u, parameters, grad_outputs=2 * g)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
