"""Dual-End Consistency Models on PyTorch Lightning: fast image generators from slow diffusion and flow teachers."""

from typing import Any

__all__ = ["Distiller", "TeacherTraining", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: Lightning takes seconds to import, and the method itself needs none of it.
    if name == "load":
        from decm_lightning.networks import load

        return load
    if name == "Distiller":
        from decm_lightning.distiller import Distiller

        return Distiller
    if name == "TeacherTraining":
        from decm_lightning.teacher_training import TeacherTraining

        return TeacherTraining
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
