"""LightningDiT's output computed from its formulas, without any module of the package."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


class Formulas:
    """The network with given weights, for patch size 1, in float64."""

    def __init__(self, weights: dict[str, Tensor], head_width: int) -> None:
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.head_width = head_width

    def dense(self, name, h):
        return h @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def rms(self, name, h):
        # Without weights, there is no norm.
        weight = self.w.get(f"{name}.weight")
        return h if weight is None else h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def embed(self, name, time):
        angles = time.double()[:, None] * 10_000 ** -(torch.arange(128, dtype=torch.float64) / 128)
        hidden = self.dense(f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
        return self.dense(f"{name}.mlp.2", F.silu(hidden))

    def turn(self, h):
        """Multiply each pair of neighbors, as a complex number, by e^(i angle)."""
        half, grid = self.head_width // 2, math.isqrt(h.shape[-2])
        frequencies = 10_000 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
        row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        angles = torch.cat([row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies], 1)
        pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def attn(self, name, h):
        q, k, v = self.dense(f"{name}.qkv", h).unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        q, k = self.turn(self.rms(f"{name}.q_norm", q)), self.turn(self.rms(f"{name}.k_norm", k))
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(self.head_width)).softmax(-1) @ v
        return self.dense(f"{name}.proj", mixed.transpose(1, 2).flatten(2))

    def mlp(self, name, h):
        gate, value = self.dense(f"{name}.w12", h).chunk(2, -1)
        return self.dense(f"{name}.w3", F.silu(gate) * value)

    def block(self, name, h, c):
        parts = self.dense(f"{name}.adaLN_modulation.1", F.silu(c))[:, None].split(h.shape[-1], -1)
        if len(parts) == 4:
            parts = (0, *parts[:2], 0, *parts[2:])
        for update, norm, (shift, scale, gate) in (("attn", "norm1", parts[:3]), ("mlp", "norm2", parts[3:])):
            inner = self.rms(f"{name}.{norm}", h) * (1 + scale) + shift
            h = h + gate * getattr(self, update)(f"{name}.{update}", inner)
        return h

    def output(self, x, t, labels, s=None):
        c = self.embed("t_embedder", t) + self.w["y_embedder.embedding_table.weight"][labels]
        if s is not None:
            c = c + self.embed("r_embedder", s)
        h = torch.einsum("bcn,dc->bnd", x.double().flatten(2), self.w["x_embedder.proj.weight"][..., 0, 0])
        h = h + self.w["x_embedder.proj.bias"] + self.w["pos_embed"]
        for i in range(sum(name.endswith("w3.weight") for name in self.w)):
            h = self.block(f"blocks.{i}", h, c)
        shift, scale = self.dense("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
        u = self.dense("final_layer.linear", self.rms("final_layer.norm_final", h) * (1 + scale) + shift)
        return u.transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.fixture
def reference() -> Callable[..., Tensor]:
    """A function from weights, x_t, t, labels, the head width and optionally s to the output."""
    return lambda weights, x, t, labels, head_width, s=None: Formulas(weights, head_width).output(x, t, labels, s)
