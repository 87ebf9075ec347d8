"""Autoencoders from folders, from the Hugging Face hub, and from latent diffusion's checkpoint files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decm_lightning.autoencoders import ldm
from decm_lightning.autoencoders.autoencoder import Autoencoder
from decm_lightning.networks.checkpoint_files import read_file
from decm_lightning.networks.diffusers_folder import from_pretrained, refuse_unfit

INSIDE = ("ema", "state_dict", "model", "vae", "module")
"""Where training scripts put tensors into their checkpoints; the first one found is read."""
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
            content = read_file(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no file {path}: give a VAE's file, its folder, or its name on the hub") from error
        return Autoencoder(_from_ldm(content, path))
    return Autoencoder(_from_diffusers(str(path)))


def _tensors(content: Any) -> Mapping[str, Tensor]:
    """Return the tensors in a checkpoint, however deep they are."""
    while isinstance(content, Mapping):
        inside = next((content[name] for name in INSIDE if isinstance(content.get(name), Mapping)), None)
        if inside is None:
            break
        content = inside
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"expected tensors by name, alone or under {', '.join(INSIDE)}")
    return content


def _from_ldm(content: Any, path: Path) -> nn.Module:
    from diffusers import AutoencoderKL

    try:
        tensors = ldm.plain(_tensors(content))
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

    subfolder, config = _config(path)
    kind = config.get("_class_name")
    if kind not in KINDS:
        found = "names no class (_class_name)" if kind is None else f"is a {kind}"
        raise ValueError(f"{Path(path, subfolder or '')} {found}: a VAE is one of {', '.join(KINDS)}")
    # Low memory wants accelerate, and VAEs are small.
    return from_pretrained(getattr(diffusers, kind), path, subfolder, low_cpu_mem_usage=False)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold the arguments of a VAE: got {type(config).__name__}")
    return config


def _config(path: str) -> tuple[str | None, dict[str, Any]]:
    """Return where in a folder or hub repository the autoencoder is, and its config."""
    from diffusers import AutoencoderKL

    if Path(path).is_dir():
        for subfolder in (None, "vae"):
            file = Path(path, subfolder or "", "config.json")
            if file.is_file():
                return subfolder, _read_config(file)
        raise FileNotFoundError(f"no config.json in {path} or {path}/vae: give the folder of a VAE or of its pipeline")
    try:
        return None, AutoencoderKL.load_config(path)
    except OSError as error:
        try:
            return "vae", AutoencoderKL.load_config(path, subfolder="vae")
        except OSError:
            raise FileNotFoundError(f"no folder {path}, and no VAE of that name on the Hugging Face hub") from error
