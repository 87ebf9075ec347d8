"""The handwritten digits included in scikit-learn: 1,797 images of 8 x 8 pixels in ten classes."""

import torch

from decm_lightning.data.images.in_memory import LabelledImages
from decm_lightning.data.resumable import ResumableData
from decm_lightning.errors import missing_extra


class Digits(ResumableData):
    """scikit-learn's digits, (1, 8, 8), scaled from 0..16 to [-1, 1]. All are used for training and as the reference.

    Args:
        batch_size: images per training batch on each device, at least 1.
        reference_size: maximum number of reference images; None for all 1,797.
        num_workers: number of loading processes; 0 is fastest here.
    """

    num_classes = 10

    def __init__(self, batch_size: int = 128, reference_size: int | None = None, num_workers: int = 0) -> None:
        super().__init__(batch_size, reference_size, num_workers)

    def setup(self, stage: str) -> None:
        """Load the digits.

        Raises:
            ImportError: if scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise missing_extra("Digits", "scikit-learn", "demo") from error
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        self.train = self.reference = LabelledImages(images, torch.tensor(digits.target))
