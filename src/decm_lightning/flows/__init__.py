"""Exact flows, whose velocity, mean velocity and flow map are known."""

from decm_lightning.flows.gaussian import Gaussian
from decm_lightning.flows.mixture import GaussianMixture

__all__ = ["Gaussian", "GaussianMixture"]
