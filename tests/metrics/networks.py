"""Feature networks for tests: a small one with all the metrics of Inception, and random weights for Inception."""

import torch
from torch import Tensor, nn

from decm_lightning.metrics import FeatureNetwork
from decm_lightning.metrics.metric import KID, FeatureMetric, Frechet, InceptionScore, PrecisionRecall


class Small(FeatureNetwork):
    """Fixed random mixtures of the pixels, with the outputs and metrics of Inception."""

    name = "small mixtures"
    num_features = 6
    samples = 44

    def __init__(self, pixels: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, size in (("pool", 6), ("spatial", 5), ("logits", 4)):
            mixture = torch.randn(pixels, size, generator=generator, dtype=torch.float64)
            self.register_buffer(name, mixture / pixels**0.5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = images.flatten(1).double() / 64
        return {"pool": x @ self.pool, "spatial": x @ self.spatial, "logits": x @ self.logits}

    def metrics(self) -> list[FeatureMetric]:
        return [
            Frechet("fid", "pool", 6, moments="pool"),
            Frechet("sfid", "spatial", 5, moments="spatial", in_validation=False),
            InceptionScore("inception_score", "logits", 4),
            PrecisionRecall("pool"),
            KID("kid", "pool", 6),
        ]


COLUMNS = ["fid", "sfid", "inception_score", "precision", "recall", "kid"]


@torch.no_grad()
def seeded(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return nontrivial weights for a network of convolutions and batch normalizations.

    The weights are generated in the order of their names, so networks with the same names have the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in sorted(network.state_dict().items()):
        if not value.is_floating_point():
            state[name] = value
        elif value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 0.75 + 0.5 * torch.rand(value.shape, generator=generator)
        else:
            state[name] = 0.1 * torch.randn(value.shape, generator=generator)
    return state


def uint8_images(number: int, side: int, generator: torch.Generator, channels: int = 3) -> Tensor:
    """Return noise as images (number, channels, side, side)."""
    return torch.randint(256, (number, channels, side, side), generator=generator, dtype=torch.uint8)
