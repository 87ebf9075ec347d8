"""A metric of your own: Fréchet distance on your own features, and the contrast of the images.

    python examples/extend_metric.py
    decm score --samples samples --reference real --features extend_metric.PixelFeatures

`Evaluation` (in training and `decm test`) and `decm score` accept any nn.Module with `num_features` that maps uint8
images (b, c, h, w) to features (b, num_features), and measure the Fréchet distance and the kernel distance (KID) on
them. A `FeatureNetwork` can also name itself and choose its metrics. Each metric updates a torchmetrics.Metric, so it
is right on several processes, and returns its values by column of the quality table. In a config:

    features: {class_path: extend_metric.PixelFeatures}
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from decm_lightning.metrics import FeatureMetrics, FeatureNetwork
from decm_lightning.metrics.metric import Counts, FeatureMetric, Frechet, Prompts


class Contrast(FeatureMetric):
    """The mean standard deviation of the pixels of a generated image: 0 for gray images."""

    in_validation = True
    needs_real = False

    def __init__(self) -> None:
        super().__init__(("contrast",), "features", MeanMetric())

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Add the features of a batch, (b, num_features)."""
        if not real:
            self.metric.update(views[self.view].std(1))

    def describe(self, counts: Counts) -> str:
        """Return a line for the protocol."""
        return "mean standard deviation of an image's pixels, in [0, 1]"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the value of the column."""
        return {"contrast": self.metric.compute().item()}


class PixelFeatures(FeatureNetwork):
    """The pixels of 8 x 8 gray images, from 0 to 1, as features."""

    name = "pixels"
    num_features = 64

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, (b, 64), of uint8 images, (b, 1, 8, 8)."""
        return images.flatten(1).float() / 255

    def metrics(self) -> list[FeatureMetric]:
        """Return new metrics for one measurement."""
        return [Frechet("fd", "features", self.num_features), Contrast()]


def main() -> dict[str, float]:
    """Measure random images of low contrast against random images of high contrast."""
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randint(0, 256, (2, 500, 1, 8, 8), generator=generator, dtype=torch.uint8)
    quality = FeatureMetrics(PixelFeatures())
    quality.update(real, real=True)
    quality.update(generated // 4 + 96, real=False)
    values = quality.compute()
    print(", ".join(f"{column} {value:.3f}" for column, value in values.items()))
    return values


if __name__ == "__main__":
    main()
