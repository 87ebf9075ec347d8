"""The middle identity: exact on exact flows, with the start identity and flow matching as its limits."""

from dataclasses import replace

import pytest
import torch

from decm_lightning.derivatives import functional
from decm_lightning.losses import FlowMapLoss, Middle, Objective, residual, tangent
from decm_lightning.losses.middle import Fixed, FixedLength, Random, Sigmoid
from decm_lightning.networks import MLP
from decm_lightning.path import expand
from decm_lightning.triangle import DataEdge, NoiseEdge, Triangle


@pytest.fixture
def student():
    """A tiny flow map with a large error, in float64."""
    torch.manual_seed(0)
    network = MLP(dimensions=3, width=16, depth=2).double()
    torch.nn.init.normal_(network.end_time.weight)
    return network


def times(flow, draw_jump, edge=None):
    """Return start points, times and the velocity there, away from s = t."""
    row = draw_jump(edge or Triangle(), rows=32)
    return row.x_t, row.t, row.s, flow.velocity(row.x_t, row.t)


def residual_of(u, middle, x_t, t, s, alpha, v_start):
    """Return the residual of the middle identity for the flow map u, without conditions."""
    with torch.no_grad():
        composition = middle.compose(lambda x, t, s: u(x, t, s, None), x_t, t, s, torch.full_like(t, alpha), v_start)
        return middle.residual(u(x_t, t, s, None), composition)


@pytest.mark.parametrize("edge", [Triangle(), DataEdge(), NoiseEdge()])
@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.5, 0.9, 1.0])
def test_an_exact_flow_map_has_no_residual(flow, draw_jump, alpha, edge):
    """A step equals two shorter steps, wherever it is split."""
    x_t, t, s, _ = times(flow, draw_jump, edge)
    g = residual_of(flow, Middle(divided=False), x_t, t, s, alpha, None)
    assert g.abs().max() < 1e-12


@pytest.mark.parametrize("mistake", ["fractions exchanged", "middle by the velocity", "middle of the clock"])
def test_wrong_compositions_have_a_residual(flow, draw_jump, mistake):
    """Wrong variants of the identity do not vanish on the exact flow map."""
    x_t, t, s, v = times(flow, draw_jump)
    m = t + 0.3 * (s - t)
    u_1 = v if mistake == "middle by the velocity" else flow(x_t, t, m, None)
    x_m = x_t + expand(m - t, x_t) * u_1
    u_2 = flow(x_m, (m + s) / 2 if mistake == "middle of the clock" else m, s, None)
    first = 0.7 if mistake == "fractions exchanged" else 0.3
    g = flow(x_t, t, s, None) - first * u_1 - (1 - first) * u_2
    assert g.abs().max() > 1e-3


@pytest.mark.parametrize("first", ["teacher", "student"])
def test_a_vanishing_first_part_is_the_start_identity(flow, student, draw_jump, first):
    """g tends to u - v - (s - t) jvp in proportion to alpha, if u(x_t, t, t) = v."""
    x_t, t, s, v = times(flow, draw_jump)

    def matched(x, t, s, condition):
        # A flow map with a large error, whose velocity at s = t is exact.
        return flow.velocity(x, t) + expand(s - t, x) * student(x, t, s, condition)

    u, jvp = functional_at(matched, x_t, t, s, v)
    limit = residual(u, jvp, v, None, t, s, 1.0, 0.0)
    assert limit.abs().max() > 0.1
    start = v if first == "teacher" else None
    errors = [
        (residual_of(matched, Middle(first=first), x_t, t, s, alpha, start) - limit).norm().item()
        for alpha in (1e-2, 1e-3, 1e-4)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)
    assert errors[2] < 1e-2 * limit.norm()


def functional_at(u, x_t, t, s, v):
    """Return u and its derivative along (v, 1, 0)."""
    direction = tangent(v, t, 1.0, 0.0)
    value, jvp = torch.func.jvp(lambda x, time: u(x, time, s, None), (x_t, t), (direction.x, direction.t))
    return value.detach(), jvp.detach()


def test_a_whole_first_part_is_flow_matching(flow, student, draw_jump):
    """For alpha = 1 with the teacher's first part the target is v."""
    x_t, t, s, v = times(flow, draw_jump)
    g = residual_of(student, Middle(first="teacher"), x_t, t, s, 1.0, v)
    torch.testing.assert_close(g, student(x_t, t, s, None).detach() - v, rtol=0, atol=1e-14)


def test_two_halves_are_the_shortcut_target(student, flow, draw_jump):
    """For alpha = 1/2 the target is the mean of two half steps (arXiv 2410.12557, eq. 4)."""
    x_t, t, s, _ = times(flow, draw_jump)
    half = expand((s - t) / 2, x_t)
    with torch.no_grad():
        middle = x_t + half * student(x_t, t, (t + s) / 2, None)
        target = (student(x_t, t, (t + s) / 2, None) + student(middle, (t + s) / 2, s, None)) / 2
        g = residual_of(student, Middle(), x_t, t, s, 0.5, None)
    torch.testing.assert_close(g, 2 * (student(x_t, t, s, None).detach() - target), rtol=0, atol=1e-13)


def test_the_three_identities_add_up(flow, student, draw_jump):
    """One loss with all three weights has the sum of their residuals, and 0 on the exact flow map."""
    loss = FlowMapLoss(Triangle(), start_weight=0.7, end_weight=0.4, middle_weight=0.3)
    row = draw_jump(loss.edge, rows=32)
    v = flow.velocity(row.x_t, row.t)
    for network in (flow, student):
        result = functional(network, row.x_t, row.t, row.s, None, tangent(v, row.t, 0.7, 0.4))
        u = result.u.detach()
        v_end = flow.velocity(row.x_t + expand(row.s - row.t, u) * u, row.s)
        alpha = torch.full_like(row.t, 0.25)
        with torch.no_grad():
            composed = loss.middle.compose(
                lambda x, t, s, network=network: network(x, t, s, None), row.x_t, row.t, row.s, alpha, None
            )
        term = Objective({"loss": loss}).term(loss, row, result, v, v_end, 0, composed)
        g = residual(u, result.jvp, v, v_end, row.t, row.s, 0.7, 0.4) + 0.3 * (u - composed.target) / 0.25
        torch.testing.assert_close(term.residual_rms, g.square().mean().sqrt(), rtol=1e-12, atol=1e-13)
        assert (term.residual_rms < 1e-12) == (network is flow)


def test_fractions():
    """Each fraction has its formula and its range."""
    generator = torch.Generator().manual_seed(0)
    t, s = torch.tensor([0.0, 0.5, 0.9]), torch.tensor([1.0, 1.0, 1.0])
    assert Fixed(0.25).at(t, s, 0, generator).tolist() == [0.25] * 3
    torch.testing.assert_close(FixedLength(0.25).at(t, s, 0, generator), torch.tensor([0.25, 0.5, 1.0]))
    random = Random().at(torch.zeros(10_000), torch.ones(10_000), 0, generator)
    assert (random > 0).all()
    assert (random <= 1).all()
    assert random.mean() == pytest.approx(0.5, abs=0.02)
    schedule = Sigmoid().for_run(1_000)
    assert [schedule.alpha(step) for step in (0, 500, 1_000)] == [1.0, 0.5, 0.0]
    assert Sigmoid(steps=10).for_run(1_000).steps == 10


def test_a_vanished_alpha_needs_a_derivative_and_no_target():
    """The schedule changes what a loss reads: a target before, a derivative after."""
    loss = FlowMapLoss(Triangle(), start_weight=0.0, middle_weight=1.0, middle=Middle(Sigmoid(steps=10), "teacher"))
    before, after = loss.at(5), loss.at(10)
    assert (before.needs_derivative, before.middle_weight) == (False, 1.0)
    assert (after.needs_derivative, after.middle_weight, after.start_weight) == (True, 0.0, 1.0)
    assert before.velocities == after.velocities


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(0.0),
        lambda: FixedLength(1.5),
        lambda: Sigmoid(steps=0),
        lambda: Sigmoid(cutoff=0.7),
        lambda: Middle(limit=0.0),
        lambda: FlowMapLoss(Triangle(), start_weight=0.0),
        lambda: replace(FlowMapLoss(Triangle()), middle_weight=-1.0),
    ],
)
def test_values_out_of_range_are_refused(make):
    """The error names the value."""
    with pytest.raises(ValueError, match="got"):
        make()
