"""Evaluation: generate samples, measure them against real images, and write tables and images."""

from decm_lightning.evaluation.evaluation import Evaluation
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.sample_grid import SampleGrid
from decm_lightning.evaluation.sample_writer import SampleWriter
from decm_lightning.evaluation.spec import SamplingSpec

__all__ = ["Evaluation", "SampleGenerator", "SampleGrid", "SampleWriter", "SamplingSpec"]
