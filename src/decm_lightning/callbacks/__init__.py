"""Callbacks: averaging, evaluation, gradient norms, the last step of a run, sample grids, throughput."""

from decm_lightning.callbacks.ema import EMA
from decm_lightning.callbacks.evaluation import Evaluation
from decm_lightning.callbacks.gradient_norms import GradientNorms
from decm_lightning.callbacks.last_step import LastStep
from decm_lightning.callbacks.sample_grid import SampleGrid
from decm_lightning.callbacks.sample_writer import SampleWriter
from decm_lightning.callbacks.throughput import Throughput
from decm_lightning.callbacks.training_checks import TrainingChecks

__all__ = [
    "EMA",
    "Evaluation",
    "GradientNorms",
    "LastStep",
    "SampleGrid",
    "SampleWriter",
    "Throughput",
    "TrainingChecks",
]
