"""decm export: write a checkpoint's averaged weights in a format that other programs, or `load`, read."""

from pathlib import Path
from typing import Literal

import torch

from decm_lightning.export import Format, writer
from decm_lightning.networks import load
from decm_lightning.networks.pretrained import check_target


def export(
    checkpoint: str,
    out: str,
    to: Format = "folder",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    trust: bool = False,
) -> None:
    """Write a checkpoint's averaged weights in one of several formats.

    Args:
        checkpoint: a checkpoint written by decm fit (a .ckpt file, or a folder of shards), or an exported folder.
        out: the folder or file to write. An existing network is replaced once the new one is complete.
        to: folder (config.json and model.safetensors, which decm_lightning.load, decm sample and teachers read);
            lora or lora-comfyui (one LoRA .safetensors file of an SD3, Flux or Sana student, for load_lora_weights of
            diffusers or for ComfyUI; consistency sampler only).
        dtype: dtype of the stored weights. float16 halves the file and rounds each weight to 1 part in 2,000. Networks
            loaded from the folder always compute in float32.
        trust: allow a network class from outside this package; importing its module runs its code.
    """
    # Reading the checkpoint may take minutes, so the target is checked first.
    target = check_target(out) if to == "folder" else Path(out)
    files = writer(to)(load(checkpoint, trust=trust), target, getattr(torch, dtype))
    print(f"wrote {', '.join(map(str, files))}")
