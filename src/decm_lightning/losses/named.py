"""Presets by their names, for configs and the command line."""

from typing import Literal, get_args

from decm_lightning.losses import presets, rivals
from decm_lightning.losses.objective import Objective

PresetName = Literal[
    "paper",
    "end_identity",
    "whole_triangle",
    "consistency_and_flow_matching",
    "consistency_only",
    "flow_matching_only",
    "alpha_flow",
    "ayf_emd",
    "ayf_lmd",
    "discrete_consistency",
    "facm",
    "free_flow",
    "lagrangian",
    "mean_flow",
    "scm",
    "shortcut",
    "split_mean_flow",
]
"""Names of the presets of DE-CM, and of other published methods."""


def named(name: str) -> Objective:
    """Return a preset with its default settings.

    Raises:
        ValueError: if no preset has this name.
    """
    if name not in get_args(PresetName):
        raise ValueError(f"objective must be an Objective or one of {', '.join(get_args(PresetName))}: got {name!r}")
    preset = getattr(presets, name, None) or getattr(rivals, name)
    found: Objective = preset()
    return found
