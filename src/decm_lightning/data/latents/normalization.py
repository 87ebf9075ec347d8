"""The normalization of latents to mean 0 and standard deviation 1, and the moments of latents by channel."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decm_lightning.files import describe_unreadable, tensors_sha256

STATISTICS = "latents_stats.pt"


@dataclass(frozen=True)
class LatentNormalization:
    """Latents z of a VAE to x = (z - mean) / std * multiplier, of mean 0 and standard deviation 1, in float32.

    Args:
        mean: (1, c, 1, 1), or (1, 1, 1, 1) for all channels.
        std: of the same shape, above 0.
        multiplier: 1 where there are statistics; 0.18215 for Stable Diffusion's VAE without them.
        has_statistics: mean and std come from latents_stats.pt.
    """

    mean: Float[Tensor, "1 c 1 1"]
    std: Float[Tensor, "1 c 1 1"]
    multiplier: float
    has_statistics: bool = True

    def normalize(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the normalized latents."""
        return self.normalize_(z.clone())

    def normalize_(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalize latents in place and return them: without a copy of a batch, which would double the cost."""
        z.sub_(self.mean.to(z.device)).div_(self.std.to(z.device))
        return z if self.multiplier == 1 else z.mul_(self.multiplier)

    def denormalize(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the latents z that were normalized to x: x / multiplier * std + mean."""
        return x / self.multiplier * self.std.to(x.device) + self.mean.to(x.device)

    @property
    def identity(self) -> str:
        """A hash of mean and std, and the multiplier."""
        statistics = tensors_sha256({"mean": self.mean, "std": self.std})[:16]
        return f"statistics {statistics} times {self.multiplier:g}"

    def check(self, moments: "Moments", folder: str | Path) -> None:
        """Refuse normalized latents that are far from mean 0 and standard deviation 1, together or in one channel.

        A channel is checked only if it has its own statistics: its mean must be within 1 of 0, its std in [0.2, 5].

        Args:
            moments: of the normalized latents.
            folder: of the latents.

        Raises:
            ValueError: naming the folder, the values, the channel if it is one, and what to change.
        """
        mean, std = moments.overall()
        # A multiplier leaves the mean alone: 0.18215 takes Stable Diffusion's latents of ImageNet to 0.32, and one of
        # their channels to 1.06.
        limit = 0.3 if self.has_statistics else 1.0
        where = ""
        if abs(mean) < limit and 0.5 < std < 2:
            if not self.has_statistics:
                return
            channel_mean, channel_std = moments.mean / self.multiplier, moments.std() / self.multiplier
            bad = (channel_mean.abs() > 1) | (channel_std < 0.2) | (channel_std > 5)
            if not bad.any():
                return
            where = f"channel {int(bad.nonzero()[0])} of "
            mean, std = (float(values[bad][0]) for values in (moments.mean, moments.std()))
        raise ValueError(
            f"{where}latents of {folder} have mean {mean:.3g} and standard deviation {std:.3g} after "
            f"{self._describe()}: expected 0 and 1, about; {self._remedy(std)}"
        )

    def _describe(self) -> str:
        way = f"(x - mean) / std of {STATISTICS}" if self.has_statistics else "x, unnormalised (latent_norm is false)"
        return f"{way}, times {self.multiplier:g}"

    def _remedy(self, std: float) -> str:
        if not self.has_statistics:
            return f"set latent_norm to true, or latent_multiplier to {self.multiplier / max(std, 1e-8):.3g}"
        if self.multiplier != 1:
            return "with statistics latent_multiplier is 1"
        return f"were they normalized before they were written, or is {STATISTICS} of other latents?"

    @classmethod
    def of_config(cls, config: Any) -> "LatentNormalization":
        """Return what diffusers' pipelines apply: (z - shift_factor) scaling_factor, by default 0 and 1."""
        mean = torch.full((1, 1, 1, 1), config.get("shift_factor") or 0.0)
        return cls(mean, torch.ones_like(mean), config.get("scaling_factor") or 1.0, has_statistics=False)

    @classmethod
    def read(
        cls, folder: str | Path, channels: int, latent_norm: bool, latent_multiplier: float
    ) -> "LatentNormalization":
        """Return the normalization by a folder's latents_stats.pt of {"mean", "std"}, each (1, channels, 1, 1).

        Args:
            folder: where that file is; it is not read if latent_norm is false.
            channels: how many the latents have.
            latent_norm: subtract the mean and divide by the std.
            latent_multiplier: times this, above 0.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it cannot be read or has other content, naming the file, or the multiplier is not above 0.
        """
        if not 0 < latent_multiplier < math.inf:
            raise ValueError(f"latent_multiplier must be above 0: got {latent_multiplier}")
        if not latent_norm:
            ones = torch.ones(1, channels, 1, 1)
            return cls(0 * ones, ones, latent_multiplier, has_statistics=False)
        file = Path(folder) / STATISTICS
        if not os.path.lexists(file):
            raise FileNotFoundError(f"no file {file}: give the statistics of the latents, or set latent_norm to false")
        content = _load(file)
        if not isinstance(content, Mapping):
            raise ValueError(f"{file} must hold mean and std by name: got one {type(content).__name__}")
        mean, std = (_statistic(file, name, content.get(name), channels) for name in ("mean", "std"))
        if (std <= 0).any():
            channel = int(std.flatten().argmin())
            raise ValueError(f"{file}: std must be above 0 in float32: got {std.min():g} in channel {channel}")
        return cls(mean, std, latent_multiplier)


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Bytes that are not a checkpoint can fail in any way.
        reason = describe_unreadable(file) or f"not a file of tensors: {_first_line(error)}"
        raise ValueError(f"{file}: {reason}") from error


def _first_line(error: Exception) -> str:
    if unsafe := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return f"it holds {unsafe[1]}, which could run code"
    # torch.load's advice to load it without a check is for those who know what it is.
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def _statistic(file: Path, name: str, value: object, channels: int) -> Float[Tensor, "1 c 1 1"]:
    """Return the mean or std in float32, after checks."""
    expected = f"{file}: {name} must be finite numbers, (1, {channels}, 1, 1)"
    if not isinstance(value, Tensor):
        raise ValueError(f"{expected}: got {'nothing' if value is None else f'a {type(value).__name__}'}")
    strided = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    if value.shape != (1, channels, 1, 1) or value.is_complex() or not strided:
        raise ValueError(f"{expected}: got {tuple(value.shape)}, {value.dtype}")
    converted = value.detach().float()
    bad = converted.isfinite().logical_not().flatten()
    if bad.any():
        channel = int(bad.nonzero()[0])
        raise ValueError(f"{expected}: got {value.flatten()[channel]:g} in channel {channel}")
    return converted


def finite_rows(x: Float[Tensor, "b c h w"]) -> Bool[Tensor, " b"]:
    """Return which rows hold neither NaN nor infinity."""
    # A sum is finite only if all its terms are, and takes a thirtieth of the time of looking at each.
    finite = x.flatten(1).sum(1).isfinite()
    return finite if finite.all() else x.isfinite().flatten(1).all(1)


class Moments:
    """Mean and standard deviation of each channel over blocks of latents, gathered in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.square = torch.zeros(channels, dtype=torch.float64)

    def add(self, x: Float[Tensor, "b c h w"]) -> None:
        """Take in a block."""
        # By row and channel first: var_mean over (0, 2, 3) takes ten times as long.
        mean = x.flatten(2).mean(2).double().mean(0)
        variance = (x - mean.float().view(-1, 1, 1)).square().flatten(2).mean(2).double().mean(0)
        self._merge(len(x), mean, variance + mean.square())

    def merge(self, other: "Moments") -> None:
        """Take in the blocks of other moments."""
        self._merge(other.count, other.mean, other.square)

    def std(self) -> Float[Tensor, " c"]:
        """Return the standard deviation of each channel, in float64."""
        return (self.square - self.mean.square()).clamp(min=0).sqrt()

    def statistics(self) -> dict[str, Float[Tensor, "1 c 1 1"]]:
        """Return mean and std of each channel, as latents_stats.pt holds them, in float32."""
        return {name: value.float().view(1, -1, 1, 1) for name, value in (("mean", self.mean), ("std", self.std()))}

    def overall(self) -> tuple[float, float]:
        """Return mean and standard deviation over all channels together."""
        mean = self.mean.mean()
        return mean.item(), (self.square.mean() - mean.square()).clamp(min=0).sqrt().item()

    def as_json(self) -> dict[str, Any]:
        """Return plain numbers, from which `from_json` makes the very same moments."""
        return {"count": self.count, "mean": self.mean.tolist(), "square": self.square.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Moments":
        """Return the moments whose `as_json` is `content`."""
        moments = cls(len(content["mean"]))
        moments.count = content["count"]
        moments.mean, moments.square = (torch.tensor(content[name], dtype=torch.float64) for name in ("mean", "square"))
        return moments

    def _merge(self, count: int, mean: Tensor, square: Tensor) -> None:
        self.count += count
        fraction = count / self.count
        self.mean += fraction * (mean - self.mean)
        self.square += fraction * (square - self.square)
