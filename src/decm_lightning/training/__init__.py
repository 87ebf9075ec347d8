"""Training: the module shared by teachers and students, with averaging, schedule, checks, resuming and sharding."""

from decm_lightning.training.averaging import EMA
from decm_lightning.training.checks import TrainingChecks
from decm_lightning.training.flow_training import FlowTraining
from decm_lightning.training.last_step import LastStep
from decm_lightning.training.muon import Muon
from decm_lightning.training.run_progress import RunProgress
from decm_lightning.training.schedule import WarmupCosine
from decm_lightning.training.strategies import FSDP2

__all__ = ["EMA", "FSDP2", "FlowTraining", "LastStep", "Muon", "RunProgress", "TrainingChecks", "WarmupCosine"]
