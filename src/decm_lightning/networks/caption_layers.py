"""What makes a DiT read captions: their tokens made fit for it, attention to them, and the block around all."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from decm_lightning.networks.layers import Attention, Embedding, RMSNorm, Rotary, SwiGLU, Tokens, linear, modulate
from decm_lightning.types import Captions


class Context(NamedTuple):
    """Captions as the blocks read them.

    Attributes:
        tokens: (b, 1 + n, width), the learnt token first.
        mask: true where a token is attended to, (b, 1, 1, 1 + n).
        mean: one vector for each caption, (b, width).
    """

    tokens: Tokens
    mask: Bool[Tensor, "b 1 1 n"]
    mean: Embedding


class CaptionEmbedding(nn.Module):
    """Projects a text encoder's tokens, puts a learnt token before them, and sums them up in one vector.

    The learnt token is always attended to. In a caption without tokens it is the only one, and the summary is that of
    a mean of zero: the null caption of classifier-free guidance is learnt by both.
    """

    def __init__(self, caption_width: int, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(caption_width)
        self.proj = linear(caption_width, width)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.summary = nn.Sequential(linear(caption_width, width, 0.02), nn.SiLU(), linear(width, width, 0.02))

    def forward(self, captions: Captions) -> Context:
        """Return the tokens, which of them are there, and the summary; what is masked is not read at all."""
        tokens = captions.tokens.to(self.proj.weight.dtype)
        mask = torch.ones_like(tokens[..., 0], dtype=torch.bool) if captions.mask is None else captions.mask
        # Zero times a masked token would do, but for one that is not finite.
        tokens = self.norm(tokens.masked_fill(~mask[..., None], 0))
        mean = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), self.proj(tokens)], 1)
        return Context(tokens, functional.pad(mask, (1, 0), value=True)[:, None, None], self.summary(mean))


class CrossAttention(nn.Module):
    """Attention from image tokens to caption tokens, which have no positions here, with normalized queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = linear(width, width)
        self.kv = linear(width, 2 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = linear(width, width)

    def forward(self, x: Tokens, captions: Float[Tensor, "b m d"], mask: Bool[Tensor, "b 1 1 m"]) -> Tokens:
        """Return the image tokens' update."""
        q = rearrange(self.q(x), "b n (heads d) -> b heads n d", heads=self.heads)
        k, v = rearrange(self.kv(captions), "b m (two heads d) -> two b heads m d", two=2, heads=self.heads)
        mixed = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=mask)
        return self.proj(rearrange(mixed, "b heads n d -> b n (heads d)"))


class CaptionBlock(nn.Module):
    """Self-attention, attention to the caption, and SwiGLU, each shifted, scaled and gated by the embedding."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.cross = CrossAttention(width, heads)
        self.norm3 = RMSNorm(width)
        self.mlp = SwiGLU(width, int(2 / 3 * mlp_ratio * width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 9 * width, 0.0))

    def forward(
        self,
        x: Tokens,
        embedding: Embedding,
        rotary: Rotary,
        captions: Float[Tensor, "b m d"],
        mask: Bool[Tensor, "b 1 1 m"],
        checkpointed: bool = False,
    ) -> Tokens:
        """Return the tokens after all three; `checkpointed` keeps nothing in between for the backward pass."""
        if checkpointed:
            return checkpoint(self.thirds, x, embedding, rotary, captions, mask, use_reentrant=False)
        return self.thirds(x, embedding, rotary, captions, mask)

    def thirds(
        self,
        x: Tokens,
        embedding: Embedding,
        rotary: Rotary,
        captions: Float[Tensor, "b m d"],
        mask: Bool[Tensor, "b 1 1 m"],
    ) -> Tokens:
        """Return the tokens after self-attention, then attention to the caption, then the MLP."""
        first, second, third = self.adaLN_modulation(embedding).chunk(3, dim=-1)
        shift, scale, gate = first.chunk(3, dim=-1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), scale, shift), rotary)
        shift, scale, gate = second.chunk(3, dim=-1)
        x = x + gate[:, None] * self.cross(modulate(self.norm2(x), scale, shift), captions, mask)
        shift, scale, gate = third.chunk(3, dim=-1)
        return x + gate[:, None] * self.mlp(modulate(self.norm3(x), scale, shift))
