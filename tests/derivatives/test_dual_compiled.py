"""The dual engine with compiled and checkpointed networks: the same results, in one graph without breaks."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from decm_lightning.derivatives import Tangent, dual
from decm_lightning.networks import DiT

pytestmark = pytest.mark.compiled


def student(dtype=torch.float64) -> DiT:
    """Return a small flow map that depends on every argument and weight."""
    torch.manual_seed(0)
    network = DiT(4, 2, patch_size=2, width=16, depth=3, heads=2, num_classes=3, end_time=True, pixel_skip=True)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            # With large convolutions the gradients, and so their rounding errors, would be large.
            nn.init.normal_(parameter, std=0.05 if name.startswith("pixel_skip.") else 0.3)
    return network.to(dtype)


def step(network: nn.Module, rows: int = 6, tangent_rows: int = 4, dtype=torch.float64):
    """Return u, jvp and the gradient of the sum of u^2 over all parameters."""
    generator = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, rows, 2, 4, 4, generator=generator).to(dtype)
    t, s, dt, ds = torch.rand(4, rows, generator=generator).to(dtype)
    tangent = Tangent(dx[:tangent_rows], dt[:tangent_rows], ds[:tangent_rows])
    network.zero_grad()
    result = dual(network, x, t, s, torch.arange(rows) % 3, tangent)
    result.u.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return result.u.detach(), result.jvp, gradient


def compiled(network: nn.Module, parts: str, backend: str) -> nn.Module:
    """Return the network, compiled as a whole or by blocks."""
    for unit in network.units() if parts == "blocks" else [network]:
        unit.forward = torch.compile(unit.forward, fullgraph=True, backend=backend)
    return network


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Clear the compiler's cache of other tests."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["dual-plain", "dual-checkpointed"])
@pytest.mark.parametrize("parts", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_compiled_pass_equals_an_eager_one_and_is_one_graph(parts, checkpointed):
    """u, jvp and gradients in float64. Equal blocks share a graph, and a second step does not recompile."""
    expected = step(student())
    network = student()
    network.gradient_checkpointing = checkpointed
    compiled(network, parts, "aot_eager")
    for _ in range(2):
        torch.testing.assert_close(step(network), expected, rtol=1e-12, atol=1e-12)
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["dual-plain", "dual-checkpointed"])
def test_the_default_compiler_is_right_in_float32(checkpointed):
    """Results of Inductor's kernels differ from float64 by less than 1e-5."""
    network = student(torch.float32)
    network.gradient_checkpointing = checkpointed
    network.compile_units()
    for value, exact in zip(step(network, dtype=torch.float32), step(student()), strict=True):
        assert (value - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.slow
def test_other_numbers_of_dual_rows_are_compiled_correctly():
    """For other sizes of batch and tangent the result equals the eager one."""
    network = compiled(student(), "blocks", "aot_eager")
    for rows, covered in ((6, 4), (5, 5), (8, 2), (7, 3)):
        expected = step(student(), rows, covered)
        torch.testing.assert_close(step(network, rows, covered), expected, rtol=1e-12, atol=1e-12)
