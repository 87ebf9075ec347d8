"""Autoencoders (VAEs): images to latents and back, behind one interface."""

from decm_lightning.autoencoders.autoencoder import Autoencoder
from decm_lightning.autoencoders.loading import load_autoencoder

__all__ = ["Autoencoder", "load_autoencoder"]
