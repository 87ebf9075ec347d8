"""Compare runs: read them, measure what their tables lack, and write one report."""
