"""Metrics: distances between real and generated images, and the feature networks they are measured on."""

from decm_lightning.metrics.features import DigitsFeatures, EfficientNetLite0Features
from decm_lightning.metrics.quality import Quality

__all__ = ["DigitsFeatures", "EfficientNetLite0Features", "Quality"]
