"""The dual engine: as exact as torch.func.jvp in one ordinary pass, and an error for unsupported code."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from decm_lightning.derivatives import Tangent, dual, functional
from decm_lightning.derivatives.dual import attention as attention_rule
from decm_lightning.derivatives.dual.tangent_rows import TangentRows, pad
from decm_lightning.derivatives.dual.value import Dual, RuleSet
from decm_lightning.networks import MLP, DiT


def with_random_weights(network: nn.Module) -> nn.Module:
    """Return the network in float64 with random weights, none of them zero."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return network.double()


def make_dit(patch_size: int = 2, **options) -> DiT:
    """Return a small DiT whose output depends on every argument."""
    size = 4 * patch_size
    options = {"width": 16, "depth": 2, "heads": 2, "num_classes": 3, "end_time": True} | options
    return with_random_weights(DiT(size, 2, patch_size, **options))


NETWORKS = {
    "mlp": lambda: with_random_weights(MLP(2, 32, 3, num_classes=3)),
    "dit1": lambda: make_dit(1),
    "dit2": make_dit,
    "dit with pixel skip": lambda: make_dit(pixel_skip=True),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    """An MLP, and DiTs of patch size 1 and 2, without and with a pixel skip."""
    return NETWORKS[request.param]()


def draw(network: nn.Module, batch: int, rows: int):
    """Return the arguments of an engine after the network."""
    generator = torch.Generator().manual_seed(1)
    x_t, along = torch.randn(2, batch, *network.sample_shape, generator=generator, dtype=torch.float64)
    t, s = torch.rand(2, batch, generator=generator, dtype=torch.float64).sort(0).values
    along_t, along_s = torch.randn(2, batch, generator=generator, dtype=torch.float64)
    condition = torch.randint(0, 4, (batch,), generator=generator)
    return x_t, t, s, condition, Tangent(along[:rows], along_t[:rows], along_s[:rows])


def assert_close(actual, expected, tolerance=1e-12):
    """Compare relative to the largest element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("block", [5, 256])
def test_jvp_equals_that_of_functional(network, rows, block, monkeypatch):
    """To 1e-12 in float64, for all or some rows, with attention in one block or in uneven blocks."""
    monkeypatch.setattr(attention_rule, "BLOCK", block)
    arguments = draw(network, 5, rows)
    exact = functional(network, *arguments).jvp
    assert len(exact) == rows
    assert exact.abs().max() > 0.1
    assert_close(dual(network, *arguments).jvp, exact)


def test_u_and_its_gradients_are_the_plain_forwards(network):
    """The value is the same to the bit, and so are the gradients of the weights and of x."""
    x_t, t, s, condition, tangent = draw(network, 5, 3)
    x_t.requires_grad_(True)
    leaves = [x_t, *(p for p in network.parameters() if p.requires_grad)]
    result = dual(network, x_t, t, s, condition, tangent)
    plain = network(x_t, t, s, condition)
    assert torch.equal(result.u, plain)
    expected = torch.autograd.grad(plain.square().sum(), leaves)
    for gradient, other in zip(torch.autograd.grad(result.u.square().sum(), leaves), expected, strict=True):
        assert_close(gradient, other)


def test_jvp_has_no_graph(network):
    """Losses treat it as a constant."""
    result = dual(network, *draw(network, 4, 3))
    assert result.u.requires_grad
    assert not result.jvp.requires_grad
    assert result.jvp.grad_fn is None


def test_the_network_runs_once_on_the_rows_of_the_tangent_alone(monkeypatch):
    """No tangent of a DiT is padded, so rows without a tangent have no extra cost."""
    network = make_dit()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    padded = []
    monkeypatch.setattr(Dual, "padded", lambda self: padded.append(len(self.primal)) or pad(self.tangent, self.primal))
    dual(network, *draw(network, 5, 3))
    assert calls == [1]
    # Only the final result is padded, before its rows are selected.
    assert padded == [5]


def test_float32_is_exact_up_to_rounding(network):
    """In float32 the relative error is about 1e-6."""
    x_t, t, s, condition, tangent = draw(network, 32, 32)
    exact = functional(network, x_t, t, s, condition, tangent).jvp
    narrow = Tangent(tangent.x.float(), tangent.t.float(), tangent.s.float())
    jvp = dual(copy.deepcopy(network).float(), x_t.float(), t.float(), s.float(), condition, narrow).jvp
    assert jvp.dtype == torch.float32
    assert (jvp - exact).norm() < 1e-5 * exact.norm()


def test_tangents_follow_autocast():
    """In bfloat16 the error of jvp is that of rounding, and u has the dtype of the plain forward pass."""
    network = make_dit().float()
    x_t, t, s, condition, tangent = draw(network, 16, 12)
    exact = functional(copy.deepcopy(network).double(), x_t, t, s, condition, tangent).jvp
    narrow = Tangent(tangent.x.float(), tangent.t.float(), tangent.s.float())
    with torch.autocast("cpu", torch.bfloat16):
        result = dual(network, x_t.float(), t.float(), s.float(), condition, narrow)
        assert torch.equal(result.u, network(x_t.float(), t.float(), s.float(), condition))
    assert (result.jvp - exact).norm() < 0.05 * exact.norm()
    result.u.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_without_a_tangent_it_is_the_plain_forward(network):
    """jvp is None."""
    x_t, t, s, condition, _ = draw(network, 4, 4)
    result = dual(network, x_t, t, s, condition, None)
    assert result.jvp is None
    assert torch.equal(result.u, network(x_t, t, s, condition))


def test_checkpointed_blocks_give_the_same_without_a_second_tangent(monkeypatch):
    """The recomputation in the backward pass is a plain forward pass."""
    network = make_dit()
    arguments = draw(network, 5, 3)
    expected = dual(network, *arguments)
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.u.square().sum(), parameters)
    for block in network.blocks:
        monkeypatch.setattr(block, "forward", checkpointed(block.forward))
    result = dual(network, *arguments)
    monkeypatch.setattr(torch, "_softmax_backward_data", lambda *_: pytest.fail("a tangent in the backward pass"))
    for gradient, other in zip(torch.autograd.grad(result.u.square().sum(), parameters), gradients, strict=True):
        assert torch.equal(gradient, other)
    assert torch.equal(result.jvp, expected.jvp)


def checkpointed(forward):
    """Return a block's forward with checkpointing."""
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def test_a_network_that_does_not_depend_on_its_inputs_has_no_change():
    """jvp is zero."""
    result = dual(
        lambda x, t, s, condition: torch.ones(4, 2),
        *(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4), None),
        Tangent(torch.ones(3, 2), torch.ones(3), torch.ones(3)),
    )
    assert torch.equal(result.jvp, torch.zeros(3, 2))


def test_without_gradients_it_is_a_pair_of_numbers(network):
    """The engine can be called under no_grad."""
    arguments = draw(network, 4, 3)
    with torch.no_grad():
        result = dual(network, *arguments)
    assert not result.u.requires_grad
    assert_close(result.jvp, functional(network, *arguments).jvp)


def test_tangents_are_freed_after_the_pass():
    """No tangent outlives the call, even if the network stores its activations."""
    kept = []

    def network(x, t, s, condition):
        kept.append(x * t[:, None])
        return kept[0]

    x, times = torch.randn(3, 2), torch.rand(3)
    dual(network, x, times, times, None, Tangent(x, times, times))
    assert kept[0].tangent is None


def test_a_tangent_is_shorter_on_one_axis_only():
    """A tangent that differs from its value on other axes means that a rule is wrong."""
    assert TangentRows.between(torch.zeros(2, 5, 3), torch.zeros(2, 4, 3)) == TangentRows(-2, 4, 5)
    assert TangentRows.between(torch.zeros(2, 3), torch.zeros(2, 3)) is None
    with pytest.raises(AssertionError):
        TangentRows.between(torch.zeros(2, 5), torch.zeros(1, 4))


def test_pytrees_find_the_tensors_of_duals():
    """FSDP2 and checkpointing look for tensors in pytrees."""
    value = Dual(torch.zeros(3), torch.ones(2), RuleSet())
    doubled = torch.utils._pytree.tree_map(lambda part: part + 1, value)
    assert isinstance(doubled, Dual)
    assert torch.equal(doubled.primal, torch.ones(3))
    assert torch.equal(doubled.tangent, torch.full((2,), 2.0))
