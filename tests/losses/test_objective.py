"""Every loss of every preset is zero for the exact flow and has the gradient of its formula."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from decm_lightning import losses, time_laws, triangle
from decm_lightning.derivatives import Jump, JVPResult, forward_with_jvp, functional
from decm_lightning.losses import FlowMapLoss, Objective, PresetName, middle, named, presets, residual, rivals, tangent
from decm_lightning.losses.weighting import NORMALIZATIONS, TIME_WEIGHTS
from decm_lightning.networks import MLP
from decm_lightning.path import expand, jump
from decm_lightning.time_laws import LogitNormal
from decm_lightning.triangle import DataEdge, Diagonal, Lengths, NoiseEdge, Triangle

PRESETS = {
    "paper": presets.paper(),
    "end_identity": presets.end_identity(),
    "whole_triangle": presets.whole_triangle(),
    "consistency_only": presets.consistency_only(),
    "flow_matching_only": presets.flow_matching_only(),
    "consistency_and_flow_matching": presets.consistency_and_flow_matching(),
    "facm": rivals.facm(),
    "mean_flow": rivals.mean_flow(),
    "ayf_emd": rivals.ayf_emd(warmup_steps=0),
    "ayf_lmd": rivals.ayf_lmd(warmup_steps=0),
    "lagrangian": rivals.lagrangian(),
    "free_flow": rivals.free_flow(),
}
CASES = [(preset, name) for preset, objective in PRESETS.items() for name in objective.losses]


@pytest.fixture
def student():
    """A tiny flow map with a large error, in float64."""
    torch.manual_seed(0)
    network = MLP(dimensions=3, width=5, depth=2).double()
    torch.nn.init.normal_(network.end_time.weight)
    return network


def normalized_by(objective: Objective, normalization: str) -> Objective:
    """Return the objective with one normalization for all losses."""
    losses = {name: replace(loss, normalization=None) for name, loss in objective.losses.items()}
    return replace(objective, losses=losses, normalization=normalization)


def normalize(g, t, name):
    """Return N(g)."""
    return NORMALIZATIONS[name](g, t)


def prepare(flow, student, loss: FlowMapLoss, row: Jump):
    """Return jumps with their tangent, the student's JVPResult, and the teacher's velocities with a weight above 0."""
    v_start = flow.velocity(row.x_t, row.t) if loss.start_weight else None
    row_tangent = tangent(v_start, row.t, loss.start_weight, loss.end_weight) if loss.edge.has_length else None
    row = replace(row, tangent=row_tangent)
    (result,) = forward_with_jvp(functional, student, [row])
    end = jump(row.x_t, result.u.detach(), row.t, row.s)
    return row, result, v_start, flow.velocity(end, row.s) if loss.end_weight else None


def jacobian(u, parameters):
    """Return du/dtheta, (elements of u, parameters), by one backward pass per element."""
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in u.flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def direction_gradient(u, g):
    """Return the gradient over u of mean(1 - cosine) to the fixed target u - g, in closed form."""
    target = u - g
    length, reach = u.norm(dim=1, keepdim=True), target.norm(dim=1, keepdim=True)
    cosine = (u * target).sum(1, keepdim=True) / (length * reach)
    return (cosine * u / length**2 - target / (length * reach)) / len(u)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("preset", "name"), CASES)
def test_every_loss_is_zero_on_the_exact_flow_map(preset, name, normalization, flow, draw_jump):
    """The exact student has no residual and no loss."""
    objective = normalized_by(PRESETS[preset], normalization)
    loss = objective.losses[name]
    term = objective.term(loss, *prepare(flow, flow, loss, draw_jump(loss.edge)), step=0)
    assert term.residual_rms < 1e-12
    assert abs(term.value) < 1e-14


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("preset", "name"), CASES)
def test_every_loss_has_the_gradient_of_its_formula(preset, name, normalization, flow, student, draw_jump):
    """The gradient is du/dtheta^T (2 w N(g) / elements + the cosine loss's part), by an explicit Jacobian."""
    objective = normalized_by(PRESETS[preset], normalization)
    loss = objective.losses[name]
    row, result, v_start, v_end = prepare(flow, student, loss, draw_jump(loss.edge, rows=6))
    term = objective.term(loss, row, result, v_start, v_end, step=0)
    u = result.u.detach()
    g = residual(u, result.jvp, v_start, v_end, row.t, row.s, loss.start_weight, loss.end_weight)
    weight = expand(TIME_WEIGHTS[loss.time_weight](row.t), u)
    over_u = 2 * weight * normalize(g, row.t, normalization) / u.numel() + loss.cosine_weight * direction_gradient(u, g)
    parameters = list(student.parameters())
    expected = loss.weight * over_u.flatten() @ jacobian(result.u, parameters)
    actual = torch.cat([part.flatten() for part in torch.autograd.grad(term.value, parameters)])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_value_and_residual_are_those_of_the_formula(normalization, flow, student, draw_jump):
    """value = weight mean(w N(g)^2); residual_rms = rms(g), before N and without the weight."""
    loss = FlowMapLoss(Triangle(), start_weight=0.7, end_weight=1.2, weight=3.0, time_weight="cosine")
    row, result, v_start, v_end = prepare(flow, student, loss, draw_jump(loss.edge))
    term = Objective({"loss": loss}, normalization).term(loss, row, result, v_start, v_end, step=0)
    g = residual(result.u.detach(), result.jvp, v_start, v_end, row.t, row.s, 0.7, 1.2)
    weight = torch.cos(torch.pi / 2 * row.t)[:, None]
    torch.testing.assert_close(term.value.detach(), 3 * (weight * normalize(g, row.t, normalization) ** 2).mean())
    torch.testing.assert_close(term.residual_rms, g.square().mean().sqrt())
    assert not term.residual_rms.requires_grad


def test_warm_up_enters_the_residual(flow, student, draw_jump):
    """After a quarter of the warm-up the derivative has the factor 1/4."""
    loss = FlowMapLoss(DataEdge())
    row, result, v_start, v_end = prepare(flow, student, loss, draw_jump(loss.edge))
    term = Objective({"loss": loss}, warmup_steps=400).term(loss, row, result, v_start, v_end, step=100)
    g = result.u.detach() - v_start - 0.25 * (1 - row.t)[:, None] * result.jvp
    torch.testing.assert_close(term.value.detach(), g.square().mean())


def test_paper_asks_for_noise_to_noisy_at_every_third_step():
    """The other two losses are active at every step."""
    due = [set(presets.paper().active_losses(step)) for step in range(5)]
    both, three = {"consistency", "flow_matching"}, {"consistency", "flow_matching", "noise_to_noisy"}
    assert due == [three, both, both, three, both]
    assert all(len(presets.end_identity().active_losses(step)) == 3 for step in range(5))


def test_presets_are_the_rows_of_the_table():
    """Each loss has the edge and the weights (start, end) of its method."""
    table = {
        (preset, name): (loss.edge, loss.start_weight, loss.end_weight)
        for preset, objective in PRESETS.items()
        for name, loss in objective.losses.items()
        if name != "flow_matching"
    }
    assert table == {
        ("paper", "consistency"): (DataEdge(), 1, 0),
        ("paper", "noise_to_noisy"): (NoiseEdge(0.1), 1, 0.5),
        ("end_identity", "consistency"): (DataEdge(), 1, 0),
        ("end_identity", "noise_to_noisy"): (NoiseEdge(0.0), 0, 1),
        ("whole_triangle", "triangle"): (Lengths(LogitNormal(-0.6, 1.6)), 0, 1),
        ("consistency_only", "consistency"): (DataEdge(), 1, 0),
        ("consistency_and_flow_matching", "consistency"): (DataEdge(), 1, 0),
        ("facm", "consistency"): (DataEdge(), 1, 0),
        ("mean_flow", "mean_flow"): (Triangle(LogitNormal(0.4, 1.0)), 1, 0),
        ("ayf_emd", "ayf_emd"): (Lengths(LogitNormal(-0.6, 1.6)), 1, 0),
        ("ayf_lmd", "ayf_lmd"): (Lengths(LogitNormal(-0.6, 1.6)), 0, 1),
        ("lagrangian", "lagrangian"): (Triangle(), 0, 1),
        ("free_flow", "predictor"): (NoiseEdge(), 0, 1),
    }
    diagonals = [o.losses["flow_matching"] for o in PRESETS.values() if "flow_matching" in o.losses]
    assert len(diagonals) == 8
    assert all((loss.edge, loss.start_weight, loss.end_weight) == (Diagonal(), 1, 0) for loss in diagonals)


@pytest.mark.parametrize(
    ("steps", "decay_steps"), [(1, 1), (60, 15), (1000, 250), (80_000, 20_000), (312_500, 20_000), (None, None)]
)
def test_paper_s_noise_edge_reaches_the_noise_within_a_quarter_of_the_run(steps, decay_steps):
    """At most the paper's 20,000 steps, which is also the default for runs of unknown length; set values stay."""
    edge = presets.paper().for_run(steps).losses["noise_to_noisy"].edge
    assert edge == NoiseEdge(0.1, decay_steps)
    t = torch.rand(4)
    at = min(decay_steps or 20_000, 20_000)
    assert edge.draw(t, at, torch.Generator()).t.tolist() == [0, 0, 0, 0]
    assert edge.draw(t, at // 2, torch.Generator()).t.max() == pytest.approx(0.1 * (1 - (at // 2) / at))
    assert presets.paper(r_decay_steps=7).for_run(steps) == presets.paper(r_decay_steps=7)


def test_own_normalization_and_time_weight_enter_the_loss(flow, student, draw_jump):
    """N(g) or N(g, t) and w(t) can be any functions: value = mean(w(t) N^2)."""
    loss = FlowMapLoss(Triangle(), time_weight=lambda t: 2 + t)
    row, result, v_start, v_end = prepare(flow, student, loss, draw_jump(loss.edge))
    g = residual(result.u.detach(), result.jvp, v_start, v_end, row.t, row.s, 1.0, 0.0)
    own = {"of g": lambda g: g.tanh(), "of g and t": lambda g, t: g * expand(t, g)}
    expected = {"of g": g.tanh(), "of g and t": g * row.t[:, None]}
    for name, function in own.items():
        term = Objective({"loss": loss}, function).term(loss, row, result, v_start, v_end, step=0)
        torch.testing.assert_close(term.value.detach(), ((2 + row.t)[:, None] * expected[name] ** 2).mean())


def test_every_preset_has_a_name_and_every_name_a_preset():
    found = {
        name
        for module in (presets, rivals)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__annotations__", {}).get("return") is Objective
    }
    assert set(get_args(PresetName)) == found
    for name in found:
        assert named(name) == getattr(losses, name)()
    with pytest.raises(ValueError, match=r"one of paper, .*: got 'papr'"):
        named("papr")


def test_an_objective_is_written_without_its_defaults():
    text = str(presets.end_identity(batch_fractions=(0.5, 0.25, 0.25)))
    assert text == (
        "Objective(losses={'consistency': FlowMapLoss(edge=DataEdge(), batch_fraction=0.5), "
        "'flow_matching': FlowMapLoss(edge=Diagonal(), batch_fraction=0.25), "
        "'noise_to_noisy': FlowMapLoss(edge=NoiseEdge(), start_weight=0.0, end_weight=1.0, batch_fraction=0.25)}, "
        "normalization='tangent_norm')"
    )
    for name in get_args(PresetName):
        assert eval(str(named(name)), vars(losses) | vars(triangle) | vars(time_laws) | vars(middle)) == named(name)


def test_presets_have_one_normalization():
    """The paper's losses share the clamp, and flow matching has the cosine loss."""
    assert (PRESETS["paper"].normalization, PRESETS["end_identity"].normalization) == ("clamp", "tangent_norm")
    assert PRESETS["paper"].losses["flow_matching"].cosine_weight == 1


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"start_weight": -1.0}, "-1.0, 0.0, 0.0"),
        ({"end_weight": -0.5}, "1.0, -0.5, 0.0"),
        ({"start_weight": 0.0}, "0.0, 0.0, 0.0"),
        ({"weight": 0.0}, "0.0"),
        ({"every": 0}, "0"),
        ({"cosine_weight": -2.0}, "-2.0"),
        ({"time_weight": "sine"}, "'sine'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_loss_refuses_what_is_out_of_range(arguments, value):
    """The message contains the value."""
    with pytest.raises(ValueError, match=f"got {value}$"):
        FlowMapLoss(DataEdge(), **arguments)


@pytest.mark.usefixtures("unchecked")
def test_objective_refuses_what_is_out_of_range():
    """An objective needs a loss, a known normalization, and a warm-up of at least 0 steps."""
    with pytest.raises(ValueError, match="loss"):
        Objective({})
    with pytest.raises(ValueError, match=r"got -1$"):
        Objective({"loss": FlowMapLoss(DataEdge())}, warmup_steps=-1)
    with pytest.raises(ValueError, match=r"plain, clamp, tangent_norm, adaptive_l2: got 'l3'$"):
        Objective({"loss": FlowMapLoss(DataEdge())}, "l3")


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", ["paper", "facm"])
def test_cosine_of_flow_matching_is_to_the_teacher_s_velocity(name, normalization, flow, student, draw_jump):
    """For any N(g) the term and its gradient are those of mean(w N(g)^2) + mean(1 - cos(u, v)), with target v."""
    objective = normalized_by(PRESETS[name], normalization)
    loss = objective.losses["flow_matching"]
    row, result, v, _ = prepare(flow, student, loss, draw_jump(loss.edge))
    with_cosine = objective.term(loss, row, result, v, None, step=0).value
    without = objective.term(replace(loss, cosine_weight=0.0), row, result, v, None, step=0).value
    cosine = (1 - torch.nn.functional.cosine_similarity(result.u, v, dim=1)).mean()
    torch.testing.assert_close(with_cosine - without, cosine, rtol=0, atol=1e-12)
    parameters = list(student.parameters())
    gradient = torch.autograd.grad(with_cosine - without, parameters, retain_graph=True)
    expected = torch.autograd.grad(cosine, parameters)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    # The cosine to the normalized target would differ.
    target = result.u.detach() - normalize(result.u.detach() - v, row.t, normalization)
    other = (1 - torch.nn.functional.cosine_similarity(result.u, target, dim=1)).mean()
    assert (abs(other - cosine) > 1e-3) == (normalization != "plain")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_of_half_precision_velocities_is_float32(dtype):
    """u - v is not rounded to the dtype of u and v: the loss equals the one in float32."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 32, 3, generator=generator).to(dtype)
    t = torch.rand(32, generator=generator)
    loss = FlowMapLoss(Diagonal(), cosine_weight=1.0)
    terms = [
        Objective({"loss": loss}).term(loss, Jump(x, t, t, None), JVPResult(x, None), y, None, step=0)
        for x, y in ((u, v), (u.float(), v.float()))
    ]
    assert terms[0].value.dtype == torch.float32
    assert torch.equal(terms[0].value, terms[1].value)
