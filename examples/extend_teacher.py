"""A teacher of your own: a network with another clock, another sign, and no end time.

    python examples/extend_teacher.py

`NoiseFirst` stands for a network from elsewhere. Its time tau is 1 at the noise and 0 at the data, and it predicts
noise minus data, as many diffusion models do. `FlowMap` converts both and has an end time.
"""

import copy

import torch
from torch import Tensor, nn

from decm_lightning.networks import MLP, Network
from decm_lightning.teachers import Teacher
from decm_lightning.types import Condition


class NoiseFirst(nn.Module):
    """A network of the foreign convention: points (b, 2) and times tau, (b,)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        """Return noise minus data, (b, 2)."""
        return self.layers(torch.cat([x, tau[:, None]], 1))


class FlowMap(Network):
    """The foreign network as a flow map u(x_t, t, s): its output, plus a network of x_t, t and s that starts at zero.

    Args:
        foreign: the network; None for one with random weights.
    """

    num_classes = 0
    sample_shape = (2,)

    def __init__(self, foreign: NoiseFirst | None = None) -> None:
        super().__init__()
        self.config: dict[str, object] = {}  # the arguments that `save` writes
        self.foreign = foreign or NoiseFirst()
        self.end = MLP(2)
        nn.init.zeros_(self.end.end.weight)
        nn.init.zeros_(self.end.end.bias)

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """Return u, (b, 2): time and sign are converted here, once."""
        return self.end(x_t, t, s, condition) - self.foreign(x_t, 1 - t)

    def with_end_time(self) -> "FlowMap":
        """Return a trainable copy, which equals this network at first."""
        return copy.deepcopy(self).requires_grad_(True)


class LateTeacher(Teacher):
    """The frozen teacher. `velocity`, `student`, `identity` and the rest follow from its network.

    Args:
        weights: a file that torch.load reads, with the state dict of `NoiseFirst`; None for random weights.
    """

    def __init__(self, weights: str | None = None) -> None:
        foreign = NoiseFirst()
        if weights is not None:
            foreign.load_state_dict(torch.load(weights, weights_only=True))
        super().__init__(FlowMap(foreign))


def main() -> tuple[Tensor, Tensor]:
    """Compare the student's u(x_t, t, s) with the teacher's velocity: equal for every s before training."""
    torch.manual_seed(0)
    teacher = LateTeacher()
    student = teacher.student()
    x_t, t, s = torch.randn(5, 2), torch.rand(5), torch.ones(5)
    v, u = teacher(x_t, t, None), student(x_t, t, s, None)
    print(f"largest difference: {(u - v).abs().max():.1e}")
    return u, v


if __name__ == "__main__":
    main()
