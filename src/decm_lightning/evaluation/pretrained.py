"""Trained networks as they were loaded, as modules that `Evaluation` measures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.networks import Network
from decm_lightning.networks.hub import download, is_hub_name
from decm_lightning.networks.record import CONFIG
from decm_lightning.samplers import flow_map_of
from decm_lightning.teachers import DiffusersTeacher, PretrainedTeacher, Teacher
from decm_lightning.teachers.diffusers_families import FAMILIES
from decm_lightning.types import FlowMapNetwork

PIPELINE = "model_index.json"


class PretrainedModel(L.LightningModule):
    """A network as it was loaded: a `student`, or a guided `teacher` if it ignores the end time.

    Args:
        path: what `PretrainedTeacher` reads (a folder, training checkpoint, or public LightningDiT, SiT or DiT), or
            what `DiffusersTeacher` reads (a pipeline or transformer of diffusers); a path or a name on the hub.
        guidance: how a teacher is guided.
        trust: import the module of a network class from outside this package, which runs its code.

    Attributes:
        average: the network.
        guidance: how the teacher is guided; it may be replaced between two measurements.

    Raises:
        OSError: if nothing exists at `path`, or it may not be read.
        ValueError: if the network cannot be read.
    """

    teacher: Teacher | None = None
    """The teacher of a student, see `load_teacher`. A teacher itself is counted as `average`."""
    ema_decay: float | None = None

    def __init__(self, path: str, guidance: Guidance = Guidance(), trust: bool = False) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.path = path
        self.guidance = guidance
        self.loaded: Teacher = DiffusersTeacher(path) if is_diffusers(path) else PretrainedTeacher(path, trust=trust)
        self.average: Network = self.loaded.network

    @property
    def is_student(self) -> bool:
        """Whether the network is a flow map, for which guidance has no effect."""
        return self.average.reads_end_time

    def load_teacher(self) -> None:
        """Load the teacher of a student's record, with its guidance, if a local file or folder still has its weights.

        The teacher can then be sampled next to the student. Otherwise nothing changes.
        """
        record = self.average.record
        if not (record and record.teacher and record.guidance and Path(record.teacher.name).exists()):
            return
        try:
            teacher = PretrainedTeacher(record.teacher.name)
        except (OSError, ValueError, ImportError):
            return
        if teacher.identity() == record.teacher.identity:
            self.teacher, self.guidance = teacher, Guidance(**record.guidance)

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return the flow maps: "teacher" for a teacher, and "student", with its "teacher" if that is loaded."""
        teacher = self.teacher if self.is_student else self.loaded
        teachers = (
            {} if teacher is None else {"teacher": flow_map_of(GuidedField(teacher, teacher.null, self.guidance))}
        )
        return ({"student": self.average} if self.is_student else {}) | teachers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PretrainedModel":
        # The teacher is not a submodule.
        if self.teacher is not None:
            self.teacher.apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing, because the evaluation callback reads the real images."""

    test_step = validation_step


def is_diffusers(path: str) -> bool:
    """Return whether a path or hub name is a pipeline of diffusers, or one of its transformers."""
    folder = download(path, "model", [PIPELINE, CONFIG]) if is_hub_name(path) else Path(path)
    if (folder / PIPELINE).is_file():
        return True
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") in FAMILIES
