"""A diffusion transformer with a second time: the student, and without the second time the teacher.

Submodules and parameters are named as in LightningDiT (arXiv 2501.01423), so that its public checkpoints load as they
are; `r_embedder` is its name for the embedder of the landing time s.
"""

import torch
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from decm_lightning.networks.embedding import ClassEmbedding, TimeEmbedding, sin_cos_positions
from decm_lightning.networks.layers import Block, FinalLayer, Rotary
from decm_lightning.types import Condition, Sample, Time


class DiT(nn.Module, PyTorchModelHubMixin, library_name="decm-lightning", license="apache-2.0"):
    """u(x_t, t, s, condition) on square images or latents: adaLN-Zero blocks with RMSNorm, QK norm, RoPE and SwiGLU.

    With `landing_time` the embedding of s is added to those of t and of the class. Its output layer starts at zero, so
    that a student begun from a teacher's weights is the teacher for every s.

    Args:
        input_size: height and width of the input, a multiple of patch_size.
        in_channels: channels of the input and of the velocity.
        patch_size: side of the square patch that becomes one token.
        width: width of a token, a multiple of 4 and of heads, with width / heads a multiple of 4.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP before the 2 / 3 of SwiGLU.
        num_classes: classes; index num_classes is the null class.
        landing_time: embed the landing time s; without it s is ignored.

    Raises:
        ValueError: if a size does not divide as it must.
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
        landing_time: bool = False,
    ) -> None:
        """Build the layers and initialise them."""
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size must be a multiple of patch_size: got {input_size} and {patch_size}")
        if width % heads or width // heads % 4 or width % 4:
            raise ValueError(f"width / heads must be a multiple of 4: got {width} / {heads}")
        grid = input_size // patch_size
        self.config = {
            "input_size": input_size,
            "in_channels": in_channels,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "landing_time": landing_time,
        }
        self.sample_shape = (in_channels, input_size, input_size)
        self.side = grid
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, width, patch_size, stride=patch_size)})
        self.t_embedder = TimeEmbedding(width)
        self.r_embedder = TimeEmbedding(width) if landing_time else None
        self.y_embedder = ClassEmbedding(num_classes, width)
        self.pos_embed = nn.Parameter(sin_cos_positions(width, grid), requires_grad=False)
        self.feat_rope = Rotary(width // heads, grid)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size * patch_size * in_channels)
        self.initialise()

    def initialise(self) -> None:
        """Set the weights as DiT does (arXiv 2212.09748): Xavier; zero modulation, output and landing time."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.x_embedder["proj"]
        nn.init.xavier_uniform_(patches.weight.data.flatten(1))
        nn.init.zeros_(patches.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        embedders = [self.t_embedder] if self.r_embedder is None else [self.t_embedder, self.r_embedder]
        for embedder in embedders:
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        layers = [block.adaLN_modulation[1] for block in self.blocks]
        layers += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        layers += [] if self.r_embedder is None else [self.r_embedder.mlp[2]]
        for layer in layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), (b, in_channels, input_size, input_size).

        Raises:
            ValueError: if there is no condition; the null class is `null(labels)`.
        """
        if condition is None:
            raise ValueError("DiT needs class labels: use network.null(labels) for unconditional rows")
        embedding = self.t_embedder(t) + self.y_embedder(condition)
        if self.r_embedder is not None:
            embedding = embedding + self.r_embedder(s)
        tokens = rearrange(self.x_embedder["proj"](x_t), "b c h w -> b (h w) c") + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, embedding, self.feat_rope)
        return self.unpatchify(self.final_layer(tokens, embedding))

    def unpatchify(self, tokens: Tensor) -> Sample:
        """Return the image whose patches the tokens (b, n, p * p * c) are."""
        return rearrange(
            tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=self.patch_size, q=self.patch_size
        )

    def null(self, condition: Condition) -> Condition:
        """Return as many null classes as there are labels."""
        return None if condition is None else torch.full_like(condition, self.num_classes)

    def with_landing_time(self) -> "DiT":
        """Return a copy that also embeds s, and at first equals this network for every s."""
        student = DiT(**(self.config | {"landing_time": True}))
        own = self.state_dict()
        student.load_state_dict(own if self.r_embedder is not None else student.state_dict() | own)
        return student
