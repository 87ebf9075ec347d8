"""Exact derivative in one pass: dual values (u, jvp) propagate through the network's ordinary forward pass."""

from decm_lightning.derivatives.dual import attention, layers, pointwise, structure
from decm_lightning.derivatives.dual.engine import dual
from decm_lightning.derivatives.dual.fused_check import check_fused
from decm_lightning.derivatives.dual.value import NoTangentError

# Importing attention, layers, pointwise and structure registers their rules.
__all__ = ["NoTangentError", "attention", "check_fused", "dual", "layers", "pointwise", "structure"]
