"""Images to the latents that a text-to-image pipeline trains on, and back."""

import torch
from jaxtyping import Float
from torch import Tensor

from decm_lightning.autoencoders import Autoencoder

# SD3's takes 0.7 GB while it encodes an image of 512 x 512 in float32, 1.2 GB while it decodes one.
CHUNK = 4


class LatentCoder:
    """Latents x = (z - shift_factor) scaling_factor, by the numbers in the VAE's config, on the device of their images.

    z is the mode of the VAE's posterior, without noise: a resumed run sees the same latents. A shift_factor that the
    config does not have is 0, as for PixArt and Sana.

    Args:
        autoencoder: the VAE of the pipeline.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        config = autoencoder.model.config
        self.autoencoder = autoencoder
        self.shift: float = config.get("shift_factor") or 0.0
        self.scale: float = config.get("scaling_factor") or 1.0

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z p q"]:
        """Return the latents of images in [-1, 1], in their dtype."""
        self.autoencoder.to(images.device)
        encoded = torch.cat([self.autoencoder.encode(part.float()) for part in images.split(CHUNK)])
        return ((encoded - self.shift) * self.scale).to(images.dtype)

    def decode(self, x: Float[Tensor, "b z p q"]) -> Float[Tensor, "b c h w"]:
        """Return the images of latents, clamped to [-1, 1]."""
        self.autoencoder.to(x.device)
        parts = (x.float() / self.scale + self.shift).split(CHUNK)
        return torch.cat([self.autoencoder.decode(part) for part in parts])
