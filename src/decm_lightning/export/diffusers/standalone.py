"""Stand-ins in exported files for what comes from other packages: einops, jaxtyping, and the base class of networks."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Shaped:
    """A tensor type with its shape, which is documentation: Float[Tensor, "b c h w"] is Tensor."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        """Return the type without the shape."""
        return item[0]


Bool = Shaped
Float = Shaped
Int = Shaped


class Network(nn.Module):
    """A trainable flow map: u = network(x_t, t, s, condition) is the mean velocity from time t to the end time s."""

    gradient_checkpointing = False


def rearrange(x: Tensor | Sequence[Tensor], pattern: str, **sizes: int) -> Tensor:
    """Return x with its axes split, reordered and merged as in einops: "b n (heads d) -> b heads n d".

    Args:
        x: a tensor, or tensors to stack along a new first axis.
        pattern: names of the axes before and after. A group in parentheses is one axis, and 1 a new axis of size 1.
        sizes: sizes of the axes in a group; at most one of them may be left out.
    """
    found = x if isinstance(x, Tensor) else torch.stack(list(x))
    sides = (re.findall(r"\([^)]*\)|\w+", side) for side in pattern.split("->"))
    before, after = ([group.strip("()").split() for group in side] for side in sides)
    for place in reversed(range(len(before))):
        if len(before[place]) > 1:
            found = found.unflatten(place, [sizes.get(axis, -1) for axis in before[place]])
    axes = [axis for group in before for axis in group]
    found = found.permute([axes.index(axis) for group in after for axis in group if axis != "1"])
    for place, group in enumerate(after):
        found = found.unsqueeze(place) if group == ["1"] else found.flatten(place, place + len(group) - 1)
    return found


def source(file: str) -> str:
    """Return the source code of a self-contained file."""
    return Path(file).read_text(encoding="utf-8")
