"""Networks to and from disk: a folder with config.json and model.safetensors, or a training checkpoint."""

import json
import pickle
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from decm_lightning.networks.dit import DiT
from decm_lightning.networks.mlp import MLP
from decm_lightning.networks.network import Network

CLASSES: dict[str, type[Network]] = {"DiT": DiT, "MLP": MLP}


def load(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """Return a network ready to sample: in eval mode, and from a checkpoint its averaged (EMA) weights.

    Args:
        path: a folder written by `save`, or a .ckpt file written while training.
        device: where to put it.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it is not a folder or checkpoint of this package.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint or folder at {path}")
    network = _from_folder(path) if path.is_dir() else _from_checkpoint(path)
    return network.to(device).eval()


def save(network: Network, folder: str | Path) -> None:
    """Write config.json and model.safetensors into `folder`, made if need be."""
    network.save_pretrained(folder, config=describe(network))


def describe(network: Network) -> dict[str, Any]:
    """Return what is needed to build the network again: its class name and its arguments."""
    cls = type(network)
    # Classes from elsewhere are found again by their module.
    name = cls.__name__ if cls in CLASSES.values() else f"{cls.__module__}.{cls.__qualname__}"
    return {"_class_name": name, **network.config}


def build(description: dict[str, Any]) -> Network:
    """Return a new network from what `describe` gave.

    Raises:
        ValueError: if the class is unknown.
    """
    arguments = dict(description)
    name = str(arguments.pop("_class_name", None))
    if name in CLASSES:
        return CLASSES[name](**arguments)
    module, _, cls = name.rpartition(".")
    try:
        found = getattr(import_module(module), cls) if module else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Network)):
        raise ValueError(f"unknown network class {name!r}: expected {', '.join(CLASSES)} or an importable Network")
    return found(**arguments)


def _from_folder(folder: Path) -> Network:
    config, weights = folder / "config.json", folder / "model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: a network folder holds config.json and model.safetensors")
    network = build(json.loads(config.read_text()))
    network.load_state_dict(load_file(weights))
    return network


def _from_checkpoint(file: Path) -> Network:
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is not a checkpoint of decm-lightning: it cannot be read") from error
    if not isinstance(checkpoint, dict) or "network" not in checkpoint:
        raise ValueError(f"{file} is not a checkpoint of decm-lightning: it does not describe its network")
    network = build(checkpoint["network"])
    prefix = "average."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    network.load_state_dict(weights)
    return network
