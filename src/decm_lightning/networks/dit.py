"""A diffusion transformer with a second time: the student, and without the second time the teacher.

Submodules and parameters are named as in LightningDiT (arXiv 2501.01423) and SiT (arXiv 2401.08740), so that their
public checkpoints load as they are; `r_embedder` is FACM's name for the embedder of the end time s.
"""

from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from decm_lightning.networks.embedding import ClassEmbedding, PatchEmbedding, TimeEmbedding, sin_cos_positions
from decm_lightning.networks.layers import Block, FeedForwardName, FinalLayer, NormName, Rotary
from decm_lightning.networks.network import Network
from decm_lightning.types import Condition, Sample, Time


class DiT(Network):
    """u(x_t, t, s, condition) on square images or latents, by adaLN-Zero blocks.

    By default a LightningDiT: RMSNorm, QK norm, RoPE and SwiGLU. A SiT, the transformer of DiT, is `norm="layer",
    mlp="gelu", rotary=False, qk_norm=False, learn_sigma=True`.

    Weights begin as in DiT (arXiv 2212.09748): Xavier projections, zero modulation and output, embeddings of std 0.02.
    With `end_time` the embedding of s is added to those of t and of the class. Its output layer starts at zero, so
    that a student begun from a teacher's weights is the teacher for every s.

    Args:
        input_size: height and width of the input, a multiple of patch_size.
        in_channels: channels of the input and of the velocity.
        patch_size: side of the square patch that becomes one token.
        width: width of a token, a multiple of 4 and of heads, with width / heads a multiple of 4.
        depth: number of blocks, at least 1.
        heads: attention heads.
        mlp_ratio: hidden width of the feed-forward network, before the 2 / 3 of SwiGLU.
        num_classes: classes; index num_classes is the null class.
        end_time: embed the end time s; without it s is ignored.
        qk_norm: normalize queries and keys; LightningDiT's own checkpoints do not.
        shift: let the embedding shift as well as scale and gate each half of a block.
        norm: "rms" with learnt weights, or "layer" without.
        mlp: the feed-forward network: "swiglu", or "gelu".
        rotary: rotary positions in the attention, beside the fixed ones that are added to the tokens.
        learn_sigma: give as many output channels again, which are dropped: where DiT predicts a variance, SiT has
            weights that nothing trains.

    Raises:
        ValueError: if a size is below 1 or does not divide as it must, or there is no such norm or mlp.
    """

    prediction: Literal["velocity", "noise"] | None = "velocity"
    """What the network predicts; None for one from a public file, which does not say."""

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        patch_size: int = 1,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        end_time: bool = False,
        qk_norm: bool = True,
        shift: bool = True,
        norm: NormName = "rms",
        mlp: FeedForwardName = "swiglu",
        rotary: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(input_size, in_channels, patch_size, width, depth, heads)
        _check_names(norm, mlp)
        self.config = {
            "input_size": input_size,
            "in_channels": in_channels,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "end_time": end_time,
            "qk_norm": qk_norm,
            "shift": shift,
            "norm": norm,
            "mlp": mlp,
            "rotary": rotary,
            "learn_sigma": learn_sigma,
        }
        self.sample_shape = (in_channels, input_size, input_size)
        self.side = input_size // patch_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.learn_sigma = learn_sigma
        self.num_classes = num_classes
        self.x_embedder = PatchEmbedding(in_channels, width, patch_size)
        self.t_embedder = TimeEmbedding(width)
        self.r_embedder = TimeEmbedding(width, zero_output=True) if end_time else None
        self.y_embedder = ClassEmbedding(num_classes, width)
        self.pos_embed = nn.Parameter(sin_cos_positions(width, self.side), requires_grad=False)
        self.feat_rope = Rotary(width // heads, self.side) if rotary else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm, shift, norm, mlp) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size * patch_size * in_channels * (1 + learn_sigma), norm)

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), (b, in_channels, input_size, input_size).

        Raises:
            ValueError: if the condition is not of labels; the null class is `null(labels)`.
        """
        if not isinstance(condition, Tensor):
            raise ValueError("DiT needs class labels: use network.null(labels) for unconditional rows")
        embedding = self.t_embedder(t) + self.y_embedder(condition)
        if self.r_embedder is not None:
            embedding = embedding + self.r_embedder(s)
        tokens = self.x_embedder(x_t) + self.pos_embed
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            tokens = block(tokens, embedding, self.feat_rope, checkpointed)
        u = self.unpatchify(self.final_layer(tokens, embedding))
        if self.learn_sigma:
            u = u[:, : self.in_channels]
        # A copy where it is a view: FSDP2 hangs its hooks on the output, and warns of views.
        return u.contiguous().to(x_t.dtype)

    def units(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.blocks)

    def unpatchify(self, tokens: Tensor) -> Sample:
        """Return the image whose patches the tokens (b, n, p * p * c) are."""
        return rearrange(
            tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=self.patch_size, q=self.patch_size
        )

    def with_end_time(self) -> "DiT":
        """Return a copy that also embeds s, and at first equals this network for every s."""
        student = DiT(**(self.config | {"end_time": True}))
        own = self.state_dict()
        student.load_state_dict(own if self.r_embedder is not None else student.state_dict() | own)
        return student.to(self.pos_embed)


def check_sizes(input_size: int, in_channels: int, patch_size: int, width: int, depth: int, heads: int) -> None:
    """Refuse sizes of which no transformer can be built.

    Raises:
        ValueError: if one is below 1 or does not divide as it must.
    """
    sizes = {"input_size": input_size, "in_channels": in_channels, "patch_size": patch_size, "depth": depth}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1: got {size}")
    if input_size % patch_size:
        raise ValueError(f"input_size must be a multiple of patch_size: got {input_size} and {patch_size}")
    if heads < 1 or width < 1 or width % heads or width // heads % 4:
        raise ValueError(f"width / heads must be a multiple of 4: got {width} / {heads}")


def _check_names(norm: str, mlp: str) -> None:
    for argument, name, known in (("norm", norm, NormName), ("mlp", mlp, FeedForwardName)):
        if name not in get_args(known):
            raise ValueError(f"{argument} must be one of {', '.join(get_args(known))}: got {name!r}")
