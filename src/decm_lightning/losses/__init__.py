"""Few-step distillation losses: one residual on different edges of the triangle, and presets for published methods."""

from decm_lightning.losses.cost import Cost, cost
from decm_lightning.losses.dual_end import DualEndLoss, LossTerm, Objective
from decm_lightning.losses.presets import (
    consistency_and_flow_matching,
    consistency_only,
    end_identity,
    facm,
    flow_matching_only,
    lagrangian,
    mean_flow,
    paper,
)
from decm_lightning.losses.residual import residual, tangent

__all__ = [
    "Cost",
    "DualEndLoss",
    "LossTerm",
    "Objective",
    "consistency_and_flow_matching",
    "consistency_only",
    "cost",
    "end_identity",
    "facm",
    "flow_matching_only",
    "lagrangian",
    "mean_flow",
    "paper",
    "residual",
    "tangent",
]
