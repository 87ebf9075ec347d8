"""A convolutional output head with a skip connection from the pixels, for transformers with large patches."""

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import silu

from decm_lightning.networks.layers import Embedding, linear
from decm_lightning.types import Sample


class PixelSkipHead(nn.Module):
    """Return u + gain x_t + conv(u, x_t) for the output u of the blocks, with three 3 x 3 convolutions.

    The embedding (b, width) determines the gain and modulates the features. A velocity E[x_1] - x_0 contains all of the
    noise, which tokens with hardly more values than a patch cannot carry, and independent patches leave seams (see
    U-ViT, arXiv 2209.12152, section 3.1). This head lets the noise bypass the blocks and connects neighboring pixels.
    It initially adds zero.
    """

    def __init__(self, channels: int, width: int, features: int = 16) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2 * channels, features, 3, padding=1)
        self.inner = nn.Conv2d(features, features, 3, padding=1)
        self.leave = nn.Conv2d(features, channels, 3, padding=1)
        self.modulation = nn.Sequential(nn.SiLU(), linear(width, channels + 2 * features, 0.0))
        self.sizes = [channels, features, features]
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, image: Sample, x_t: Sample, embedding: Embedding) -> Sample:
        """Return the velocity (b, c, h, w), given the output `image` of the blocks."""
        modulation = rearrange(self.modulation(embedding), "b d -> b d 1 1")
        gain, shift, scale = modulation.split(self.sizes, dim=1)
        features = self.enter(torch.cat([image, x_t.to(image.dtype)], 1)) * (1 + scale) + shift
        return image + gain * x_t + self.leave(silu(self.inner(silu(features))))
