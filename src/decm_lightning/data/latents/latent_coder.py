"""Load the VAE of a folder of latents, with their normalization."""

from pathlib import Path

from decm_lightning.autoencoders import LatentCoder, LatentNormalization, load_autoencoder
from decm_lightning.data.latents.provenance import Provenance


def read_coder(vae: str, folder: str | Path, normalization: LatentNormalization | None = None) -> LatentCoder:
    """Load the coder for a folder of latents.

    Args:
        vae: the VAE; see `load_autoencoder`.
        folder: folder of the latents, with cache.json and latents_stats.pt.
        normalization: normalization used in training; None for the one in cache.json, or else (z - mean) / std.

    Raises:
        FileNotFoundError: if the VAE or latents_stats.pt does not exist.
        ValueError: if cache.json names another VAE, or the latents have another number of channels.
    """
    autoencoder, provenance = load_autoencoder(vae), Provenance.read(folder)
    if provenance is not None:
        provenance.check_vae(folder, vae, autoencoder.identity)
    if normalization is None:
        options = provenance.scaling if provenance else {"latent_norm": True, "latent_multiplier": 1.0}
        normalization = LatentNormalization.read(
            folder, autoencoder.latent_channels, bool(options["latent_norm"]), options["latent_multiplier"]
        )
    return LatentCoder(autoencoder, normalization)
