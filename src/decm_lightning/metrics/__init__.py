"""Metrics of generated images, the feature networks they are measured on, and real images to compare with."""

from decm_lightning.metrics.dinov2 import DINOv2Features
from decm_lightning.metrics.inception import InceptionFeatures
from decm_lightning.metrics.prompt_scores import CLIP, HPS, BLIPScore, ImageReward
from decm_lightning.metrics.quality import Quality
from decm_lightning.metrics.reference import Reference

__all__ = [
    "CLIP",
    "HPS",
    "BLIPScore",
    "DINOv2Features",
    "ImageReward",
    "InceptionFeatures",
    "Quality",
    "Reference",
]
