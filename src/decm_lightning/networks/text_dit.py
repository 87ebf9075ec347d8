"""A caption-conditional diffusion transformer: a DiT with cross-attention to the caption in each block."""

import torch
from einops import rearrange
from torch import nn

from decm_lightning.networks.caption_layers import CaptionBlock, CaptionEmbedding
from decm_lightning.networks.dit import check_sizes, check_width
from decm_lightning.networks.embedding import PatchEmbedding, TimeEmbedding, sin_cos_positions
from decm_lightning.networks.layers import FinalLayer, Rotary
from decm_lightning.networks.network import Network, arguments
from decm_lightning.networks.pixel_skip import PixelSkipHead
from decm_lightning.types import Captions, Condition, Sample, Time


class TextDiT(Network):
    """A DiT u(x_t, t, s, captions) on square images or latents, with cross-attention in its adaLN-Zero blocks.

    It differs from `DiT` in the condition. Image tokens attend to the caption tokens in each block, as in PixArt (arXiv
    2310.00426), and a summary of the caption is added to the embeddings of t and s. Masked tokens have no influence. A
    learned token is prepended to every caption; in the null caption it is the only token. `Captions.pooled` is ignored.
    Weights are initialized as in `DiT`, so a student initialized from a teacher equals the teacher for every s.

    Example:
        >>> network = TextDiT(8, 3, caption_width=16, patch_size=2, width=32, depth=2, heads=2)
        >>> x_t, t, s, captions = network.example(rows=4)
        >>> network(x_t, t, s, captions).shape
        torch.Size([4, 3, 8, 8])

    Args:
        input_size: height and width of the input, a multiple of patch_size.
        in_channels: channels of the input and of the velocity.
        caption_width: size of a caption token of the text encoder.
        patch_size: side of the square patch that becomes one token.
        width: width of a token, a multiple of 4 and of heads, with width / heads a multiple of 4. Without features, at
            least patch_size^2 * in_channels: a narrower token cannot carry the noise of its patch.
        depth: number of blocks, at least 1.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP relative to `width`, before the factor 2 / 3 of SwiGLU.
        features: channels of a `PixelSkipHead`, for large patches such as 8 x 8 pixels; 0 for no head.
        end_time: embed the end time s; otherwise s is ignored.
        text_encoder: name of the text encoder of the training captions, such as "minilm" (see `text.named_encoder`);
            `generate` uses it by default.

    Raises:
        ValueError: if a size is below 1 or not divisible as described, or the width is too small.
    """

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        caption_width: int,
        patch_size: int = 4,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        features: int = 0,
        end_time: bool = False,
        text_encoder: str | None = None,
    ) -> None:
        config = arguments(locals())
        super().__init__()
        self.config = config
        check_sizes(input_size, in_channels, patch_size, width, depth, heads)
        if not features:
            check_width(width, patch_size, in_channels, "features: 32")
        self.sample_shape = (in_channels, input_size, input_size)
        self.num_classes = 0
        self.caption_width = caption_width
        self.side = input_size // patch_size
        self.patch_size = patch_size
        self.x_embedder = PatchEmbedding(in_channels, width, patch_size)
        self.t_embedder = TimeEmbedding(width)
        self.r_embedder = TimeEmbedding(width, zero_output=True) if end_time else None
        self.caption_embedder = CaptionEmbedding(caption_width, width)
        self.pos_embed = nn.Parameter(sin_cos_positions(width, self.side), requires_grad=False)
        self.feat_rope = Rotary(width // heads, self.side)
        self.blocks = nn.ModuleList(CaptionBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size * patch_size * in_channels)
        self.pixel_skip = PixelSkipHead(in_channels, width, features) if features else None

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), (b, in_channels, input_size, input_size).

        Raises:
            ValueError: if the condition is not Captions with tokens of size caption_width.
        """
        captions = self.checked(condition)
        context = self.caption_embedder(captions)
        embedding = self.t_embedder(t) + context.mean
        if self.r_embedder is not None:
            embedding = embedding + self.r_embedder(s)
        tokens = self.x_embedder(x_t) + self.pos_embed
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            tokens = block(tokens, embedding, self.feat_rope, context.tokens, context.mask, checkpointed)
        patches = self.final_layer(tokens, embedding)
        sizes = {"h": self.side, "p": self.patch_size, "q": self.patch_size}
        u = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", **sizes)
        return (u if self.pixel_skip is None else self.pixel_skip(u, x_t, embedding)).to(x_t.dtype)

    def checked(self, condition: Condition) -> Captions:
        """Return the condition after checking that it matches this network.

        Raises:
            ValueError: if it does not.
        """
        if not isinstance(condition, Captions):
            found = "None" if condition is None else f"labels {tuple(condition.shape)}"
            raise ValueError(f"TextDiT needs Captions, or network.null(captions) for unconditional rows: got {found}")
        if condition.tokens.shape[-1] != self.caption_width:
            shape = tuple(condition.tokens.shape)
            raise ValueError(
                f"caption tokens must be (b, n, {self.caption_width}): got {shape}, use the network's text encoder"
            )
        return condition

    def null(self, condition: Condition) -> Condition:
        """Return the captions with all tokens masked, so that only the learned token remains.

        Raises:
            ValueError: if the condition is not Captions, or has no mask.
        """
        captions = self.checked(condition)
        if captions.mask is None:
            raise ValueError("a null caption needs a mask: pass Captions with a mask that is true everywhere")
        return captions._replace(mask=torch.zeros_like(captions.mask))

    def example(self, rows: int = 2) -> tuple[Sample, Time, Time, Condition]:
        """Return example arguments of the forward pass: zeros of the right shapes."""
        x_t = next(self.parameters()).new_zeros(rows, *self.sample_shape)
        times = torch.full((rows,), 0.5, device=x_t.device)
        captions = Captions(x_t.new_zeros(rows, 2, self.caption_width), x_t.new_ones(rows, 2, dtype=torch.bool))
        return x_t, times, times, captions

    def units(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.blocks)

    def with_end_time(self) -> "TextDiT":
        """Return a copy that also embeds s and initially equals this network for every s."""
        student = TextDiT(**(self.config | {"end_time": True}))
        own = self.state_dict()
        student.load_state_dict(own if self.r_embedder is not None else student.state_dict() | own)
        return student.to(self.pos_embed)
