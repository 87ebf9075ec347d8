"""Metrics of generated images, feature networks to measure them on, and reference images."""

from decm_lightning.metrics.dinov2 import DINOv2Features
from decm_lightning.metrics.feature_metrics import FeatureMetrics
from decm_lightning.metrics.features import FeatureNetwork
from decm_lightning.metrics.inception import InceptionFeatures
from decm_lightning.metrics.prompt_scores import BLIPScore, CLIPScore
from decm_lightning.metrics.reference import Reference

__all__ = [
    "BLIPScore",
    "CLIPScore",
    "DINOv2Features",
    "FeatureMetrics",
    "FeatureNetwork",
    "InceptionFeatures",
    "Reference",
]
