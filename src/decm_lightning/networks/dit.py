"""A class-conditional diffusion transformer: a student reads the end time, a teacher does not.

Submodules and parameters are named as in LightningDiT (arXiv 2501.01423) and SiT (arXiv 2401.08740), so that their
public checkpoints load without conversion. `r_embedder` is FACM's name for the embedder of the end time s.
"""

import copy
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from decm_lightning.errors import check_at_least
from decm_lightning.networks.embedding import ClassEmbedding, PatchEmbedding, TimeEmbedding, sin_cos_positions
from decm_lightning.networks.layers import Block, FeedForwardName, FinalLayer, NormName, Rotary
from decm_lightning.networks.network import Network, arguments
from decm_lightning.networks.pixel_skip import PixelSkipHead
from decm_lightning.networks.record import Record, choose
from decm_lightning.samplers import Sampler
from decm_lightning.types import Condition, Sample, Time

FACM_SAMPLING = {1: "consistency", 2: "consistency", 4: "consistency", 8: "consistency", 50: "euler"}


class DiT(Network):
    """A DiT u(x_t, t, s, labels) on square images or latents, with adaLN-Zero blocks.

    The default architecture is that of LightningDiT: RMSNorm, QK norm, RoPE and SwiGLU. For SiT, which uses the
    transformer of DiT, pass `norm="layer", mlp="gelu", rotary=False, qk_norm=False, learn_sigma=True`.

    Weights are initialized as in DiT (arXiv 2212.09748): Xavier projections, zero modulation and output layers, and
    embeddings with standard deviation 0.02. With `end_time` the embedding of s is added to those of t and the class.
    Its output layer starts at zero, so a student initialized from a teacher equals the teacher for every s.

    Example:
        >>> network = DiT(input_size=8, in_channels=1, patch_size=2, width=32, depth=2, heads=2, num_classes=10)
        >>> x_t, t, s, labels = network.example(rows=4)
        >>> network(x_t, t, s, labels).shape
        torch.Size([4, 1, 8, 8])

    Args:
        input_size: height and width of the input, a multiple of patch_size.
        in_channels: channels of the input and of the velocity.
        patch_size: side of the square patch that becomes one token.
        width: width of a token, a multiple of 4 and of heads, with width / heads a multiple of 4. Without pixel_skip,
            at least patch_size^2 * in_channels: a narrower token cannot carry the noise of its patch.
        depth: number of blocks, at least 1.
        heads: attention heads.
        mlp_ratio: hidden width of the feed-forward network, before the 2 / 3 of SwiGLU.
        num_classes: number of classes; label num_classes is the null class.
        end_time: embed the end time s; False ignores it. "facm" is FACM's clock (arXiv 2507.03738): one embedding of
            2 - t where s = t, and of t elsewhere, for steps of length 0 and steps to the data only. Its samplers are
            `euler` and `consistency`.
        prediction: what the network predicts; None if unknown, because public files do not record it.
        qk_norm: normalize queries and keys. LightningDiT's own checkpoints have no QK norm.
        shift: let the embedding shift each half of a block, in addition to scaling and gating it.
        norm: "rms" with learned weights, or "layer" without weights.
        mlp: the feed-forward network, "swiglu" or "gelu".
        rotary: use rotary positions in the attention, in addition to the fixed positions added to the tokens.
        learn_sigma: double the output channels and drop the second half, in which DiT predicts a variance and SiT has
            untrained weights.
        pixel_skip: add a `PixelSkipHead`, through which the noise bypasses the blocks. For images with large patches,
            such as 8 x 8 pixels.

    Raises:
        ValueError: if a size is below 1 or not divisible as described, the width is too small, or norm or mlp is
            unknown.
    """

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
        end_time: bool | Literal["facm"] = False,
        prediction: Literal["velocity", "noise"] | None = "velocity",
        qk_norm: bool = True,
        shift: bool = True,
        norm: NormName = "rms",
        mlp: FeedForwardName = "swiglu",
        rotary: bool = True,
        learn_sigma: bool = False,
        pixel_skip: bool = False,
    ) -> None:
        config = arguments(locals())
        super().__init__()
        self.config = config
        check_sizes(input_size, in_channels, patch_size, width, depth, heads)
        if not pixel_skip:
            check_width(width, patch_size, in_channels, "pixel_skip: true")
        _check_names(norm, mlp)
        if end_time not in (False, True, "facm"):
            raise ValueError(f"end_time must be true, false or 'facm': got {end_time!r}")
        self.sample_shape = (in_channels, input_size, input_size)
        self.side = input_size // patch_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.learn_sigma = learn_sigma
        self.num_classes = num_classes
        self.x_embedder = PatchEmbedding(in_channels, width, patch_size)
        self.t_embedder = TimeEmbedding(width)
        self.r_embedder = TimeEmbedding(width, zero_output=True) if end_time is True else None
        self.is_facm = end_time == "facm"
        self.y_embedder = ClassEmbedding(num_classes, width)
        self.pos_embed = nn.Parameter(sin_cos_positions(width, self.side), requires_grad=False)
        self.feat_rope = Rotary(width // heads, self.side) if rotary else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm, shift, norm, mlp) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size * patch_size * in_channels * (1 + learn_sigma), norm)
        self.pixel_skip = PixelSkipHead(in_channels, width) if pixel_skip else None

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), (b, in_channels, input_size, input_size).

        Raises:
            ValueError: if the condition is not a tensor of labels. Unconditional rows need `null(labels)`.
        """
        if not isinstance(condition, Tensor):
            raise ValueError("DiT needs class labels: use network.null(labels) for unconditional rows")
        time = torch.where(s == t, 2 - t, t) if self.is_facm else t
        embedding = self.t_embedder(time) + self.y_embedder(condition)
        if self.r_embedder is not None:
            embedding = embedding + self.r_embedder(s)
        tokens = self.x_embedder(x_t) + self.pos_embed
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            tokens = block(tokens, embedding, self.feat_rope, checkpointed)
        u = self.unpatchify(self.final_layer(tokens, embedding))
        if self.learn_sigma:
            u = u[:, : self.in_channels]
        if self.pixel_skip is not None:
            u = self.pixel_skip(u, x_t, embedding)
        # FSDP2 attaches hooks to the output and warns if it is a view.
        return u.contiguous().to(x_t.dtype)

    @property
    def prediction(self) -> Literal["velocity", "noise"] | None:
        """What the network predicts; None if unknown."""
        return self.config["prediction"]  # type: ignore[no-any-return]

    def sampling(self, sampler: str | Sampler | None = None, steps: int | None = None) -> tuple[str | Sampler, int]:
        """Return a sampler and its number of steps; on FACM's clock the recommended ones never step to s < 1."""
        if self.is_facm and sampler is None and not (self.record and self.record.sampling):
            return choose(Record(sampling=FACM_SAMPLING), True, None, steps)
        return super().sampling(sampler, steps)

    def units(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.blocks)

    def unpatchify(self, tokens: Tensor) -> Sample:
        """Return the images (b, c, h, w) made of the patches (b, n, p * p * c)."""
        return rearrange(
            tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=self.patch_size, q=self.patch_size
        )

    def with_end_time(self) -> "DiT":
        """Return a copy that also reads s and initially equals this network for every s it reads."""
        if self.is_facm:
            return copy.deepcopy(self)
        student = DiT(**(self.config | {"end_time": True, "prediction": "velocity"}))
        own = self.state_dict()
        student.load_state_dict(own if self.r_embedder is not None else student.state_dict() | own)
        return student.to(self.pos_embed)


def check_sizes(input_size: int, in_channels: int, patch_size: int, width: int, depth: int, heads: int) -> None:
    """Check that a transformer of these sizes can be built."""
    check_at_least(1, input_size=input_size, in_channels=in_channels, patch_size=patch_size, depth=depth)
    if input_size % patch_size:
        raise ValueError(f"input_size must be a multiple of patch_size: got {input_size} and {patch_size}")
    if heads < 1 or width < 1 or width % heads or width // heads % 4:
        raise ValueError(f"width / heads must be a multiple of 4: got {width} / {heads}")


def check_width(width: int, patch_size: int, in_channels: int, skip: str) -> None:
    """Check that a token can carry the noise of its patch, which the velocity E[x_1] - x_0 contains.

    Raises:
        ValueError: if the width is smaller than the number of values of a patch. The argument `skip`, which lets the
            noise bypass the tokens, is named as a remedy.
    """
    values = patch_size * patch_size * in_channels
    if width < values:
        raise ValueError(
            f"tokens of width {width} cannot carry the noise of patches with {values} values "
            f"({patch_size} x {patch_size} x {in_channels}): use a width of at least {values}, a smaller patch_size, "
            f"or {skip}"
        )


def _check_names(norm: str, mlp: str) -> None:
    for argument, name, known in (("norm", norm, NormName), ("mlp", mlp, FeedForwardName)):
        if name not in get_args(known):
            raise ValueError(f"{argument} must be one of {', '.join(get_args(known))}: got {name!r}")
