"""A frozen autoencoder that encodes images, decodes latents, and has an identity."""

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decm_lightning.files import tensors_sha256


class Autoencoder(nn.Module):
    """An AutoencoderKL, AutoencoderDC or AutoencoderTiny of diffusers, in float32, frozen and in eval mode.

    Latents are the raw output of the encoder: scaling_factor and shift_factor of the model are not applied. The only
    normalization is the one stored with the latents (latents_stats.pt).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model.float().eval().requires_grad_(False)
        config: Any = model.config
        self.image_channels: int = config.in_channels
        self.latent_channels: int = config.latent_channels
        levels = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
        self.downsampling = 2 ** (len(levels) - 1)
        """The ratio of image size to latent size."""

    @cached_property
    def identity(self) -> str:
        """The class and the first 16 digits of the SHA-256 of all weights, to match latents with their autoencoder."""
        return f"{type(self.model).__name__} {tensors_sha256(self.model.state_dict())[:16]}"

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of the latents of images of size x size pixels.

        Raises:
            ValueError: if the size is not a multiple of `downsampling`.
        """
        if size < 1 or size % self.downsampling:
            raise ValueError(f"size must be a multiple of {self.downsampling}, the VAE's downsampling: got {size}")
        return self.latent_channels, size // self.downsampling, size // self.downsampling

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b z p q"] | None = None
    ) -> Float[Tensor, "b z p q"]:
        """Return the latents of images in [-1, 1]: mean + std * noise of the posterior, or its mode without noise.

        AutoencoderDC and AutoencoderTiny have no posterior and ignore the noise.
        """
        encoded = self.model.encode(images)
        if "latent_dist" in encoded:
            posterior = encoded.latent_dist
            return posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return encoded.latent if "latent" in encoded else encoded.latents

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b z p q"]) -> Float[Tensor, "b c h w"]:
        """Return the images of latents, clamped to [-1, 1]."""
        return self.model.decode(latents).sample.clamp(-1, 1)

    def train(self, mode: bool = True) -> "Autoencoder":
        """Stay in eval mode."""
        return super().train(False)
