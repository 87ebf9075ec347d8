"""Networks with dropout: value and derivative in one pass of the dual engine share the masks."""

import pytest
import torch
from torch import nn

from decm_lightning.derivatives import Tangent, dual

ROWS, DUAL_ROWS = 6, 4


class Dropping(nn.Module):
    """An MLP over (x, t, s) with dropout between its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [nn.Linear(5, 64), nn.SiLU(), nn.Dropout(0.3), nn.Linear(64, 64), nn.LayerNorm(64), nn.Dropout(0.3)]
        self.layers = nn.Sequential(*hidden, nn.GELU(), nn.Linear(64, 3)).double()

    def forward(self, x, t, s, condition):
        return self.layers(torch.cat([x, t[:, None], s[:, None]], 1))


class Quadratic(nn.Module):
    """A map that is quadratic in x for any mask, so that its derivative along x is twice its value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Linear(*sizes, bias=False).double() for sizes in ((3, 64), (64, 3)))
        self.dropout = nn.Dropout(0.3)

    def forward(self, x, t, s, condition):
        return self.last(self.dropout(self.dropout(self.first(x)).square() * t[:, None].cos()))


def draw():
    """Return x, t, s and a tangent for each, in float64."""
    generator = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, ROWS, 3, generator=generator, dtype=torch.float64)
    t, s, dt, ds = torch.rand(4, ROWS, generator=generator, dtype=torch.float64)
    return (x, t, s), (dx, dt, ds)


def first_rows(tangents):
    return Tangent(*(direction[:DUAL_ROWS] for direction in tangents))


def test_jvp_is_the_derivative_of_the_u_of_the_same_pass():
    """Forward mode and a central difference with the same masks give the same u and jvp, to 1e-12 and 1e-8."""
    network, (points, along) = Dropping(), draw()
    torch.manual_seed(2)
    result = dual(network, *points, None, first_rows(along))
    torch.manual_seed(2)
    u, jvp = torch.func.jvp(lambda *inputs: network(*inputs, None), points, along)
    torch.testing.assert_close(result.u, u, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.jvp, jvp[:DUAL_ROWS], rtol=0, atol=1e-12)

    def at(step):
        torch.manual_seed(2)
        return network(*(point + step * direction for point, direction in zip(points, along, strict=True)), None)

    torch.testing.assert_close(result.jvp, ((at(1e-5) - at(-1e-5)) / 2e-5)[:DUAL_ROWS], rtol=0, atol=1e-8)


def test_another_pass_has_other_masks():
    """Without the seed of the first pass u and jvp differ clearly, since both depend on the masks."""
    network, (points, along) = Dropping(), draw()
    some, others = (dual(network, *points, None, first_rows(along)) for _ in range(2))
    assert (some.u - others.u).norm() > 0.1 * some.u.norm()
    assert (some.jvp - others.jvp).norm() > 0.1 * some.jvp.norm()


def test_nothing_is_dropped_in_eval_mode():
    """u and jvp are those of the network without dropout."""
    network, (points, along) = Dropping().eval(), draw()
    result = dual(network, *points, None, first_rows(along))
    u, jvp = torch.func.jvp(lambda *inputs: network(*inputs, None), points, along)
    torch.testing.assert_close(result.u, u, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.jvp, jvp[:DUAL_ROWS], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "backend",
    [
        None,
        pytest.param("aot_eager", marks=pytest.mark.compiled),
        pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.compiled]),
    ],
)
def test_value_and_derivative_share_masks_in_a_compiled_network(backend):
    """For any mask of the compiler: along x, the jvp of a quadratic map is 2 u to 1e-12."""
    torch.compiler.reset()
    network, ((x, t, s), _) = Quadratic(), draw()
    if backend:
        network.forward = torch.compile(network.forward, fullgraph=True, backend=backend)
    still = torch.zeros_like(t)
    results = [dual(network, x, t, s, None, first_rows((x, still, still))) for _ in range(2)]
    for result in results:
        torch.testing.assert_close(result.jvp, 2 * result.u[:DUAL_ROWS].detach(), rtol=0, atol=1e-12)
    assert (results[0].u - results[1].u).norm() > 0.1 * results[0].u.norm()
