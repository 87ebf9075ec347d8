"""Studies that make the figures in docs/."""
