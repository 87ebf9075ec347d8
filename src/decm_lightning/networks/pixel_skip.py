"""A last look at whole pixels, for transformers whose patches are large."""

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import silu

from decm_lightning.networks.layers import Embedding, linear
from decm_lightning.types import Sample


class PixelSkipHead(nn.Module):
    """What the blocks made, plus gain x_t, plus three 3 x 3 convolutions of both; gain and features by the embedding.

    A velocity E[x_1] - x_0 holds all of the noise, which does not fit through tokens of hardly more values than a patch
    has, and patches that do not see each other leave seams (as U-ViT found: arXiv 2209.12152, section 3.1). Here noise
    has a way past the blocks, and neighbouring pixels meet. At first it adds nothing.

    Args:
        channels: those of x_t and of the velocity.
        width: size of the embedding.
        features: channels between the convolutions.
    """

    def __init__(self, channels: int, width: int, features: int) -> None:
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
        """Return u, (b, c, h, w), of what the blocks made of x_t."""
        modulation = rearrange(self.modulation(embedding), "b d -> b d 1 1")
        gain, shift, scale = modulation.split(self.sizes, dim=1)
        features = self.enter(torch.cat([image, x_t.to(image.dtype)], 1)) * (1 + scale) + shift
        return image + gain * x_t + self.leave(silu(self.inner(silu(features))))
