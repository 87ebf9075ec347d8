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
from decm_lightning.networks.sharded import fill, is_sharded, read_rest
from decm_lightning.networks.text_dit import TextDiT

CLASSES: dict[str, type[Network]] = {"DiT": DiT, "MLP": MLP, "TextDiT": TextDiT}

AVERAGE = "average."
"""Where the averaged weights are in a training checkpoint."""


def load(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """Return a network ready to sample: in eval mode, and from a checkpoint its averaged (EMA) weights.

    Args:
        path: a folder written by `save`, or a checkpoint written while training: a .ckpt file, or a folder of shards.
        device: where to put it.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it is not a folder or checkpoint of this package.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint or folder at {path}")
    if is_sharded(path):
        network = _from_shards(path)
    else:
        network = _from_folder(path) if path.is_dir() else _from_checkpoint(path)
    return network.to(device).eval()


def save(network: Network, folder: str | Path) -> None:
    """Write config.json and model.safetensors into `folder`, made if need be."""
    network.save_pretrained(folder, config=describe(network))


def describe(network: Network) -> dict[str, Any]:
    """Return what is needed to build the network again: its class name and its arguments."""
    # Imported here: it takes longer than all else together, and `load` does not need it.
    from torch.distributed.fsdp import FSDPModule

    # FSDP2 gives what it shards a class of its own, before the class it was of.
    cls = next(cls for cls in type(network).__mro__ if not issubclass(cls, FSDPModule))
    # Classes from elsewhere are found again by their module.
    name = cls.__name__ if cls in CLASSES.values() else f"{cls.__module__}.{cls.__qualname__}"
    return {"_class_name": name, **network.config}


def description(checkpoint: str | Path) -> dict[str, Any]:
    """Return what `describe` gave of the network in a training checkpoint, without reading its weights.

    Raises:
        ValueError: if it is no checkpoint of this package.
    """
    path = Path(checkpoint)
    return _description(read_rest(path) if path.is_dir() else _read(path), path)


def refuse_another(found: dict[str, Any], network: Network, where: str | Path) -> None:
    """Compare what a checkpoint says of its network with the one that its weights are for.

    Raises:
        ValueError: naming all arguments in which they differ.
    """
    # An older description may lack arguments that have come since, with defaults that leave all as it was.
    expected = {key: value for key, value in describe(network).items() if key in found and found[key] != value}
    if expected:
        differing = ", ".join(f"{key} {found[key]}, not {value}" for key, value in expected.items())
        raise ValueError(f"{where} holds another network than the config builds ({differing}): change one of them")


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
    checkpoint = _read(file)
    network = build(_description(checkpoint, file))
    weights = {k.removeprefix(AVERAGE): v for k, v in checkpoint["state_dict"].items() if k.startswith(AVERAGE)}
    network.load_state_dict(weights)
    return network


def _from_shards(folder: Path) -> Network:
    network = build(_description(read_rest(folder), folder))
    fill({f"{AVERAGE}{name}": tensor for name, tensor in network.state_dict().items()}, folder)
    return network


def _read(file: Path) -> Any:
    try:
        # Mapped: what is not asked for, such as the optimiser's state, is not read.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is not a checkpoint of decm-lightning: it cannot be read") from error


def _description(checkpoint: Any, path: Path) -> dict[str, Any]:
    if not isinstance(checkpoint, dict) or "network" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of decm-lightning: it does not describe its network")
    return checkpoint["network"]
