"""Teachers: frozen velocity fields, one family a file, each converted into the convention of `path`."""

from decm_lightning.teachers.diffusers_dit import DiffusersDiTTeacher
from decm_lightning.teachers.diffusers_flux import DiffusersFluxTeacher
from decm_lightning.teachers.diffusers_pixart import DiffusersPixArtTeacher
from decm_lightning.teachers.diffusers_prompts import DiffusersPrompts
from decm_lightning.teachers.diffusers_sana import DiffusersSanaTeacher
from decm_lightning.teachers.diffusers_sd3 import DiffusersSD3Teacher
from decm_lightning.teachers.exact import ExactTeacher
from decm_lightning.teachers.facebook_dit import FacebookDiTTeacher
from decm_lightning.teachers.lightningdit import LightningDiTTeacher
from decm_lightning.teachers.pretrained import PretrainedTeacher
from decm_lightning.teachers.sit import SiTTeacher
from decm_lightning.teachers.teacher import Teacher

__all__ = [
    "DiffusersDiTTeacher",
    "DiffusersFluxTeacher",
    "DiffusersPixArtTeacher",
    "DiffusersPrompts",
    "DiffusersSD3Teacher",
    "DiffusersSanaTeacher",
    "ExactTeacher",
    "FacebookDiTTeacher",
    "LightningDiTTeacher",
    "PretrainedTeacher",
    "SiTTeacher",
    "Teacher",
]
