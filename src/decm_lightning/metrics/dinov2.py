"""DINOv2 as a feature network. Its Fréchet distance agrees best with human judgement (arXiv 2306.04675)."""

import torch
from torch import Tensor, nn

from decm_lightning.metrics.features import FeatureNetwork, as_rgb, from_pretrained
from decm_lightning.metrics.metric import FeatureMetric, Frechet

SIDE = 224
# Mean and standard deviation of ImageNet pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DINOv2Features(FeatureNetwork):
    """The class token of DINOv2 (arXiv 2304.07193); column `fd_dinov2`.

    The settings are those of dgm-eval, the code of arXiv 2306.04675: ViT-L/14 on images of 224 x 224 pixels (bicubic,
    antialiased, rounded to integers), normalized by ImageNet's mean and standard deviation. transformers interpolates
    the position embedding slightly differently from the original code, so the last digits differ from published values.

    Args:
        model: a folder written by Dinov2Model.save_pretrained, or a name on the Hugging Face hub.

    Raises:
        ImportError: if transformers is not installed.
        OSError: if the model does not exist.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str = "facebook/dinov2-large") -> None:
        super().__init__()
        (self.network,) = from_pretrained(model, "Dinov2Model", extra="dinov2")
        self.num_features: int = self.network.config.hidden_size
        self.name = f"DINOv2 ({model})"
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (b, num_features) of uint8 images (b, 1 or 3, h, w).

        Raises:
            ValueError: if the number of channels is not 1 or 3.
        """
        x = as_rgb(images, "DINOv2")
        x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
        return self.network(pixel_values=(x - self.mean) / self.std).last_hidden_state[:, 0]

    def metrics(self) -> list[FeatureMetric]:
        """Return `fd_dinov2`."""
        return [Frechet("fd_dinov2", "features", self.num_features)]
