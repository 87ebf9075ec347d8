"""decm export: a checkpoint's averaged weights as a folder that `load`, `decm sample` and a teacher read."""

from collections.abc import Sequence
from typing import Literal

import torch
from jsonargparse import auto_cli

from decm_lightning.networks import load, save


def export(checkpoint: str, out: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
    """Write config.json and model.safetensors.

    Args:
        checkpoint: a .ckpt file written by decm fit.
        out: the folder to write.
        dtype: of the weights in the file; float16 halves it, and rounds each to a part in 2,000. What reads the folder
            computes in float32 all the same.
    """
    save(load(checkpoint).to(getattr(torch, dtype)), out)
    print(f"wrote {out}/config.json and {out}/model.safetensors")


def run(argv: Sequence[str]) -> None:
    """Parse and export."""
    auto_cli(export, args=list(argv), prog="decm export", exit_on_error=False)
