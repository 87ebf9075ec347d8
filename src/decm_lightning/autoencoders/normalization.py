"""Normalize latents to mean 0 and standard deviation 1, and compute their moments by channel."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decm_lightning.files import describe_load_error, describe_unreadable, tensors_sha256

STATISTICS = "latents_stats.pt"


@dataclass(frozen=True)
class LatentNormalization:
    """Normalize latents z of a VAE in float32: x = (z - mean) / std * multiplier.

    Args:
        mean: (1, c, 1, 1), or (1, 1, 1, 1) for all channels.
        std: same shape as mean, above 0.
        multiplier: 1 with statistics; 0.18215 for Stable Diffusion's VAE without them.
        has_statistics: whether mean and std come from latents_stats.pt.

    Example:
        >>> normalization = LatentNormalization(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 4.0), 1.0)
        >>> x = normalization.normalize(torch.full((1, 1, 1, 1), 10.0))
        >>> x.item(), normalization.denormalize(x).item()
        (2.0, 10.0)
    """

    mean: Float[Tensor, "1 c 1 1"]
    std: Float[Tensor, "1 c 1 1"]
    multiplier: float
    has_statistics: bool = True

    def normalize(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the normalized latents."""
        return self.normalize_(z.clone())

    def normalize_(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalize latents in place and return them. Copying the batch would double the cost."""
        z.sub_(self.mean.to(z.device)).div_(self.std.to(z.device))
        return z if self.multiplier == 1 else z.mul_(self.multiplier)

    def denormalize(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Invert the normalization: z = x / multiplier * std + mean."""
        return x / self.multiplier * self.std.to(x.device) + self.mean.to(x.device)

    @property
    def identity(self) -> str:
        """Hash of mean and std, and the multiplier."""
        statistics = tensors_sha256({"mean": self.mean, "std": self.std})[:16]
        return f"statistics {statistics} times {self.multiplier:g}"

    def check(self, moments: "Moments", folder: str | Path) -> None:
        """Refuse normalized latents of a folder that are far from mean 0 and standard deviation 1.

        Over all channels, the mean must be within 0.3 of 0 (within 1 without statistics) and the std in (0.5, 2). With
        statistics, the mean of each channel must be within 1 of 0 and its std in [0.2, 5].

        Raises:
            ValueError: if they are not. The message gives the folder, the values, the channel and the remedy.
        """
        mean, std = moments.overall()
        # A multiplier does not center: Stable Diffusion's latents of ImageNet have a mean of 0.32 after 0.18215, and
        # one of their channels has 1.06.
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
            f"{self._describe()}: expected about 0 and 1; {self._remedy(std)}"
        )

    def _describe(self) -> str:
        formula = f"(z - mean) / std with {STATISTICS}" if self.has_statistics else "z (latent_norm is false)"
        return f"{formula}, times {self.multiplier:g}"

    def _remedy(self, std: float) -> str:
        if not self.has_statistics:
            return f"set latent_norm to true, or latent_multiplier to {self.multiplier / max(std, 1e-8):.3g}"
        if self.multiplier != 1:
            return "set latent_multiplier to 1, because there are statistics"
        return f"check whether they were already normalized when written, or {STATISTICS} is of other latents"

    def as_json(self) -> dict[str, Any]:
        """Return plain numbers, from which `from_json` restores the normalization exactly."""
        return {
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "multiplier": self.multiplier,
            "has_statistics": self.has_statistics,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LatentNormalization":
        """Restore a normalization from the result of `as_json`."""
        mean, std = (torch.tensor(content[name], dtype=torch.float32).view(1, -1, 1, 1) for name in ("mean", "std"))
        return cls(mean, std, content["multiplier"], content["has_statistics"])

    @classmethod
    def of_config(cls, config: Any) -> "LatentNormalization":
        """Return the normalization of diffusers' pipelines: (z - shift_factor) * scaling_factor, by default 0 and 1."""
        mean = torch.full((1, 1, 1, 1), config.get("shift_factor") or 0.0)
        return cls(mean, torch.ones_like(mean), config.get("scaling_factor") or 1.0, has_statistics=False)

    @classmethod
    def read(
        cls, folder: str | Path, channels: int, latent_norm: bool, latent_multiplier: float
    ) -> "LatentNormalization":
        """Read latents_stats.pt: "mean" and "std" by name, each (1, channels, 1, 1). Skip it if latent_norm is false.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file cannot be read or has other content (the message names it), or the multiplier is not
                above 0.
        """
        if not 0 < latent_multiplier < math.inf:
            raise ValueError(f"latent_multiplier must be above 0: got {latent_multiplier}")
        if not latent_norm:
            ones = torch.ones(1, channels, 1, 1)
            return cls(0 * ones, ones, latent_multiplier, has_statistics=False)
        file = Path(folder) / STATISTICS
        if not os.path.lexists(file):
            raise FileNotFoundError(f"no file {file}: add the statistics of the latents, or set latent_norm to false")
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
        # torch.load raises errors of many types for other content.
        reason = describe_unreadable(file) or f"not a file of tensors: {describe_load_error(error)}"
        raise ValueError(f"{file}: {reason}") from error


def _statistic(file: Path, name: str, value: object, channels: int) -> Float[Tensor, "1 c 1 1"]:
    """Check a mean or std and return it in float32."""
    expected = f"{file}: {name} must be finite and of shape (1, {channels}, 1, 1)"
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
    """Return which rows are free of NaN and infinity."""
    # A finite sum has finite terms only, and is 30 times as fast as a check of each value.
    finite = x.flatten(1).sum(1).isfinite()
    return finite if finite.all() else x.isfinite().flatten(1).all(1)


class Moments:
    """Mean and standard deviation of each channel over blocks of latents, accumulated in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.square = torch.zeros(channels, dtype=torch.float64)

    def add(self, x: Float[Tensor, "b c h w"]) -> None:
        """Add a block of latents."""
        # torch.var_mean over (0, 2, 3) takes ten times as long as means by row and channel.
        mean = x.flatten(2).mean(2).double().mean(0)
        variance = (x - mean.float().view(-1, 1, 1)).square().flatten(2).mean(2).double().mean(0)
        self._merge(len(x), mean, variance + mean.square())

    def merge(self, other: "Moments") -> None:
        """Add the blocks of other moments."""
        self._merge(other.count, other.mean, other.square)

    def std(self) -> Float[Tensor, " c"]:
        """Return the standard deviation of each channel, in float64."""
        return (self.square - self.mean.square()).clamp(min=0).sqrt()

    def statistics(self) -> dict[str, Float[Tensor, "1 c 1 1"]]:
        """Return mean and std of each channel in float32, in the format of latents_stats.pt."""
        return {name: value.float().view(1, -1, 1, 1) for name, value in (("mean", self.mean), ("std", self.std()))}

    def overall(self) -> tuple[float, float]:
        """Return the mean and standard deviation over all channels."""
        mean = self.mean.mean()
        return mean.item(), (self.square.mean() - mean.square()).clamp(min=0).sqrt().item()

    def as_json(self) -> dict[str, Any]:
        """Return plain numbers, from which `from_json` restores the moments exactly."""
        return {"count": self.count, "mean": self.mean.tolist(), "square": self.square.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Moments":
        """Restore moments from the result of `as_json`."""
        moments = cls(len(content["mean"]))
        moments.count = content["count"]
        moments.mean, moments.square = (torch.tensor(content[name], dtype=torch.float64) for name in ("mean", "square"))
        return moments

    def _merge(self, count: int, mean: Tensor, square: Tensor) -> None:
        self.count += count
        fraction = count / self.count
        self.mean += fraction * (mean - self.mean)
        self.square += fraction * (square - self.square)
