"""DINOv2 as a feature network: the Fréchet distance that agrees best with what people see (arXiv 2306.04675)."""

from typing import Any

import torch
from torch import Tensor, nn

from decm_lightning.errors import missing_extra
from decm_lightning.metrics.feature_metrics import Frechet, Part

SIDE = 224
# ImageNet's, with which DINOv2 was trained, of pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DINOv2Features(nn.Module):
    """The class token of DINOv2 (arXiv 2304.07193); column `fd_dinov2`.

    As in the study of metrics above (dgm-eval): ViT-L/14, images of 224 x 224 pixels (bicubic, antialiased, rounded to
    whole levels), normalized by ImageNet's mean and standard deviation. transformers interpolates the position
    embedding a little otherwise than the original code, so the last digits differ from published ones.

    Args:
        model: a folder written by Dinov2Model.save_pretrained, or a name on the Hugging Face hub.

    Raises:
        ImportError: if transformers is not installed.
        OSError: if there is no such model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str = "facebook/dinov2-large") -> None:
        super().__init__()
        self.network = _dinov2(model)
        self.num_features: int = self.network.config.hidden_size
        self.name = f"DINOv2 ({model})"
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (b, num_features) of uint8 images (b, 1 or 3, h, w).

        Raises:
            ValueError: if there are neither 1 nor 3 channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"DINOv2 takes images (b, 1 or 3, h, w): got {tuple(images.shape)}")
        x = images.float().expand(-1, 3, -1, -1)
        x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
        return self.network(pixel_values=(x - self.mean) / self.std).last_hidden_state[:, 0]

    def parts(self) -> list[Part]:
        """Return what is measured on it."""
        return [Frechet("fd_dinov2", "features", self.num_features)]


def _dinov2(model: str) -> Any:
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise missing_extra("DINOv2Features", "transformers", "dinov2") from error
    try:
        return Dinov2Model.from_pretrained(model)
    except OSError as error:
        wanted = "give a folder written by Dinov2Model.save_pretrained, or a name on the Hugging Face hub"
        raise OSError(f"no DINOv2 at {model}: {wanted}") from error
