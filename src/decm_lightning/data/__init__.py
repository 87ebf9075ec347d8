"""Data modules: one LightningDataModule a file."""

from decm_lightning.data.digits import Digits
from decm_lightning.data.emoji import Emoji
from decm_lightning.data.idx import IDXImages
from decm_lightning.data.latents import ImageNetLatents
from decm_lightning.data.text_image_pairs import TextImagePairs

__all__ = ["Digits", "Emoji", "IDXImages", "ImageNetLatents", "TextImagePairs"]
