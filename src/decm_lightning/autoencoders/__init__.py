"""Autoencoders (VAEs) behind one interface: encode images to latents and decode latents to images."""

from decm_lightning.autoencoders.autoencoder import Autoencoder
from decm_lightning.autoencoders.loading import load_autoencoder

__all__ = ["Autoencoder", "load_autoencoder"]
