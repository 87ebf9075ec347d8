"""Load autoencoders from folders, from the Hugging Face hub, and from checkpoint files of latent diffusion."""

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

    A checkpoint file must contain an AutoencoderKL with the names of latent diffusion (CompVis), such as VA-VAE. The
    tensors may be nested under `ema`, `state_dict`, `model`, `vae` or `module` and have prefixes such as `module.`. The
    architecture is inferred from their shapes and must match them exactly; tensors of training losses are ignored. From
    a whole latent diffusion model, only the first stage is read.

    Args:
        path: a folder, or a name on the Hugging Face hub, of an AutoencoderKL, AutoencoderDC or AutoencoderTiny of
            diffusers, or of a pipeline with one in `vae`; or a .safetensors, .pt or .ckpt file.

    Raises:
        OSError: if nothing exists at `path` or on the hub, or it may not be read.
        ValueError: if it is another model or file, or tensors are missing, unexpected, or of the wrong shape.
    """
    path = Path(path)
    if path.is_file() or (path.suffix in FILES and not path.is_dir()):
        try:
            tensors = read_tensors(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no file {path}: pass a VAE's file, its folder, or its name on the hub") from error
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
        "unexpected": sorted(converted.keys() - expected.keys()),
        "wrong shape": [n for n in expected if n in converted and expected[n].shape != converted[n].shape],
    }
    refuse_unfit(path, faults)
    model.load_state_dict({name: tensor.float() for name, tensor in converted.items()}, assign=True)
    return model


def _from_diffusers(path: str) -> nn.Module:
    # Imported here: it takes seconds.
    import diffusers

    subfolder, config = find_config(path, "vae", "VAE")
    kind = config.get("_class_name")
    if kind not in KINDS:
        found = "names no class (_class_name)" if kind is None else f"is a {kind}"
        raise ValueError(f"{Path(path, subfolder or '')} {found}: expected one of {', '.join(KINDS)}")
    # Low-memory loading needs accelerate, and VAEs are small.
    return from_pretrained(getattr(diffusers, kind), path, subfolder, low_cpu_mem_usage=False)
