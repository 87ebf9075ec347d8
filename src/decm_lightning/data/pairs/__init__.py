"""Text-image pairs."""

from decm_lightning.data.pairs.text_image_pairs import TextImagePairs

__all__ = ["TextImagePairs"]
