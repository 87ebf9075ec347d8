"""decm export: write a checkpoint's averaged weights in a format that other programs, or `load`, read."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Literal

import torch

from decm_lightning.export import Format, writer
from decm_lightning.export.diffusers.target import check_target as check_pipeline_folder
from decm_lightning.networks import load
from decm_lightning.networks.pretrained import check_target as check_network_folder

CHECKS: dict[Format, Callable[[str], Path]] = {"folder": check_network_folder, "diffusers": check_pipeline_folder}
"""Functions that check the target of a format."""


def export(
    checkpoint: str,
    out: str,
    to: Format = "folder",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    vae: str | None = None,
    latents: str | None = None,
    encoder: str | None = None,
    trust: bool = False,
) -> None:
    """Write a checkpoint's averaged weights in one of several formats.

    Args:
        checkpoint: a checkpoint written by decm fit (a .ckpt file, or a folder of shards), or an exported folder.
        out: the folder or file to write. An existing network is replaced once the new one is complete.
        to: folder (config.json and model.safetensors, which decm_lightning.load, decm sample and teachers read);
            diffusers (a folder that DiffusionPipeline.from_pretrained loads with trust_remote_code=True);
            lora or lora-comfyui (one LoRA .safetensors file of an SD3, Flux or Sana student, for load_lora_weights of
            diffusers or for ComfyUI; consistency sampler only).
        dtype: dtype of the stored weights. float16 halves the file and rounds each weight to 1 part in 2,000. Networks
            loaded from the folder always compute in float32.
        vae: for diffusers, the VAE of the latents, unless the model records it: a folder, a name on the Hugging Face
            hub, or a file such as VA-VAE's.
        latents: for diffusers, the folder of latents that the model was trained on, unless the model records their
            normalization.
        encoder: for diffusers, the text encoder that the model was trained with, unless the model records it: minilm,
            a folder or a name on the Hugging Face hub.
        trust: allow a network class from outside this package; importing its module runs its code.
    """
    # Reading the checkpoint may take minutes, so the target is checked first.
    target = CHECKS.get(to, Path)(out)
    write = writer(to)
    options = {name: value for name, value in (("vae", vae), ("latents", latents), ("encoder", encoder)) if value}
    if unknown := options.keys() - signature(write).parameters.keys():
        raise ValueError(f"--to {to} has no option --{min(unknown)}: leave it out")
    files = write(load(checkpoint, trust=trust), target, getattr(torch, dtype), **options)
    print(f"wrote {', '.join(map(str, files))}")
