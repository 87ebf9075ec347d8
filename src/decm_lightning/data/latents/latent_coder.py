"""Images to normalized latents of a VAE and back."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from decm_lightning.autoencoders import Autoencoder, load_autoencoder
from decm_lightning.data.latents.normalization import LatentNormalization
from decm_lightning.data.latents.provenance import Provenance

PIXELS_AT_ONCE = 2**20
"""16 images of 256 x 256, or 4 of 512 x 512, of which SD3's VAE takes 0.7 GB to encode one and 1.2 GB to decode one."""


class LatentCoder:
    """A VAE with the normalization of its latents, on the device of its input.

    Latents are encoded as the mode of the VAE's posterior, without noise: a resumed run sees the same ones.

    Args:
        autoencoder: the VAE.
        normalization: of its latents; None for the shift_factor and scaling_factor of its config, as pipelines do.

    Raises:
        ValueError: if the normalization is of another number of channels.
    """

    def __init__(self, autoencoder: Autoencoder, normalization: LatentNormalization | None = None) -> None:
        self.autoencoder = autoencoder
        self.normalization = normalization or LatentNormalization.of_config(autoencoder.model.config)
        if (channels := self.normalization.mean.shape[1]) not in (1, autoencoder.latent_channels):
            raise ValueError(f"the latents have {channels} channels: the VAE's have {autoencoder.latent_channels}")

    @property
    def identity(self) -> str:
        """The VAE by its weights, and the normalization."""
        return f"{self.autoencoder.identity} {self.normalization.identity}"

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z p q"]:
        """Return the normalized latents of images in [-1, 1], in their dtype."""
        self.autoencoder.to(images.device)
        parts = images.split(_at_once(images.shape[-2] * images.shape[-1]))
        encoded = torch.cat([self.autoencoder.encode(part.float()) for part in parts])
        return self.normalization.normalize_(encoded).to(images.dtype)

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "b z p q"]) -> Float[Tensor, "b c h w"]:
        """Return the images of normalized latents, clamped to [-1, 1]."""
        self.autoencoder.to(x.device)
        parts = x.split(_at_once(x.shape[-2] * x.shape[-1] * self.autoencoder.downsampling**2))
        return torch.cat([self.autoencoder.decode(self.normalization.denormalize(part.float())) for part in parts])

    @classmethod
    def read(cls, vae: str, folder: str | Path, normalization: LatentNormalization | None = None) -> "LatentCoder":
        """Return the coder of a folder's latents.

        Args:
            vae: the VAE, as `load_autoencoder` takes it.
            folder: the latents, of which cache.json and latents_stats.pt are read.
            normalization: of the training; None for what cache.json says, or else (x - mean) / std.

        Raises:
            FileNotFoundError: if there is no such VAE, or no latents_stats.pt.
            ValueError: if the VAE is not the one that cache.json names, or its latents have other channels.
        """
        autoencoder, provenance = load_autoencoder(vae), Provenance.read(folder)
        if provenance is not None:
            provenance.check_vae(folder, vae, autoencoder.identity)
        if normalization is None:
            options = provenance.scaling if provenance else {"latent_norm": True, "latent_multiplier": 1.0}
            normalization = LatentNormalization.read(
                folder, autoencoder.latent_channels, bool(options["latent_norm"]), options["latent_multiplier"]
            )
        return cls(autoencoder, normalization)


def _at_once(pixels: int) -> int:
    return max(1, PIXELS_AT_ONCE // pixels)
