"""Data modules: images with classes, latents of a VAE, and pairs of text and image."""

from decm_lightning.data.images import Digits, IDXImages
from decm_lightning.data.latents import ImageNetLatents
from decm_lightning.data.pairs import TextImagePairs

__all__ = ["Digits", "IDXImages", "ImageNetLatents", "TextImagePairs"]
