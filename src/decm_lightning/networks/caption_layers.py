"""Layers of a caption-conditional DiT: the caption embedding, cross-attention, and the transformer block."""

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
    """Embedded captions, the input of the blocks: tokens, the first of which is learned, their mask, and a summary."""

    tokens: Tokens
    mask: Bool[Tensor, "b 1 1 n"]
    mean: Embedding


class CaptionEmbedding(nn.Module):
    """Project the tokens of a text encoder, prepend a learned token, and summarize each caption in one vector.

    The learned token is never masked. In a caption without tokens it is the only one, and the summary is computed from
    a mean of zero. This is how the network learns the null caption of classifier-free guidance.
    """

    def __init__(self, caption_width: int, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(caption_width)
        self.proj = linear(caption_width, width)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.summary = nn.Sequential(linear(caption_width, width, 0.02), nn.SiLU(), linear(width, width, 0.02))

    def forward(self, captions: Captions) -> Context:
        """Return the tokens, their mask and the summary. Masked tokens have no influence, even if they are NaN."""
        tokens = captions.tokens.to(self.proj.weight.dtype)
        mask = torch.ones_like(tokens[..., 0], dtype=torch.bool) if captions.mask is None else captions.mask
        # Multiplication by the mask would not remove NaN and infinity.
        tokens = self.norm(tokens.masked_fill(~mask[..., None], 0))
        mean = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), self.proj(tokens)], 1)
        return Context(tokens, functional.pad(mask, (1, 0), value=True)[:, None, None], self.summary(mean))


class CrossAttention(nn.Module):
    """Attention from image tokens to caption tokens, with normalized queries and keys and without positions."""

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
    """Self-attention, cross-attention to the caption, and SwiGLU, each shifted, scaled and gated by the embedding."""

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
        """Return the updated tokens. With `checkpointed`, the backward pass recomputes the activations."""
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
        """Return the tokens after self-attention, cross-attention and the MLP."""
        first, second, third = self.adaLN_modulation(embedding).chunk(3, dim=-1)
        shift, scale, gate = first.chunk(3, dim=-1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), scale, shift), rotary)
        shift, scale, gate = second.chunk(3, dim=-1)
        x = x + gate[:, None] * self.cross(modulate(self.norm2(x), scale, shift), captions, mask)
        shift, scale, gate = third.chunk(3, dim=-1)
        return x + gate[:, None] * self.mlp(modulate(self.norm3(x), scale, shift))
