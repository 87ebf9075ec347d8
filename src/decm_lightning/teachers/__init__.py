"""Teachers: frozen velocity fields, converted to the convention of `path`."""

from decm_lightning.teachers.diffusers_prompts import DiffusersPrompts
from decm_lightning.teachers.diffusers_teacher import DiffusersTeacher
from decm_lightning.teachers.formula import ExactTeacher, NoTeacher
from decm_lightning.teachers.pretrained import PretrainedTeacher
from decm_lightning.teachers.teacher import Teacher

__all__ = ["DiffusersPrompts", "DiffusersTeacher", "ExactTeacher", "NoTeacher", "PretrainedTeacher", "Teacher"]
