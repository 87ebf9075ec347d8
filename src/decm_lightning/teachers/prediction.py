"""What a network predicts, found from its output: the tensors of SiT and DiT have the same names and shapes."""

from typing import Literal

import torch

from decm_lightning.networks import Network
from decm_lightning.path import NOISE

Prediction = Literal["velocity", "noise"]
LAST_STEP = 999.0
"""The noisiest step of DDPM."""
CLEAR = 0.8
"""A correlation beyond this, toward -1 or 1, is clear; at times outside its training any value may occur."""


def prediction_of(network: Network) -> Prediction | None:
    """Return what a trained network predicts from pure noise x_0; None if that is not clear, as for random weights.

    A velocity is E[x_1] - x_0 at t = 0: its correlation with x_0 is near -1. A prediction of DDPM's noise is x_0 itself
    at the last step: near 1. What does not depend on x_0, such as the mean of the data, is subtracted first.
    """
    is_velocity, is_noise = _correlation(network, NOISE) < -CLEAR, _correlation(network, LAST_STEP) > CLEAR
    if is_velocity == is_noise:
        return None
    return "velocity" if is_velocity else "noise"


@torch.no_grad()
def _correlation(network: Network, time: float) -> float:
    parameter = next(network.parameters())
    x_0 = torch.randn(1, *network.sample_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    # The difference of the outputs at x_0 and -x_0 has no constant part.
    pair = torch.cat([x_0, -x_0])
    times = torch.full((2,), time, dtype=pair.dtype, device=pair.device)
    labels = network.null(torch.zeros(2, dtype=torch.long, device=pair.device))
    first, second = network(pair, times, times, labels)
    return torch.nn.functional.cosine_similarity((first - second).flatten(), x_0.flatten(), dim=0).item()
