"""Images with class labels."""

from decm_lightning.data.images.digits import Digits
from decm_lightning.data.images.folder import ImageFolder
from decm_lightning.data.images.idx import IDXImages

__all__ = ["Digits", "IDXImages", "ImageFolder"]
