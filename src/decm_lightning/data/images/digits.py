"""The handwritten digits included in scikit-learn: 1,797 images of 8 x 8 pixels in ten classes."""

import torch

from decm_lightning.data.images.labelled_images import LabelledImages
from decm_lightning.data.resumable import ResumableData
from decm_lightning.errors import needs


class Digits(ResumableData):
    """scikit-learn's digits, (1, 8, 8), scaled from 0..16 to [-1, 1], for training and as the reference."""

    num_classes = 10
    class_names = tuple("0123456789")

    def setup(self, stage: str) -> None:
        """Load the digits.

        Raises:
            ImportError: if scikit-learn is not installed.
        """
        with needs("Digits", "scikit-learn", "demo"):
            from sklearn.datasets import load_digits
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        self.train = self.reference = LabelledImages(images, torch.tensor(digits.target))
