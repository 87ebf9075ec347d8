"""Infer from its output what a network predicts, because the tensors of SiT and DiT have the same names and shapes."""

from typing import Literal

import torch

from decm_lightning.networks import Network
from decm_lightning.path import NOISE

Prediction = Literal["velocity", "noise"]
LAST_STEP = 999.0
"""The noisiest step of DDPM."""
CLEAR = 0.8
"""The absolute correlation above which a result is clear. At times not seen in training, any value may occur."""


def prediction_of(network: Network) -> Prediction | None:
    """Return what a trained network predicts; None if that is unclear, for example for random weights.

    The network is evaluated on pure noise x_0. A velocity at t = 0 is E[x_1] - x_0, whose correlation with x_0 is near
    -1. DDPM's noise at the last step is x_0, with a correlation near 1. The part of the output that does not depend on
    x_0, such as the mean of the data, is subtracted first.
    """
    is_velocity, is_noise = _correlation(network, NOISE) < -CLEAR, _correlation(network, LAST_STEP) > CLEAR
    if is_velocity == is_noise:
        return None
    return "velocity" if is_velocity else "noise"


@torch.no_grad()
def _correlation(network: Network, time: float) -> float:
    parameter = next(network.parameters())
    x_0 = torch.randn(1, *network.sample_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    # The constant part cancels in the difference of the outputs at x_0 and -x_0.
    pair = torch.cat([x_0, -x_0])
    times = torch.full((2,), time, dtype=pair.dtype, device=pair.device)
    labels = network.null(torch.zeros(2, dtype=torch.long, device=pair.device))
    first, second = network(pair, times, times, labels)
    return torch.nn.functional.cosine_similarity((first - second).flatten(), x_0.flatten(), dim=0).item()
