"""Compare runs: read them, measure what their tables lack, and write one report."""

from decm_lightning.compare.report import compare

__all__ = ["compare"]
