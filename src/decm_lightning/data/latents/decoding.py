"""Pictures from latents: the scaling of training undone, then the VAE's decoder."""

from pathlib import Path

import torch

from decm_lightning.autoencoders import Autoencoder, load_autoencoder
from decm_lightning.data.latents.scaling import Scaling
from decm_lightning.data.latents.shards import Provenance
from decm_lightning.types import Sample

# A 256 x 256 image takes a few hundred megabytes while it is decoded.
CHUNK = 16


class LatentDecoder:
    """Images in [-1, 1] from scaled latents (b, c, h, w), decoded 16 at a time on their device.

    Args:
        autoencoder: the VAE that encoded the images that the latents are of.
        scaling: what training did to the latents.

    Raises:
        ValueError: if the VAE has another number of channels.
    """

    def __init__(self, autoencoder: Autoencoder, scaling: Scaling) -> None:
        channels = scaling.mean.shape[1]
        if autoencoder.latent_channels != channels:
            raise ValueError(f"the latents have {channels} channels: the VAE's have {autoencoder.latent_channels}")
        self.autoencoder = autoencoder
        self.scaling = scaling

    @torch.no_grad()
    def __call__(self, x: Sample) -> Sample:
        """Return the images."""
        self.autoencoder.to(x.device)
        return torch.cat([self.autoencoder.decode(self.scaling.inverse(part.float())) for part in x.split(CHUNK)])

    @classmethod
    def read(cls, vae: str, folder: str | Path, scaling: Scaling | None = None) -> "LatentDecoder":
        """Return the decoder of a folder's latents.

        Args:
            vae: the VAE, as `load_autoencoder` takes it.
            folder: the latents; cache.json and latents_stats.pt are all that is read.
            scaling: what training did to them; None for what cache.json says, or else (x - mean) / std.

        Raises:
            FileNotFoundError: if there is no such VAE, or no latents_stats.pt.
            ValueError: if the VAE is not the one that cache.json names, or its latents have other channels.
        """
        autoencoder, provenance = load_autoencoder(vae), Provenance.read(folder)
        if provenance is not None:
            provenance.check_vae(folder, vae, autoencoder.identity)
        if scaling is None:
            options = provenance.scaling if provenance else {"latent_norm": True, "latent_multiplier": 1.0}
            scaling = Scaling.read(
                folder, autoencoder.latent_channels, bool(options["latent_norm"]), options["latent_multiplier"]
            )
        return cls(autoencoder, scaling)
