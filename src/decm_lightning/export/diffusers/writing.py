"""Write a network as a folder of diffusers: transformer, scheduler, VAE and text encoders, and their code."""

from pathlib import Path

import torch

from decm_lightning.export.diffusers.target import check_target, replaced
from decm_lightning.networks import DiT, Network, TextDiT
from decm_lightning.teachers.diffusers_network import DiffusersNetwork


def write(
    network: Network,
    out: Path,
    dtype: torch.dtype,
    vae: str | None = None,
    latents: str | None = None,
    encoder: str | None = None,
) -> list[Path]:
    """Write a folder that `DiffusionPipeline.from_pretrained(out, trust_remote_code=True)` loads.

    Args:
        network: a `DiT`, a `TextDiT`, or a student of Stable Diffusion 3.
        out: the folder. An earlier export is replaced once the new one is complete.
        dtype: dtype of the transformer's weights. VAE and text encoders keep theirs.
        vae: the VAE of the latents; None for the one in the network's record, or for networks that generate images.
        latents: the folder of latents that a class-conditional network was trained on; None for the normalization in
            its record.
        encoder: the text encoder of a `TextDiT`; None for the one in its record or config.

    Returns:
        the files of the folder.

    Raises:
        ImportError: if diffusers is older than 0.39, or transformers is needed and missing.
        OSError: if a part does not exist or the folder cannot be written.
        ValueError: if the folder contains anything else, or the network cannot be exported with these parts.
    """
    check_target(out)
    try:
        from diffusers import FlowMapEulerDiscreteScheduler  # noqa: F401
    except ImportError as error:
        raise ImportError("--to diffusers needs diffusers 0.39 or newer: pip install -U diffusers") from error
    from decm_lightning.export.diffusers import components

    if isinstance(network, TextDiT):
        pipeline = components.text_pipeline(network, dtype, vae, latents, encoder)
    elif isinstance(network, DiT):
        pipeline = components.class_pipeline(network, dtype, vae, latents)
    elif isinstance(network, DiffusersNetwork):
        pipeline = components.sd3_pipeline(network, dtype)
    else:
        raise ValueError(f"--to diffusers writes DiT, TextDiT and students of SD3: got {type(network).__name__}")
    with replaced(out) as folder:
        pipeline.save_pretrained(folder)
    return sorted(file for file in out.rglob("*") if file.is_file())
