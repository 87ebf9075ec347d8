"""Callbacks: averaging, evaluation, gradient norms, sample grids, throughput."""

from decm_lightning.callbacks.ema import EMA

__all__ = ["EMA"]
