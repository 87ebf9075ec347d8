"""Selection of an engine: the first that supports the network, with reasons, and without changing the network."""

import pytest
import torch
from torch import nn

from decm_lightning.derivatives import NoTangentError, Tangent, central, choose, dual
from decm_lightning.networks import MLP, DiT


class InPlace(nn.Module):
    """An in-place operation, which the dual engine refuses and functorch supports."""

    def forward(self, x):
        return (x * 2).add_(1)


class Doubled(torch.autograd.Function):
    """A function with a backward pass but without forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class OwnFunction(nn.Module):
    """A layer that supports only central differences."""

    def forward(self, x):
        return Doubled.apply(x)


class Holder(nn.Module):
    """A network with an unusual layer in the middle."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), odd, nn.Linear(3, 3)])
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, x_t, t, s, condition):
        x = x_t + t[:, None] * s[:, None] + self.offset
        for block in self.blocks:
            x = block(x)
        return x


EXAMPLE = (torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), None)


@pytest.mark.parametrize(
    "network", [MLP(2, 8, 2, num_classes=3), DiT(4, 1, patch_size=2, width=16, depth=1, heads=2, num_classes=3)]
)
def test_our_networks_have_the_dual_engine(network):
    """With their own example; the network is not changed."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    choice = choose(network, network.example())
    assert (choice.name, choice.engine) == ("dual", dual)
    assert choice.reason.startswith("derivative dual: exact")
    assert all(
        value.device.type == "cpu" and torch.equal(value, before[n]) for n, value in network.state_dict().items()
    )


def test_the_next_engine_is_selected_and_the_reason_names_operation_and_layer():
    """With an in-place operation torch.func.jvp is selected."""
    choice = choose(Holder(InPlace()), EXAMPLE)
    assert choice.name == "functional"
    assert all(word in choice.reason for word in ("not dual", "add_", "in layer blocks.1"))


def test_operations_after_one_without_a_rule_are_checked_too():
    """The operation before the refused one is differentiated by forward mode."""

    class Cumulative(nn.Module):
        def forward(self, x):
            return x.cumsum(-1).add_(1)

    choice = choose(Holder(Cumulative()), EXAMPLE)
    assert choice.name == "functional"
    assert "add_" in choice.reason


def test_code_that_requires_a_tensor_selects_the_next_engine():
    """A dual is not a torch.Tensor, and the error of the network's code is the reason."""

    class Strict(nn.Module):
        def forward(self, x):
            assert isinstance(x, torch.Tensor), "no tensor"
            return x * x

    choice = choose(Holder(Strict()), EXAMPLE)
    assert choice.name == "functional"
    assert "AssertionError: no tensor" in choice.reason


def test_the_step_of_the_difference_follows_the_time_scale():
    """An embedding of 1000 t needs a step of 1e-4: with the default step jvp is wrong."""

    class Thousand(nn.Module):
        time_scale = 1000.0

        def forward(self, x_t, t, s, condition):
            return Doubled.apply(x_t * (1000 * t).sin()[:, None])

    x, t = torch.randn(2, 3), torch.tensor([0.3, 0.8])
    still = torch.zeros(2)
    choice = choose(Thousand(), EXAMPLE)
    assert choice.name == "central"
    exact = 2 * x * 1000 * (1000 * t.double()).cos().float()[:, None]
    for engine, close in ((choice.engine, True), (central, False)):
        jvp = engine(Thousand(), x, t, t, None, Tangent(torch.zeros_like(x), torch.ones(2), still)).jvp
        assert ((jvp - exact).norm() < 0.01 * exact.norm()) == close


def test_the_difference_is_the_last_resort():
    """With an autograd.Function without forward mode the central difference is selected."""
    choice = choose(Holder(OwnFunction()), EXAMPLE)
    assert choice.name == "central"
    assert "not dual" in choice.reason
    assert "not functional" in choice.reason


def test_no_engine_is_an_error():
    """Central differences do not support bfloat16 either."""
    with pytest.raises(ValueError, match=r"central: .*float32"):
        choose(Holder(OwnFunction()).bfloat16(), EXAMPLE)


def test_a_requested_engine_that_fails_is_an_error_that_names_one_that_works():
    """Another engine is never used silently."""
    with pytest.raises(ValueError, match=r"add_.*blocks.1.*functional"):
        choose(Holder(InPlace()), EXAMPLE, "dual")
    assert choose(Holder(InPlace()), EXAMPLE, "functional").name == "functional"
    assert choose(Holder(InPlace()), EXAMPLE, "central").name == "central"


def test_the_running_dual_engine_names_the_layer_too():
    """The same error in a pass with values."""
    x, t = torch.randn(2, 3), torch.rand(2)
    with pytest.raises(NoTangentError, match=r"add_.*in layer blocks.1"):
        dual(Holder(InPlace()), x, t, t, None, Tangent(x, t, t))


def test_check_finite_stops_at_the_first_tangent_that_is_not_finite():
    """sqrt at 0 has a finite value and an infinite tangent."""

    class Root(nn.Module):
        def forward(self, x):
            return torch.sqrt(x - x)

    network, t = Holder(Root()), torch.rand(2)
    x = torch.randn(2, 3)
    with pytest.raises(NoTangentError, match=r"sqrt .*in layer blocks.1"):
        dual(network, x, t, t, None, Tangent(x, t, t), check_finite=True)


def test_the_engine_of_a_network_that_reads_values_is_not_checked():
    """It cannot run on meta tensors."""

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert choose(Holder(Branch()), EXAMPLE).name == "dual"
