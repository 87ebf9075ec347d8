"""The engines agree with each other and with exact derivatives, and jvp has no graph."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from decm_lightning.derivatives import ENGINES, Jump, Tangent, central, dual, forward_with_jvp, functional
from decm_lightning.networks import MLP, DiT

ENGINE_LIST = [functional, dual, central]


def randomised(network: nn.Module) -> nn.Module:
    """Return the network in float64 with random weights, none of them zero."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return network.double()


@pytest.fixture
def mlp():
    """A flow map of points with three classes that depends on s."""
    return randomised(MLP(dimensions=2, width=32, depth=3, num_classes=3))


@pytest.fixture
def dit():
    """A flow map of images with three classes that depends on s."""
    return randomised(DiT(4, 2, patch_size=2, width=16, depth=2, heads=2, num_classes=3, end_time=True))


@pytest.fixture
def dit_with_skip():
    """The same with a pixel skip, whose weights keep the output and with it the rounding in moderate sizes."""
    network = DiT(4, 2, patch_size=2, width=16, depth=2, heads=2, num_classes=3, end_time=True, pixel_skip=True)
    randomised(network)
    for convolution in (network.pixel_skip.enter, network.pixel_skip.inner, network.pixel_skip.leave):
        nn.init.normal_(convolution.weight, std=0.05)
    return network


@pytest.fixture(params=["mlp", "dit", "dit_with_skip"])
def network(request):
    """Each of them."""
    return request.getfixturevalue(request.param)


def draw(network: nn.Module, rows: int, seed: int = 0, tangent_rows: int | None = None) -> Jump:
    """Return random jumps, with a tangent over the first rows (None: all rows, 0: no rows)."""
    generator = torch.Generator().manual_seed(seed)
    size = getattr(network, "sample_shape", (2,))
    x_t, tangent_x = torch.randn(2, rows, *size, generator=generator, dtype=torch.float64)
    t, s = torch.rand(2, rows, generator=generator, dtype=torch.float64).sort(0).values
    tangent_t, tangent_s = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    condition = torch.randint(0, 4, (rows,), generator=generator)
    covered = rows if tangent_rows is None else tangent_rows
    tangent = Tangent(tangent_x[:covered], tangent_t[:covered], tangent_s[:covered]) if covered else None
    return Jump(x_t, t, s, condition, tangent)


def apply(engine, network, jump, **options):
    """Run an engine on jumps."""
    return engine(network, jump.x_t, jump.t, jump.s, jump.condition, jump.tangent, **options)


def to_float32(jump: Jump) -> Jump:
    """Return the same jumps in single precision."""
    tangent = Tangent(jump.tangent.x.float(), jump.tangent.t.float(), jump.tangent.s.float())
    return Jump(jump.x_t.float(), jump.t.float(), jump.s.float(), jump.condition, tangent)


def test_functional_is_exact_on_a_polynomial():
    """u = x^2 t + s^3 has jvp = 2 x t dx + x^2 dt + 3 s^2 ds."""

    def network(x_t, t, s, condition):
        return x_t**2 * t[:, None] + s[:, None] ** 3

    x, dx = torch.tensor([[2.0, -1.0], [0.5, 1.5]], dtype=torch.float64).split(1)
    t, s, dt, ds = torch.tensor([0.3, 0.8, 0.7, -0.4], dtype=torch.float64).split(1)
    tangent = Tangent(dx, dt, ds)
    expected = 2 * x * t * dx + x**2 * dt + 3 * s**2 * ds
    jvp = functional(network, x, t, s, None, tangent).jvp
    torch.testing.assert_close(jvp, expected, rtol=0, atol=1e-14)


def test_functional_is_the_full_jacobian_times_the_tangent(network):
    """jvp equals the Jacobians over x, t and s, by reverse mode, applied to the tangent."""
    jump = draw(network, 2)

    def of(x_t, t, s):
        return network(x_t, t, s, jump.condition)

    over_x, over_t, over_s = torch.autograd.functional.jacobian(of, (jump.x_t, jump.t, jump.s))
    tangent = jump.tangent
    expected = (over_x.flatten(jump.x_t.ndim) @ tangent.x.flatten()) + over_t @ tangent.t + over_s @ tangent.s
    torch.testing.assert_close(apply(functional, network, jump).jvp, expected, rtol=0, atol=1e-12)


def test_central_agrees_with_functional_in_float64(network):
    """With a small step the difference equals the derivative."""
    jump = draw(network, 6)
    exact, difference = apply(functional, network, jump), apply(central, network, jump, h=1e-5)
    assert torch.equal(exact.u, difference.u)
    assert exact.jvp.abs().max() > 0.1
    torch.testing.assert_close(difference.jvp, exact.jvp, rtol=0, atol=1e-8)


def test_central_converges_at_order_two(network):
    """Halving the step quarters the error."""
    jump = draw(network, 6)
    exact = apply(functional, network, jump).jvp
    errors = [(apply(central, network, jump, h=h).jvp - exact).norm().item() for h in (4e-3, 2e-3, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_central_is_within_its_documented_error_in_float32(network):
    """At the default step the error in float32 is at most about 2e-4 of the derivative's size."""
    jump = draw(network, 32)
    exact = apply(functional, network, jump).jvp
    jvp = apply(central, copy.deepcopy(network).float(), to_float32(jump)).jvp
    assert jvp.dtype == torch.float32
    assert (jvp - exact).square().mean().sqrt() < 2e-4 * exact.square().mean().sqrt()


def test_functional_in_float32_is_exact_up_to_rounding(network):
    """In float32 the relative error is about 1e-6, not 1e-4."""
    jump = draw(network, 32)
    exact = apply(functional, network, jump).jvp
    jvp = apply(functional, copy.deepcopy(network).float(), to_float32(jump)).jvp
    assert (jvp - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("engine", ENGINE_LIST)
def test_u_has_a_graph_and_du_has_none(engine, network):
    """A loss differentiates u and treats jvp as a constant."""
    result = apply(engine, network, draw(network, 3))
    assert result.u.requires_grad
    assert not result.jvp.requires_grad
    assert result.jvp.grad_fn is None


@pytest.mark.parametrize("engine", ENGINE_LIST)
def test_u_and_its_gradients_are_the_plain_forwards(engine, network):
    """The engine changes neither the value nor the gradient of u."""
    jump = draw(network, 4, tangent_rows=2)
    parameters = [p for p in network.parameters() if p.requires_grad]
    result = apply(engine, network, jump)
    plain = network(jump.x_t, jump.t, jump.s, jump.condition)
    assert torch.equal(result.u, plain)
    through_engine = torch.autograd.grad(result.u.square().sum(), parameters)
    through_plain = torch.autograd.grad(plain.square().sum(), parameters)
    assert any(gradient.abs().max() > 0.1 for gradient in through_plain)
    for gradient, expected in zip(through_engine, through_plain, strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("engine", ENGINE_LIST)
def test_the_tangent_may_cover_only_the_first_rows(engine, network):
    """u has all rows and jvp the rows of the tangent, as if these were the whole batch."""
    jump = draw(network, 5, tangent_rows=2)
    result = apply(engine, network, jump)
    alone = Jump(jump.x_t[:2], jump.t[:2], jump.s[:2], jump.condition[:2], jump.tangent)
    assert len(result.u) == 5
    torch.testing.assert_close(result.jvp, apply(engine, network, alone).jvp, rtol=0, atol=1e-11)


@pytest.mark.parametrize("engine", ENGINE_LIST)
def test_without_a_tangent_there_is_no_derivative(engine, network):
    """jvp is None and the network is called once."""
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    result = apply(engine, network, draw(network, 3, tangent_rows=0))
    assert result.jvp is None
    assert len(calls) == 1


def test_central_refuses_bfloat16():
    """Rounding would be half of the difference. The message names the dtype."""
    network = MLP(width=8).bfloat16()
    x, t = torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 or wider.*torch\.bfloat16"):
        central(network, x, t, t, None, Tangent(x, t, t))


def test_central_refuses_autocast():
    """The output is float32 but was rounded inside the network: the error of jvp would be 65 %."""
    network = DiT(4, 1, patch_size=2, width=16, depth=1, heads=2, num_classes=3)
    x, t, _, labels = network.example()
    tangent = Tangent(x, t, t)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"float32 or wider.*torch\.bfloat16"):
        central(network, x, t, t, labels, tangent)
    assert central(network, x, t, t, labels, tangent).jvp is not None


def test_engines_are_found_by_name():
    """The names in a config are those of the functions."""
    assert {"functional": functional, "dual": dual, "central": central} == ENGINES


@pytest.mark.parametrize("engine", ENGINE_LIST)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 3, 2), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_jumps_evaluated_together_are_those_evaluated_alone(engine, order, network):
    """Each jump gets its own u and jvp, in any order, with or without tangents, and for different numbers of rows."""
    jumps = [
        draw(network, 3, seed=1),
        draw(network, 2, seed=2, tangent_rows=0),
        draw(network, 4, seed=3),
        draw(network, 1, seed=4, tangent_rows=0),
    ]
    results = forward_with_jvp(engine, network, [jumps[i] for i in order])
    assert len(results) == 4
    for i, result in zip(order, results, strict=True):
        alone = apply(engine, network, jumps[i])
        torch.testing.assert_close(result.u, alone.u, rtol=0, atol=1e-12)
        assert (result.jvp is None) == (jumps[i].tangent is None)
        if result.jvp is not None:
            torch.testing.assert_close(result.jvp, alone.jvp, rtol=0, atol=1e-10)


@pytest.mark.parametrize("covered", [3, 5])
@pytest.mark.parametrize("engine", ENGINE_LIST)
def test_tangent_without_x_is_one_of_zeros(engine, covered, network):
    """None in place of zeros is cheaper and gives the same derivative, in all rows or in the first rows."""
    jump = draw(network, 5, tangent_rows=covered)
    still = replace(jump, tangent=replace(jump.tangent, x=torch.zeros_like(jump.tangent.x)))
    none = replace(jump, tangent=replace(jump.tangent, x=None))
    expected, result = apply(engine, network, still), apply(engine, network, none)
    assert torch.equal(result.u, expected.u)
    assert expected.jvp.abs().max() > 0.1
    torch.testing.assert_close(result.jvp, expected.jvp, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINE_LIST)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_jumps_with_and_without_a_tangent_in_x_are_evaluated_together(engine, order, network):
    """Losses with a start weight of 0, with a positive start weight, and without a derivative."""
    first, second, third = draw(network, 3, seed=1), draw(network, 2, seed=2), draw(network, 2, seed=3, tangent_rows=0)
    jumps = [replace(first, tangent=replace(first.tangent, x=None)), second, third]
    for i, result in zip(order, forward_with_jvp(engine, network, [jumps[i] for i in order]), strict=True):
        alone = apply(engine, network, jumps[i])
        torch.testing.assert_close(result.u, alone.u, rtol=0, atol=1e-12)
        if result.jvp is not None:
            torch.testing.assert_close(result.jvp, alone.jvp, rtol=0, atol=1e-10)
    (only,) = forward_with_jvp(engine, network, [jumps[0]])
    torch.testing.assert_close(only.jvp, apply(engine, network, jumps[0]).jvp, rtol=0, atol=1e-12)


def test_jumps_are_evaluated_in_one_call_with_a_graph(network):
    """A step calls the network for u only once, as DDP and FSDP expect."""
    calls = []
    network.register_forward_hook(lambda _, inputs, u: calls.append((len(inputs[0]), u.requires_grad)))
    forward_with_jvp(functional, network, [draw(network, 3, tangent_rows=0), draw(network, 2)])
    assert [rows for rows, graph in calls if graph] == [5]


def test_jumps_without_any_tangent_have_no_derivative(network):
    """Flow matching alone needs no second pass."""
    results = forward_with_jvp(
        functional, network, [draw(network, 3, tangent_rows=0), draw(network, 2, tangent_rows=0)]
    )
    assert [result.jvp for result in results] == [None, None]
    assert [len(result.u) for result in results] == [3, 2]
