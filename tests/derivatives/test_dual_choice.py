"""How an engine is chosen: by what passes through the network, with reasons, and without touching it."""

import pytest
import torch
from torch import nn

from decm_lightning.derivatives import NoTangentError, Tangent, central, choose, dual
from decm_lightning.networks import MLP, DiT


class InPlace(nn.Module):
    """An operation in place: the dual engine refuses it, functorch does not."""

    def forward(self, x):
        return (x * 2).add_(1)


class Doubled(torch.autograd.Function):
    """A function with a backward pass and no forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class OwnFunction(nn.Module):
    """What only a difference can pass through."""

    def forward(self, x):
        return Doubled.apply(x)


class Holder(nn.Module):
    """A network with an odd layer in its middle."""

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
    """By their own example, and the network is left as it was."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    choice = choose(network, network.example())
    assert (choice.name, choice.engine) == ("dual", dual)
    assert choice.reason.startswith("derivative dual: exact")
    assert all(
        value.device.type == "cpu" and torch.equal(value, before[n]) for n, value in network.state_dict().items()
    )


def test_the_next_engine_is_taken_and_the_reason_names_operation_and_layer():
    """An operation in place leaves torch.func.jvp."""
    choice = choose(Holder(InPlace()), EXAMPLE)
    assert choice.name == "functional"
    assert all(word in choice.reason for word in ("not dual", "add_", "in layer blocks.1"))


def test_an_operation_without_a_rule_is_no_reason_to_trust_the_rest():
    """Before the operation that is refused comes one that forward mode differentiates."""

    class Cumulative(nn.Module):
        def forward(self, x):
            return x.cumsum(-1).add_(1)

    choice = choose(Holder(Cumulative()), EXAMPLE)
    assert choice.name == "functional"
    assert "add_" in choice.reason


def test_code_that_wants_a_tensor_leaves_the_next_engine():
    """A dual is none: what its code then raises is the reason."""

    class Strict(nn.Module):
        def forward(self, x):
            assert isinstance(x, torch.Tensor), "no tensor"
            return x * x

    choice = choose(Holder(Strict()), EXAMPLE)
    assert choice.name == "functional"
    assert "AssertionError: no tensor" in choice.reason


def test_the_difference_is_as_fine_as_the_network_embeds_times():
    """Times multiplied by 1000 need a step of 1e-4: with that of a smooth network jvp is another's."""

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
    """An autograd.Function without forward mode leaves the central difference."""
    choice = choose(Holder(OwnFunction()), EXAMPLE)
    assert choice.name == "central"
    assert "not dual" in choice.reason
    assert "not functional" in choice.reason


def test_no_engine_is_an_error():
    """In bfloat16 there is no difference either."""
    with pytest.raises(ValueError, match=r"no engine can be used: .*central: .*float32"):
        choose(Holder(OwnFunction()).bfloat16(), EXAMPLE)


def test_a_requested_engine_that_fails_is_an_error_that_names_one_that_works():
    """Nothing is replaced silently."""
    with pytest.raises(ValueError, match=r"derivative dual cannot be used: .*add_.* layer blocks.1.*functional"):
        choose(Holder(InPlace()), EXAMPLE, "dual")
    assert choose(Holder(InPlace()), EXAMPLE, "functional").name == "functional"
    assert choose(Holder(InPlace()), EXAMPLE, "central").name == "central"


def test_the_running_dual_engine_names_the_layer_too():
    """The same error, met in a pass with numbers."""
    x, t = torch.randn(2, 3), torch.rand(2)
    with pytest.raises(NoTangentError, match=r"add_.*in layer blocks.1"):
        dual(Holder(InPlace()), x, t, t, None, Tangent(x, t, t))


def test_check_finite_stops_at_the_first_tangent_that_is_not_finite():
    """sqrt at 0 has the value 0 and an infinite tangent: the value alone would not show it."""

    class Root(nn.Module):
        def forward(self, x):
            return torch.sqrt(x - x)

    network, t = Holder(Root()), torch.rand(2)
    x = torch.randn(2, 3)
    with pytest.raises(NoTangentError, match=r"sqrt .*in layer blocks.1"):
        dual(network, x, t, t, None, Tangent(x, t, t), check_finite=True)


def test_a_network_that_looks_at_numbers_is_taken_on_trust():
    """It cannot be run on shapes alone."""

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert choose(Holder(Branch()), EXAMPLE).name == "dual"
