"""The exact derivative in one pass: dual values (u, du) pushed through the network's ordinary forward."""

from decm_lightning.derivatives.dual import attention, layers, pointwise, structure
from decm_lightning.derivatives.dual.engine import dual

# The modules of rules are imported for the rules that they register.
__all__ = ["attention", "dual", "layers", "pointwise", "structure"]
