"""Autoencoders (VAEs) behind one interface: encode images to latents and decode latents to images."""

from decm_lightning.autoencoders.autoencoder import Autoencoder
from decm_lightning.autoencoders.latent_coder import LatentCoder
from decm_lightning.autoencoders.loading import load_autoencoder
from decm_lightning.autoencoders.normalization import LatentNormalization

__all__ = ["Autoencoder", "LatentCoder", "LatentNormalization", "load_autoencoder"]
