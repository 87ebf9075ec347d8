"""Networks to and from disk: a folder with config.json and model.safetensors, or a training checkpoint."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

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
        ValueError: naming `path` and the cause, if it is not a whole folder or checkpoint of this package.
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


def refuse_partial(checkpoint: Path, module: nn.Module, resume: bool) -> None:
    """Compare a training checkpoint in one file with all that a module, or a run that goes on, will look for in it.

    Raises:
        ValueError: naming what it lacks, or the first weight that is missing or of another shape.
    """
    found = _read(checkpoint)
    needed = ("state_dict", "seed", "optimizer_states") if resume else ("state_dict", "seed")
    if lacking := [key for key in needed if key not in found]:
        remedy = "take a whole one, which ModelCheckpoint writes unless told to save_weights_only"
        raise ValueError(f"{checkpoint} has no {' and no '.join(lacking)}: {remedy}")
    weights = found["state_dict"]
    for name, tensor in module.state_dict().items():
        if name not in weights:
            raise ValueError(f"{checkpoint} has no weights {name}: take another checkpoint")
        given, known = tuple(weights[name].shape), tuple(tensor.shape)
        if given != known:
            raise ValueError(f"{checkpoint} has weights {name} of shape {given}, not {known}: take another checkpoint")


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
    with _naming(folder):
        described = json.loads(config.read_text())
        if not isinstance(described, dict):
            raise ValueError(f"config.json must hold _class_name and the arguments: got {described}")
        network = build(described)
        network.load_state_dict(load_file(weights))
    return network


def _from_checkpoint(file: Path) -> Network:
    checkpoint = _read(file)
    described = _description(checkpoint, file)
    with _naming(file):
        network = build(described)
        weights = {k.removeprefix(AVERAGE): v for k, v in checkpoint["state_dict"].items() if k.startswith(AVERAGE)}
        network.load_state_dict(weights)
    return network


def _from_shards(folder: Path) -> Network:
    described = _description(read_rest(folder), folder)
    with _naming(folder):
        network = build(described)
    fill({f"{AVERAGE}{name}": tensor for name, tensor in network.state_dict().items()}, folder)
    return network


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        cause = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        # Torch names every weight that does not fit.
        raise ValueError(f"{path} cannot be loaded: {shorten(cause, 300, placeholder=' ...')}") from error


def _read(file: Path) -> Any:
    try:
        # Mapped: what is not asked for, such as the optimiser's state, is not read.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # Bytes that are no checkpoint can fail in any way.
        raise ValueError(f"{file} is not a checkpoint of decm-lightning: it cannot be read") from error


def _description(checkpoint: Any, path: Path) -> dict[str, Any]:
    described = checkpoint.get("network") if isinstance(checkpoint, dict) else None
    if not isinstance(described, dict):
        raise ValueError(f"{path} is not a checkpoint of decm-lightning: it does not describe its network")
    return described
