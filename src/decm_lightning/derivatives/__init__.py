"""How du, the student's derivative along a tangent over (x, t, s), is computed: one engine a file, one signature."""

from decm_lightning.derivatives.central import central
from decm_lightning.derivatives.choice import ENGINES, Choice, EngineName, choose
from decm_lightning.derivatives.dual import NoTangentError, check_fused, dual
from decm_lightning.derivatives.functional import functional
from decm_lightning.derivatives.jet import Engine, Jet, Jump, Tangent, evaluate

__all__ = [
    "ENGINES",
    "Choice",
    "Engine",
    "EngineName",
    "Jet",
    "Jump",
    "NoTangentError",
    "Tangent",
    "central",
    "check_fused",
    "choose",
    "dual",
    "evaluate",
    "functional",
]
