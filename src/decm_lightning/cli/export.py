"""decm export: a checkpoint's averaged weights as a folder that `load`, `decm sample` and a teacher read."""

from typing import Literal

import torch

from decm_lightning.networks import load, save
from decm_lightning.networks.pretrained import check_target


def export(
    checkpoint: str, out: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32", trust: bool = False
) -> None:
    """Write config.json and model.safetensors.

    Args:
        checkpoint: a checkpoint written by decm fit: a .ckpt file, or a folder of shards.
        out: the folder to write. An existing network is replaced when the new one is complete.
        dtype: of the weights in the file; float16 halves it, and rounds each weight to 1 part in 2,000. Networks that
            are read from the folder compute in float32 in any case.
        trust: import the module of a network class from outside this package, which runs its code.
    """
    # Before the checkpoint is read, which may take minutes.
    folder = check_target(out)
    save(load(checkpoint, trust=trust).to(getattr(torch, dtype)), folder)
    print(f"wrote {folder}/config.json and {folder}/model.safetensors")
