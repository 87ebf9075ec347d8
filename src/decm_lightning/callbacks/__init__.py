"""Callbacks that only observe a run: gradient norms and throughput."""

from decm_lightning.callbacks.gradient_norms import GradientNorms
from decm_lightning.callbacks.throughput import Throughput

__all__ = ["GradientNorms", "Throughput"]
