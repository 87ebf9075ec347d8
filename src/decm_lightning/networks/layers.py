"""Layers of a DiT: normalization, attention, feed-forward networks, and the adaLN-Zero block."""

from typing import Any, Literal, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Tokens = Float[Tensor, "b n d"]
Embedding = Float[Tensor, "b d"]
NormName: TypeAlias = Literal["rms", "layer"]
FeedForwardName: TypeAlias = Literal["swiglu", "gelu"]


def linear(inputs: int, outputs: int, std: float | None = None) -> nn.Linear:
    """Return a projection with zero bias and weights of standard deviation `std`, which may be 0; None for Xavier."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight) if std is None else nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def modulate(x: Tokens, scale: Embedding, shift: Embedding | None = None) -> Tokens:
    """Return x (1 + scale) + shift, with one scale and optionally one shift per sample."""
    scaled = x * (1 + scale[:, None])
    return scaled if shift is None else scaled + shift[:, None]


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, times a learned weight (arXiv 1910.07467).

    As in LightningDiT, the root mean square is computed in at least float32, and the weight is applied after casting
    back.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12(x) (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = linear(width, 2 * hidden)
        self.w3 = linear(hidden, width)

    def forward(self, x: Tokens) -> Tokens:
        """Return the tokens' update."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)


class GELUFeedForward(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh approximation of GELU (arXiv 1606.08415), as in DiT and SiT."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = linear(width, hidden)
        self.fc2 = linear(hidden, width)

    def forward(self, x: Tokens) -> Tokens:
        """Return the tokens' update."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


def norm_layer(name: NormName, width: int) -> nn.Module:
    """Return RMSNorm with a learned weight, or LayerNorm without one: DiT's modulation already scales and shifts."""
    return RMSNorm(width) if name == "rms" else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def feed_forward(name: FeedForwardName, width: int, ratio: float) -> nn.Module:
    """Return a feed-forward network with hidden width ratio * width, or 2 / 3 of that for SwiGLU."""
    return SwiGLU(width, int(2 / 3 * ratio * width)) if name == "swiglu" else GELUFeedForward(width, int(ratio * width))


class Rotary(nn.Module):
    """Rotary positions on a square grid (arXiv 2104.09864): half of each head encodes the row, half the column.

    Neighboring elements form the rotated pairs. The frequencies are 10000^(-2i / (d / 2)) for a head of size d.
    """

    def __init__(self, head_width: int, grid: int) -> None:
        super().__init__()
        half = head_width // 2
        # The order of operations is LightningDiT's: another one differs by 2e-6 at row 32.
        frequencies = 1 / 10_000 ** (torch.arange(0, half, 2).float() / half)
        angles = (torch.arange(grid).float()[:, None] * frequencies).repeat_interleave(2, dim=1)
        rows = angles[:, None, :].expand(grid, grid, -1)
        columns = angles[None, :, :].expand(grid, grid, -1)
        table = rearrange(torch.cat([rows, columns], -1), "row column d -> (row column) d")
        self.freqs_cos: Tensor
        self.freqs_sin: Tensor
        self.register_buffer("freqs_cos", table.cos())
        self.register_buffer("freqs_sin", table.sin())
        self.register_load_state_dict_pre_hook(_with_exact_tables)

    def forward(self, x: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b heads n d"]:
        """Return x rotated by the angles of each token's position."""
        even, odd = rearrange(x, "b heads n (pair two) -> two b heads n pair", two=2)
        turned = rearrange([-odd, even], "two b heads n pair -> b heads n (pair two)")
        return (x * self.freqs_cos + turned * self.freqs_sin).type_as(x)


def _with_exact_tables(rotary: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading, replace tables that were stored in a narrower type, and so were rounded, by the computed ones."""
    for name, table in rotary.named_buffers(recurse=False):
        found = state.get(prefix + name)
        if found is not None and found.dtype.itemsize < table.dtype.itemsize and not table.is_meta:
            state[prefix + name] = table


class Attention(nn.Module):
    """Self-attention with optional rotary positions and QK norm, an RMSNorm over each head (arXiv 2302.05442)."""

    def __init__(self, width: int, heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = linear(width, width)

    def forward(self, x: Tokens, rotary: Rotary | None) -> Tokens:
        """Return the tokens' update."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(mixed, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the embedding (adaLN-Zero, arXiv 2212.09748).

    Without `shift`, the embedding only scales and gates.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        qk_norm: bool = True,
        shift: bool = True,
        norm: NormName = "rms",
        mlp: FeedForwardName = "swiglu",
    ) -> None:
        super().__init__()
        self.parts = 3 if shift else 2
        self.norm1 = norm_layer(norm, width)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = norm_layer(norm, width)
        self.mlp = feed_forward(mlp, width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 2 * self.parts * width, 0.0))

    def forward(self, x: Tokens, embedding: Embedding, rotary: Rotary | None, checkpointed: bool = False) -> Tokens:
        """Return the updated tokens. With `checkpointed`, the backward pass recomputes the activations."""
        if checkpointed:
            return checkpoint(self.halves, x, embedding, rotary, use_reentrant=False)
        return self.halves(x, embedding, rotary)

    def halves(self, x: Tokens, embedding: Embedding, rotary: Rotary | None) -> Tokens:
        """Return the tokens after attention and the feed-forward network."""
        first, second = self.adaLN_modulation(embedding).chunk(2, dim=-1)
        *shift, scale, gate = first.chunk(self.parts, dim=-1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), scale, *shift), rotary)
        *shift, scale, gate = second.chunk(self.parts, dim=-1)
        return x + gate[:, None] * self.mlp(modulate(self.norm2(x), scale, *shift))


class FinalLayer(nn.Module):
    """The projection from tokens to patches, modulated by the embedding."""

    def __init__(self, width: int, patch_values: int, norm: NormName = "rms") -> None:
        super().__init__()
        self.norm_final = norm_layer(norm, width)
        self.linear = linear(width, patch_values, 0.0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 2 * width, 0.0))

    def forward(self, x: Tokens, embedding: Embedding) -> Float[Tensor, "b n p"]:
        """Return the flattened patches."""
        shift, scale = self.adaLN_modulation(embedding).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), scale, shift))
