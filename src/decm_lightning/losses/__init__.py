"""Few-step losses: one residual on different regions of the triangle, and presets for published methods."""

from decm_lightning.losses.cost import Cost, cost
from decm_lightning.losses.loss import FlowMapLoss, LossTerm
from decm_lightning.losses.middle import Composition, Fraction, Middle
from decm_lightning.losses.named import PresetName, named
from decm_lightning.losses.objective import Objective
from decm_lightning.losses.presets import (
    consistency_and_flow_matching,
    consistency_only,
    end_identity,
    flow_matching_only,
    paper,
    whole_triangle,
)
from decm_lightning.losses.residual import residual, tangent
from decm_lightning.losses.rivals import (
    alpha_flow,
    ayf_emd,
    ayf_lmd,
    discrete_consistency,
    facm,
    free_flow,
    lagrangian,
    mean_flow,
    scm,
    shortcut,
    split_mean_flow,
)
from decm_lightning.losses.weighting import Normalize

__all__ = [
    "Composition",
    "Cost",
    "FlowMapLoss",
    "Fraction",
    "LossTerm",
    "Middle",
    "Normalize",
    "Objective",
    "PresetName",
    "alpha_flow",
    "ayf_emd",
    "ayf_lmd",
    "consistency_and_flow_matching",
    "consistency_only",
    "cost",
    "discrete_consistency",
    "end_identity",
    "facm",
    "flow_matching_only",
    "free_flow",
    "lagrangian",
    "mean_flow",
    "named",
    "paper",
    "residual",
    "scm",
    "shortcut",
    "split_mean_flow",
    "tangent",
    "whole_triangle",
]
