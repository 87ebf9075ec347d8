"""Encode images into normalized latents with a VAE, and decode them."""

import torch
from jaxtyping import Float
from torch import Tensor

from decm_lightning.autoencoders.autoencoder import Autoencoder
from decm_lightning.autoencoders.normalization import LatentNormalization

PIXELS_AT_ONCE = 2**20
"""Pixels per call of the VAE: 4 images of 512 x 512. SD3's VAE needs 0.7 GB to encode and 1.2 GB to decode each."""


class LatentCoder:
    """A VAE with the normalization of its latents. It runs on the device of its input.

    Images are encoded to the mode of the VAE's posterior, without noise, so a resumed run gets the same latents.

    Args:
        autoencoder: the VAE.
        normalization: normalization of the latents; None for the shift_factor and scaling_factor in the VAE's config,
            which diffusers' pipelines apply.

    Raises:
        ValueError: if the normalization has another number of channels than the VAE.
    """

    def __init__(self, autoencoder: Autoencoder, normalization: LatentNormalization | None = None) -> None:
        self.autoencoder = autoencoder
        self.normalization = normalization or LatentNormalization.of_config(autoencoder.model.config)
        if (channels := self.normalization.mean.shape[1]) not in (1, autoencoder.latent_channels):
            raise ValueError(f"the latents have {channels} channels, but the VAE has {autoencoder.latent_channels}")

    @property
    def identity(self) -> str:
        """Hashes of the VAE's weights and of the normalization."""
        return f"{self.autoencoder.identity} {self.normalization.identity}"

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z p q"]:
        """Encode images in [-1, 1] into normalized latents of the same dtype."""
        self.autoencoder.to(images.device)
        parts = images.split(_at_once(images.shape[-2] * images.shape[-1]))
        encoded = torch.cat([self.autoencoder.encode(part.float()) for part in parts])
        return self.normalization.normalize_(encoded).to(images.dtype)

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "b z p q"]) -> Float[Tensor, "b c h w"]:
        """Decode normalized latents into images, clamped to [-1, 1]."""
        self.autoencoder.to(x.device)
        parts = x.split(_at_once(x.shape[-2] * x.shape[-1] * self.autoencoder.downsampling**2))
        return torch.cat([self.autoencoder.decode(self.normalization.denormalize(part.float())) for part in parts])


def _at_once(pixels: int) -> int:
    return max(1, PIXELS_AT_ONCE // pixels)
