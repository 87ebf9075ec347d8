"""Dual-End Consistency Models on PyTorch Lightning: few-step generators from diffusion and flow-matching teachers.

Names are imported on first use. `import decm_lightning` loads neither torch nor Lightning. The method (`load`, the
presets, the samplers) never loads Lightning, which takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decm_lightning.corrected_distiller import CorrectedDistiller as CorrectedDistiller
    from decm_lightning.distiller import Distiller as Distiller
    from decm_lightning.guidance import Guidance as Guidance
    from decm_lightning.losses import Objective as Objective
    from decm_lightning.losses import alpha_flow as alpha_flow
    from decm_lightning.losses import ayf_emd as ayf_emd
    from decm_lightning.losses import ayf_lmd as ayf_lmd
    from decm_lightning.losses import consistency_and_flow_matching as consistency_and_flow_matching
    from decm_lightning.losses import consistency_only as consistency_only
    from decm_lightning.losses import discrete_consistency as discrete_consistency
    from decm_lightning.losses import end_identity as end_identity
    from decm_lightning.losses import facm as facm
    from decm_lightning.losses import flow_matching_only as flow_matching_only
    from decm_lightning.losses import free_flow as free_flow
    from decm_lightning.losses import lagrangian as lagrangian
    from decm_lightning.losses import mean_flow as mean_flow
    from decm_lightning.losses import paper as paper
    from decm_lightning.losses import scm as scm
    from decm_lightning.losses import shortcut as shortcut
    from decm_lightning.losses import split_mean_flow as split_mean_flow
    from decm_lightning.losses import whole_triangle as whole_triangle
    from decm_lightning.networks import Network as Network
    from decm_lightning.networks import load as load
    from decm_lightning.networks import save as save
    from decm_lightning.samplers import consistency as consistency
    from decm_lightning.samplers import euler as euler
    from decm_lightning.samplers import flow_map as flow_map
    from decm_lightning.samplers import mix as mix
    from decm_lightning.teacher_training import TeacherTraining as TeacherTraining
    from decm_lightning.teachers import Teacher as Teacher
    from decm_lightning.types import Batch as Batch
    from decm_lightning.types import Captions as Captions

    __version__: str

_MODULES = {
    "Batch": "types",
    "Captions": "types",
    "CorrectedDistiller": "corrected_distiller",
    "Distiller": "distiller",
    "Guidance": "guidance",
    "Network": "networks",
    "Objective": "losses",
    "Teacher": "teachers",
    "TeacherTraining": "teacher_training",
    "alpha_flow": "losses",
    "ayf_emd": "losses",
    "ayf_lmd": "losses",
    "consistency": "samplers",
    "consistency_and_flow_matching": "losses",
    "consistency_only": "losses",
    "discrete_consistency": "losses",
    "end_identity": "losses",
    "euler": "samplers",
    "facm": "losses",
    "flow_map": "samplers",
    "flow_matching_only": "losses",
    "free_flow": "losses",
    "lagrangian": "losses",
    "load": "networks",
    "mean_flow": "losses",
    "mix": "samplers",
    "paper": "losses",
    "save": "networks",
    "scm": "losses",
    "shortcut": "losses",
    "split_mean_flow": "losses",
    "whole_triangle": "losses",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("decm-lightning")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_MODULES, "__version__"])
