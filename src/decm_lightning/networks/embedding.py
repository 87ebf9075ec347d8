"""Embeddings of patches, times, classes and grid positions."""

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from decm_lightning.networks.layers import linear
from decm_lightning.types import Time


class PatchEmbedding(nn.Module):
    """Project each square patch of an image to one token."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Return the tokens in row-major order."""
        return rearrange(self.proj(x.to(self.proj.weight.dtype)), "b d h w -> b (h w) d")


class TimeEmbedding(nn.Module):
    """An MLP on sinusoids of a time in [0, 1]: cosines first, with periods from 2 pi to 2 pi * 10,000.

    The time is not multiplied by 1000: an embedding that is smooth over [0, 1] keeps the derivative in t small.
    The sinusoids are computed in the dtype of the time, which is float32 even if the weights are narrower. With
    `zero_output` the embedding is initially 0 for every time.
    """

    def __init__(self, width: int, sinusoids: int = 256, zero_output: bool = False) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        output = linear(width, width, 0.0 if zero_output else 0.02)
        self.mlp = nn.Sequential(linear(sinusoids, width, 0.02), nn.SiLU(), output)

    def forward(self, t: Time) -> Float[Tensor, "b d"]:
        """Return the embedding of each time."""
        half = self.sinusoids // 2
        exponents = torch.arange(half, dtype=t.dtype, device=t.device) / half
        angles = t[:, None] * torch.exp(-math.log(10_000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(next(self.mlp.parameters()).dtype))


class ClassEmbedding(nn.Module):
    """An embedding table of the classes; its last row is the null class of classifier-free guidance."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Return the embedding of each label."""
        return self.embedding_table(labels)


def sin_cos_positions(width: int, grid: int) -> Float[Tensor, "1 n d"]:
    """Return fixed sine and cosine embeddings of a square grid: columns in the first half of the width, then rows."""
    frequencies = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], -1)
    columns = line[None, :, :].expand(grid, grid, -1)
    rows = line[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], -1).reshape(1, grid * grid, width).float()
