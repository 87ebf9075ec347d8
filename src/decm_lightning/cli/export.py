"""decm export: a checkpoint's averaged weights as a folder that `load`, `decm sample` and a teacher read."""

from collections.abc import Sequence
from typing import Literal

import torch
from jsonargparse import auto_cli

from decm_lightning.networks import load, save
from decm_lightning.networks.pretrained import check_target


def export(
    checkpoint: str,
    out: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    trust: bool = False,
) -> None:
    """Write config.json and model.safetensors.

    Args:
        checkpoint: a .ckpt file written by decm fit.
        out: the folder to write. An existing network is replaced when the new one is complete.
        dtype: of the weights in the file; float16 halves it, and rounds each to a part in 2,000. What reads the folder
            computes in float32 all the same.
        trust: import the module of a network class from outside this package, which runs its code.
    """
    # Before anything is read, which may take minutes.
    folder = check_target(out)
    save(load(checkpoint, trust=trust).to(getattr(torch, dtype)), folder)
    print(f"wrote {folder}/config.json and {folder}/model.safetensors")


def run(argv: Sequence[str]) -> None:
    """Parse and export."""
    auto_cli(export, args=list(argv), prog="decm export", exit_on_error=False)
