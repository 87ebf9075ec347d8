"""decm export: write a checkpoint's averaged weights to a folder that `load`, `decm sample` and teachers read."""

from typing import Literal

import torch

from decm_lightning.networks import load, save
from decm_lightning.networks.pretrained import check_target


def export(
    checkpoint: str, out: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32", trust: bool = False
) -> None:
    """Write a checkpoint's averaged weights as config.json and model.safetensors.

    Args:
        checkpoint: a checkpoint written by decm fit: a .ckpt file, or a folder of shards.
        out: the folder to write. An existing network is replaced once the new one is complete.
        dtype: dtype of the stored weights. float16 halves the file and rounds each weight to 1 part in 2,000. Networks
            loaded from the folder always compute in float32.
        trust: allow a network class from outside this package; importing its module runs its code.
    """
    # Reading the checkpoint may take minutes, so the target is checked first.
    folder = check_target(out)
    save(load(checkpoint, trust=trust).to(getattr(torch, dtype)), folder)
    print(f"wrote {folder}/config.json and {folder}/model.safetensors")
