"""Callbacks: averaging, evaluation, gradient norms, sample grids, throughput."""

from decm_lightning.callbacks.ema import EMA
from decm_lightning.callbacks.evaluation import Evaluation
from decm_lightning.callbacks.gradient_norms import GradientNorms
from decm_lightning.callbacks.sample_grid import SampleGrid
from decm_lightning.callbacks.sample_writer import SampleWriter
from decm_lightning.callbacks.throughput import Throughput

__all__ = ["EMA", "Evaluation", "GradientNorms", "SampleGrid", "SampleWriter", "Throughput"]
