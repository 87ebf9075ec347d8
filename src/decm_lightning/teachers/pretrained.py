"""A teacher kept in a folder or checkpoint of this package."""

from decm_lightning.networks import load
from decm_lightning.teachers.teacher import Teacher


class PretrainedTeacher(Teacher):
    """A DiT trained by `TeacherTraining`.

    Args:
        path: a folder (config.json and model.safetensors) or a Lightning checkpoint, whose averaged weights are used.
        allow_import: import the module of a network class that is not of this package, which runs its code.
    """

    def __init__(self, path: str, allow_import: bool = False) -> None:
        super().__init__(load(path, allow_import=allow_import))
