"""The architecture of the FID's Inception, with the parameter names of the weights of 2015-12-05.

torchmetrics uses the network of torch-fidelity, which needs torchvision and does not return spatial features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

SIDE = 299
CLASSES = 1008
# ADM's sFID reads 7 channels of "mixed_6/conv", the first ones of this block.
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, batch normalization and ReLU."""

    name: str
    channels: int
    kernel: int | tuple[int, int]
    stride: int = 1
    padded: bool = True


Pool = Callable[[Tensor], Tensor]
Step = Conv | Pool | tuple[Conv, ...]
"""One step of a branch. Tuples are parallel convolutions, whose outputs are concatenated."""

# TensorFlow's averages exclude the padding.
AVERAGE: Pool = partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAXIMUM: Pool = partial(max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE: Pool = partial(max_pool2d, kernel_size=3, stride=2)

STEM: tuple[Step, ...] = (
    Conv("Conv2d_1a_3x3", 32, 3, stride=2, padded=False),
    Conv("Conv2d_2a_3x3", 32, 3, padded=False),
    Conv("Conv2d_2b_3x3", 64, 3),
    HALVE,
    Conv("Conv2d_3b_1x1", 80, 1),
    Conv("Conv2d_4a_3x3", 192, 3, padded=False),
    HALVE,
)


def chain(name: str, *convs: tuple[int, int | tuple[int, int]]) -> tuple[Conv, ...]:
    """Return padded convolutions (channels, kernel) with numbered names."""
    return tuple(Conv(f"{name}_{number}", *conv) for number, conv in enumerate(convs, start=1))


def halving(name: str, channels: int) -> Conv:
    """Return a 3 x 3 convolution with stride 2."""
    return Conv(name, channels, 3, stride=2, padded=False)


def block_a(pooled: int) -> tuple[tuple[Step, ...], ...]:
    """Return the branches of a block at 35 x 35, the last with `pooled` channels."""
    return (
        (Conv("branch1x1", 64, 1),),
        chain("branch5x5", (48, 1), (64, 5)),
        chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        (AVERAGE, Conv("branch_pool", pooled, 1)),
    )


def block_c(inner: int) -> tuple[tuple[Step, ...], ...]:
    """Return the branches of a block at 17 x 17 with `inner` channels."""
    return (
        (Conv("branch1x1", 192, 1),),
        chain("branch7x7", (inner, 1), (inner, (1, 7)), (192, (7, 1))),
        chain("branch7x7dbl", (inner, 1), (inner, (7, 1)), (inner, (1, 7)), (inner, (7, 1)), (192, (1, 7))),
        (AVERAGE, Conv("branch_pool", 192, 1)),
    )


def block_e(pool: Pool) -> tuple[tuple[Step, ...], ...]:
    """Return the branches of a block at 8 x 8."""

    def pair(name: str) -> tuple[Conv, ...]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return (
        (Conv("branch1x1", 320, 1),),
        (Conv("branch3x3_1", 384, 1), pair("branch3x3_2")),
        (*chain("branch3x3dbl", (448, 1), (384, 3)), pair("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192, 1)),
    )


REDUCTION_B: tuple[tuple[Step, ...], ...] = (
    (halving("branch3x3", 384),),
    (*chain("branch3x3dbl", (64, 1), (96, 3)), halving("branch3x3dbl_3", 96)),
    (HALVE,),
)
REDUCTION_D: tuple[tuple[Step, ...], ...] = (
    (Conv("branch3x3_1", 192, 1), halving("branch3x3_2", 320)),
    (*chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1))), halving("branch7x7x3_4", 192)),
    (HALVE,),
)
BLOCKS = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": REDUCTION_B,
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": REDUCTION_D,
    "Mixed_7b": block_e(AVERAGE),
    # Max pooling only in this block is a mistake of 2015 that is part of every FID.
    "Mixed_7c": block_e(MAXIMUM),
}


class NormalizedConv(nn.Module):
    """The module of a `Conv`."""

    def __init__(self, channels: int, spec: Conv) -> None:
        super().__init__()
        kernel = (spec.kernel, spec.kernel) if isinstance(spec.kernel, int) else spec.kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if spec.padded else (0, 0)
        self.conv = nn.Conv2d(channels, spec.channels, kernel, spec.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(bn(conv(x)))."""
        return relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Parallel branches, concatenated. Every convolution is a direct submodule under its own name."""

    def __init__(self, channels: int, branches: Sequence[Sequence[Step]]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = sum(self._build(channels, branch) for branch in branches)

    def forward(self, x: Tensor) -> Tensor:
        """Return the concatenated branches."""
        return torch.cat([self._follow(x, branch) for branch in self.branches], 1)

    def _build(self, channels: int, branch: Sequence[Step]) -> int:
        for step in branch:
            convs = (step,) if isinstance(step, Conv) else step if isinstance(step, tuple) else ()
            for conv in convs:
                self.add_module(conv.name, NormalizedConv(channels, conv))
            channels = sum(conv.channels for conv in convs) or channels
        return channels

    def _follow(self, x: Tensor, branch: Sequence[Step]) -> Tensor:
        for step in branch:
            if isinstance(step, Conv):
                x = self.get_submodule(step.name)(x)
            elif isinstance(step, tuple):
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in step], 1)
            else:
                x = step(x)
        return x


class Inception(Block):
    """Inception-v3 (arXiv 1512.00567) as in the TensorFlow graph of 2015-12-05; its forward is the stem."""

    def __init__(self) -> None:
        super().__init__(3, [STEM])
        channels = self.channels
        for name, branches in BLOCKS.items():
            block = Block(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, CLASSES)

    def views(self, x: Tensor) -> dict[str, Tensor]:
        """Return pool (b, 2048), spatial (b, 2023) and logits (b, 1008) of images (b, 3, 299, 299) in [-1, 1).

        `spatial` is flattened in ADM's order, rows, columns, channels; `logits` have no bias, as in every Inception
        Score.
        """
        x = self(x)
        views = {}
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == SPATIAL_BLOCK:
                views["spatial"] = rearrange(x[:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)")
        pool = x.mean((2, 3))
        return views | {"pool": pool, "logits": pool @ self.fc.weight.T}
