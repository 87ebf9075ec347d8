"""Autoencoders from folders, from the Hugging Face hub, and from latent diffusion's checkpoint files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decm_lightning.autoencoders import ldm
from decm_lightning.autoencoders.autoencoder import Autoencoder
from decm_lightning.networks.tensors import few, read_file

KINDS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
FILES = (".safetensors", ".pt", ".pth", ".ckpt")


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Return the autoencoder at `path`, in float32, on the CPU.

    A file holds an AutoencoderKL under the names of latent diffusion (CompVis), such as VA-VAE's, bare or under
    `state_dict`; its architecture is read off the shapes of its tensors, and every tensor must have its place but those
    of the losses it was trained with.

    Args:
        path: a folder or a name on the Hugging Face hub of one of diffusers' AutoencoderKL, AutoencoderDC and
            AutoencoderTiny, or of a pipeline with one in `vae`; or a .safetensors, .pt or .ckpt file.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        OSError: if it is a name that the hub does not have.
        ValueError: if it is another model or file, or tensors are missing, left over, or of another shape.
    """
    path = Path(path)
    if path.suffix in FILES:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: give a VAE's file, its folder, or its name on the hub")
        try:
            return Autoencoder(_from_ldm(read_file(path)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return Autoencoder(_from_diffusers(str(path)))


def _from_ldm(content: Any) -> nn.Module:
    from diffusers import AutoencoderKL

    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("expected tensors by name, alone or under state_dict")
    tensors = ldm.plain(content)
    config, converted = ldm.architecture(tensors), ldm.converted(tensors)
    with torch.device("meta"):
        model: Any = AutoencoderKL(**config)
    expected = model.state_dict()
    faults = {
        "missing": sorted(expected.keys() - converted.keys()),
        "left over": sorted(converted.keys() - expected.keys()),
        "of another shape": [n for n in expected if n in converted and expected[n].shape != converted[n].shape],
    }
    _refuse(faults)
    model.load_state_dict({name: tensor.float() for name, tensor in converted.items()}, assign=True)
    return model


def _from_diffusers(path: str) -> nn.Module:
    # Imported here: it takes seconds.
    import diffusers

    subfolder, config = _config(path)
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"{path} is a {kind}: a VAE is one of {', '.join(KINDS)}")
    # Low memory wants accelerate, and VAEs are small.
    model, report = getattr(diffusers, kind).from_pretrained(
        path, subfolder=subfolder, output_loading_info=True, low_cpu_mem_usage=False
    )
    # It would go on with random weights.
    names = {"missing_keys": "missing", "unexpected_keys": "left over", "mismatched_keys": "of another shape"}
    try:
        _refuse({word: [str(name) for name in report.get(key, ())] for key, word in names.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model


def _config(path: str) -> tuple[str | None, dict[str, Any]]:
    """Return where in a folder or hub repository the autoencoder is, and its config."""
    from diffusers import AutoencoderKL

    if Path(path).is_dir():
        for subfolder in (None, "vae"):
            file = Path(path, subfolder or "", "config.json")
            if file.is_file():
                return subfolder, json.loads(file.read_text())
        raise FileNotFoundError(f"no config.json in {path} or {path}/vae: give the folder of a VAE or of its pipeline")
    try:
        return None, AutoencoderKL.load_config(path)
    except OSError as error:
        try:
            return "vae", AutoencoderKL.load_config(path, subfolder="vae")
        except OSError:
            raise FileNotFoundError(f"no folder {path}, and no VAE of that name on the Hugging Face hub") from error


def _refuse(faults: Mapping[str, Sequence[str]]) -> None:
    """Raise a ValueError that lists all tensors that are not as the architecture has them, if any are."""
    found = "; ".join(f"{word}: {few(names, 5)}" for word, names in faults.items() if names)
    if found:
        raise ValueError(f"its tensors are not those of its architecture; {found}")
