"""A teacher kept in a folder or checkpoint of this package."""

from decm_lightning.networks import load
from decm_lightning.teachers.teacher import Teacher


class DiTTeacher(Teacher):
    """A DiT trained by `TeacherTraining`.

    Args:
        path: a folder (config.json and model.safetensors) or a Lightning checkpoint, whose averaged weights are used.
    """

    def __init__(self, path: str) -> None:
        super().__init__(load(path))
