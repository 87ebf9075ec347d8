"""Teachers: frozen velocity fields, one family a file, each converted into the convention of `path`."""

from decm_lightning.teachers.diffusers_dit import DiffusersDiTTeacher
from decm_lightning.teachers.dit import DiTTeacher
from decm_lightning.teachers.exact import ExactTeacher
from decm_lightning.teachers.lightningdit import LightningDiTTeacher
from decm_lightning.teachers.teacher import Teacher

__all__ = ["DiTTeacher", "DiffusersDiTTeacher", "ExactTeacher", "LightningDiTTeacher", "Teacher"]
