"""How du, the student's derivative along a tangent over (x, t, s), is computed: one engine a file, one signature."""

from typing import Literal

from decm_lightning.derivatives.central import central
from decm_lightning.derivatives.dual import dual
from decm_lightning.derivatives.functional import functional
from decm_lightning.derivatives.jet import Engine, Jet, Jump, Tangent, evaluate

EngineName = Literal["functional", "dual", "central"]
ENGINES: dict[EngineName, Engine] = {"functional": functional, "dual": dual, "central": central}

__all__ = ["ENGINES", "Engine", "EngineName", "Jet", "Jump", "Tangent", "central", "dual", "evaluate", "functional"]
