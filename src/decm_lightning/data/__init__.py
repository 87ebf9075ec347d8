"""Data modules: one LightningDataModule a file."""

from decm_lightning.data.digits import Digits
from decm_lightning.data.idx import IDXImages
from decm_lightning.data.latents import ImageNetLatents

__all__ = ["Digits", "IDXImages", "ImageNetLatents"]
