"""The exact derivative in one pass: dual values (u, jvp) pushed through the network's ordinary forward."""

from decm_lightning.derivatives.dual import attention, layers, pointwise, structure
from decm_lightning.derivatives.dual.engine import dual
from decm_lightning.derivatives.dual.fused_check import check_fused
from decm_lightning.derivatives.dual.value import NoTangentError

# The modules of rules are imported for the rules that they register.
__all__ = ["NoTangentError", "attention", "check_fused", "dual", "layers", "pointwise", "structure"]
