"""What makes latents of mean 0 and standard deviation 1: the scaling that training uses, and the moments behind it."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

STATISTICS = "latents_stats.pt"


@dataclass(frozen=True)
class Scaling:
    """What makes latents of mean 0 and standard deviation 1: (x - mean) / std * multiplier, in float32.

    Args:
        mean: (1, c, 1, 1).
        std: (1, c, 1, 1), above 0.
        multiplier: 1 where there are statistics; 0.18215 for Stable Diffusion's VAE without them.
    """

    mean: Float[Tensor, "1 c 1 1"]
    std: Float[Tensor, "1 c 1 1"]
    multiplier: float

    def __call__(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the scaled latents."""
        return self.scale_(x.clone())

    def scale_(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Scale latents in place and return them: without a copy of a batch, which would cost as much again."""
        x.sub_(self.mean).div_(self.std)
        return x if self.multiplier == 1 else x.mul_(self.multiplier)

    def inverse(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the latents that were scaled to x, on its device: x / multiplier * std + mean."""
        return x / self.multiplier * self.std.to(x.device) + self.mean.to(x.device)

    @classmethod
    def read(cls, folder: str | Path, channels: int, latent_norm: bool, latent_multiplier: float) -> "Scaling":
        """Return the scaling by a folder's latents_stats.pt of {"mean", "std"}, each (1, channels, 1, 1).

        Args:
            folder: where that file is, which nobody needs if latent_norm is false.
            channels: how many the latents have.
            latent_norm: subtract the mean and divide by the std.
            latent_multiplier: times this, above 0.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it has other content, or the multiplier is not above 0.
        """
        if latent_multiplier <= 0:
            raise ValueError(f"latent_multiplier must be above 0: got {latent_multiplier}")
        if not latent_norm:
            ones = torch.ones(1, channels, 1, 1)
            return cls(0 * ones, ones, latent_multiplier)
        file = Path(folder) / STATISTICS
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: give the statistics of the latents, or set latent_norm to false")
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is no file of tensors: {str(error).partition(chr(10))[0]}") from error
        for name in ("mean", "std"):
            value = content.get(name) if isinstance(content, dict) else None
            if not isinstance(value, Tensor) or value.shape != (1, channels, 1, 1) or not value.isfinite().all():
                found = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(f"{file}: {name} must be finite and (1, {channels}, 1, 1): got {found}")
        if (content["std"] <= 0).any():
            raise ValueError(f"{file}: std must be above 0: got {content['std'].min():g}")
        return cls(content["mean"].float(), content["std"].float(), latent_multiplier)


class Moments:
    """Mean and standard deviation of each channel over blocks of latents, gathered in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.square = torch.zeros(channels, dtype=torch.float64)

    def add(self, x: Float[Tensor, "b c h w"]) -> None:
        """Take in a block."""
        variance, mean = (value.double() for value in torch.var_mean(x, (0, 2, 3), correction=0))
        self._merge(len(x), mean, variance + mean.square())

    def merge(self, other: "Moments") -> None:
        """Take in the blocks of another."""
        self._merge(other.count, other.mean, other.square)

    def statistics(self) -> dict[str, Float[Tensor, "1 c 1 1"]]:
        """Return mean and std of each channel, as latents_stats.pt holds them, in float32."""
        std = (self.square - self.mean.square()).clamp(min=0).sqrt()
        return {"mean": self.mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}

    def overall(self) -> tuple[float, float]:
        """Return mean and standard deviation over all channels together."""
        mean = self.mean.mean()
        return mean.item(), (self.square.mean() - mean.square()).clamp(min=0).sqrt().item()

    def as_json(self) -> dict[str, Any]:
        """Return plain numbers, from which `from_json` makes the very same moments."""
        return {"count": self.count, "mean": self.mean.tolist(), "square": self.square.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Moments":
        """Return the moments that `as_json` was asked for."""
        moments = cls(len(content["mean"]))
        moments.count = content["count"]
        moments.mean, moments.square = (torch.tensor(content[name], dtype=torch.float64) for name in ("mean", "square"))
        return moments

    def _merge(self, count: int, mean: Tensor, square: Tensor) -> None:
        self.count += count
        share = count / self.count
        self.mean += share * (mean - self.mean)
        self.square += share * (square - self.square)
