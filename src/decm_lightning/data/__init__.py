"""Data modules: one LightningDataModule a file."""

from decm_lightning.data.digits import Digits
from decm_lightning.data.idx import IDXImages

__all__ = ["Digits", "IDXImages"]
