"""Autoencoders from folders, from the Hugging Face hub, and from latent diffusion's checkpoint files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decm_lightning.autoencoders import ldm
from decm_lightning.autoencoders.autoencoder import Autoencoder
from decm_lightning.networks.checkpoint_files import read_tensors
from decm_lightning.networks.diffusers_folder import find_config, from_pretrained, refuse_unfit

KINDS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
FILES = (".safetensors", ".pt", ".pth", ".ckpt")


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Return the autoencoder at `path`, in float32, on the CPU.

    A file holds an AutoencoderKL under the names of latent diffusion (CompVis), such as VA-VAE's, alone or under `ema`,
    `state_dict`, `model`, `vae` or `module`, and perhaps with prefixes such as `module.`; its architecture is read off
    the shapes of its tensors, and every tensor must have its place but those of the losses it was trained with. Of a
    whole latent diffusion model the first stage is read.

    Args:
        path: a folder or a name on the Hugging Face hub of one of diffusers' AutoencoderKL, AutoencoderDC and
            AutoencoderTiny, or of a pipeline with one in `vae`; or a .safetensors, .pt or .ckpt file.

    Raises:
        OSError: if there is nothing at `path`, it may not be read, or it is a name that the hub does not have.
        ValueError: if it is another model or file, or tensors are missing, left over, or of another shape.
    """
    path = Path(path)
    if path.is_file() or (path.suffix in FILES and not path.is_dir()):
        try:
            tensors = read_tensors(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no file {path}: give a VAE's file, its folder, or its name on the hub") from error
        return Autoencoder(_from_ldm(tensors, path))
    return Autoencoder(_from_diffusers(str(path)))


def _from_ldm(tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    from diffusers import AutoencoderKL

    try:
        tensors = ldm.plain(tensors)
        config, converted = ldm.architecture(tensors), ldm.converted(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        model: Any = AutoencoderKL(**config)
    expected = model.state_dict()
    faults = {
        "missing": sorted(expected.keys() - converted.keys()),
        "left over": sorted(converted.keys() - expected.keys()),
        "of another shape": [n for n in expected if n in converted and expected[n].shape != converted[n].shape],
    }
    refuse_unfit(path, faults)
    model.load_state_dict({name: tensor.float() for name, tensor in converted.items()}, assign=True)
    return model


def _from_diffusers(path: str) -> nn.Module:
    # Imported here: it takes seconds.
    import diffusers

    subfolder, config = find_config(diffusers.AutoencoderKL, path, "vae", "VAE")
    kind = config.get("_class_name")
    if kind not in KINDS:
        found = "names no class (_class_name)" if kind is None else f"is a {kind}"
        raise ValueError(f"{Path(path, subfolder or '')} {found}: a VAE is one of {', '.join(KINDS)}")
    # Low memory wants accelerate, and VAEs are small.
    return from_pretrained(getattr(diffusers, kind), path, subfolder, low_cpu_mem_usage=False)
