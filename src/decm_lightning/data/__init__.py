"""Data modules: images with class labels, latents of a VAE, and text-image pairs."""

from decm_lightning.data.conditions import Conditions
from decm_lightning.data.images import Digits, IDXImages, ImageFolder
from decm_lightning.data.latents import ImageNetLatents
from decm_lightning.data.pairs import TextImagePairs

__all__ = ["Conditions", "Digits", "IDXImages", "ImageFolder", "ImageNetLatents", "TextImagePairs"]
