"""Engines that compute jvp, the student's derivative along a tangent over (x, t, s): one file each, one signature."""

from decm_lightning.derivatives.central import central
from decm_lightning.derivatives.choice import ENGINES, Choice, EngineName, choose
from decm_lightning.derivatives.dual import NoTangentError, check_fused, dual
from decm_lightning.derivatives.forward import Engine, Jump, JVPResult, Tangent, forward_with_jvp
from decm_lightning.derivatives.functional import functional

__all__ = [
    "ENGINES",
    "Choice",
    "Engine",
    "EngineName",
    "JVPResult",
    "Jump",
    "NoTangentError",
    "Tangent",
    "central",
    "check_fused",
    "choose",
    "dual",
    "forward_with_jvp",
    "functional",
]
