"""Metrics of generated images, the feature networks they are measured on, and real images to compare with."""

from decm_lightning.metrics.captions import CaptionProbe
from decm_lightning.metrics.dinov2 import DINOv2Features
from decm_lightning.metrics.features import DigitsFeatures, EfficientNetLite0Features
from decm_lightning.metrics.inception import InceptionFeatures
from decm_lightning.metrics.prompt_scores import CLIP, HPS, BLIPScore, ImageReward
from decm_lightning.metrics.quality import Quality
from decm_lightning.metrics.reference import Reference

__all__ = [
    "CLIP",
    "HPS",
    "BLIPScore",
    "CaptionProbe",
    "DINOv2Features",
    "DigitsFeatures",
    "EfficientNetLite0Features",
    "ImageReward",
    "InceptionFeatures",
    "Quality",
    "Reference",
]
