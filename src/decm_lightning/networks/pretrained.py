"""Networks to and from disk: folders with config.json and model.safetensors, training checkpoints, and public files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from decm_lightning.files import atomic
from decm_lightning.networks.checkpoint_files import Weights, read_file, tensors_in
from decm_lightning.networks.dit import DiT
from decm_lightning.networks.hub import download, is_hub_name
from decm_lightning.networks.import_public import import_public
from decm_lightning.networks.mlp import MLP
from decm_lightning.networks.network import Network
from decm_lightning.networks.sharded import fill, is_sharded, read_rest
from decm_lightning.networks.text_dit import TextDiT
from decm_lightning.networks.weightless import is_weightless, on_meta

CLASSES: dict[str, type[Network]] = {"DiT": DiT, "MLP": MLP, "TextDiT": TextDiT}

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
"""The files of a network's folder."""
PREFIXES: dict[Weights | None, str] = {None: "average.", "ema": "average.", "model": "network."}
"""The prefixes of the names of the averaged weights, and of those as trained, in a training checkpoint."""


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    trust: bool = False,
    weights: Weights | None = None,
    heads: int | None = None,
) -> Network:
    """Return a network ready to sample: in eval mode, and from a training checkpoint its averaged (EMA) weights.

    Within `weightless.without_weights` no weights are read: the network is on the meta device, whatever `device` is.

    Args:
        path: a folder written by `save`; a checkpoint written by training (a .ckpt file or a folder of shards); a
            public LightningDiT, SiT or DiT (a .pt or .safetensors file); or user/name, a folder on the Hugging Face
            hub. A local path goes first, and only a name with one slash and no suffix is looked for on the hub.
        device: where to put it.
        trust: import the module of a network class from outside this package, which runs its code. A class that is
            imported already needs no trust.
        weights: which of the two sets in a training checkpoint to read: "ema", the averaged ones, or "model"; None for
            "ema" if there are any. A folder or file with one set ignores it.
        heads: attention heads of a public network; None for those that its tensors or its published size tell.

    Raises:
        OSError: naming the file, if there is nothing at `path`, it may not be read, or the hub does not have it.
        ValueError: naming `path` and the cause, if it is damaged or holds no network of a known class or architecture.
    """
    place = _on_this_machine(path)
    if is_sharded(place):
        network = _from_shards(place, trust, weights)
    else:
        network = _from_folder(place, trust) if place.is_dir() else _from_file(place, trust, weights, heads)
    return (network if is_weightless() else network.to(device)).eval()


def save(network: Network, folder: str | Path) -> None:
    """Write config.json and model.safetensors into `folder`, and a model card if there is none.

    The folder is created if it is missing. An existing network is replaced when both files are complete,
    and stays usable if writing fails.

    Raises:
        OSError: naming the file, if it cannot be written, for example because the disk is full.
        ValueError: if `folder` holds anything other than a network of this package.
    """
    folder = check_target(folder)
    described = json.dumps(describe(network), sort_keys=True, indent=2)
    with atomic(folder / WEIGHTS) as weights:
        save_model(network, str(weights))
        with weights.open("rb") as content:
            # The weights are large: flushed now, they follow their config at once.
            os.fsync(content.fileno())
        with atomic(folder / CONFIG) as config:
            config.write_text(described, encoding="utf-8")
    if not (folder / CARD).exists():
        with atomic(folder / CARD) as card:
            network.generate_model_card().save(card)


def check_target(folder: str | Path) -> Path:
    """Return a folder that `save` may write to: one that is missing, or holds no other model.

    Raises:
        NotADirectoryError: if it is a file.
        ValueError: if it is "", or holds a config.json or model.safetensors of something else, or a sharded checkpoint.
    """
    if not str(folder):
        raise ValueError("the folder to write has no name: got ''")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give a folder")
    if is_sharded(folder):
        raise ValueError(f"{folder} is a sharded checkpoint: give another folder")
    found = _class_in(folder / CONFIG)
    other = found is None and (folder / WEIGHTS).exists()
    if found is not None and found not in CLASSES and "." not in found:
        other = True
    if other:
        file = WEIGHTS if found is None else CONFIG
        raise ValueError(f"{folder} holds another model ({file} is not of decm-lightning): give another folder")
    return folder


def _class_in(config: Path) -> str | None:
    """Return the class that a config.json names, "" if it names none, None if there is no such file."""
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return ""
    return str(described.get("_class_name", "")) if isinstance(described, dict) else ""


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
        ValueError: if it is not a checkpoint of this package.
    """
    path = Path(checkpoint)
    return _description(read_rest(path) if path.is_dir() else read_file(path), path)


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
    found = read_file(checkpoint)
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


def build(description: dict[str, Any], trust: bool = False) -> Network:
    """Return a new network from what `describe` gave.

    Args:
        description: the class and its arguments.
        trust: import the module of a class outside this package; see `load`.

    Raises:
        ValueError: if the class is unknown, or of a module that may not be imported.
    """
    arguments = dict(description)
    name = arguments.pop("_class_name", None)
    if not isinstance(name, str):
        raise ValueError(f"its description names no network class (_class_name): got {name}")
    cls = _class_of(name, trust)
    return on_meta(cls, **arguments) if is_weightless() else cls(**arguments)


def _class_of(name: str, trust: bool) -> type[Network]:
    known = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _subclasses(Network)}  # type: ignore[type-abstract]
    if (cls := CLASSES.get(name) or known.get(name)) is not None:
        return cls
    module, _, attribute = name.rpartition(".")
    if module and not (trust or module.startswith("decm_lightning.")):
        # A file must not choose which code runs.
        remedy = "import that module first, or give trust=True (--trust true) if you trust the file"
        raise ValueError(f"its network class {name} is not imported: {remedy}")
    try:
        found = getattr(import_module(module), attribute) if module else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Network)):
        raise ValueError(f"unknown network class {name!r}: expected {', '.join(CLASSES)} or an importable Network")
    return found


def _subclasses(cls: type[Network]) -> Iterator[type[Network]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _from_folder(folder: Path, trust: bool) -> Network:
    config, weights = folder / CONFIG, folder / WEIGHTS
    for file in (config, weights):
        try:
            file.stat()
        except FileNotFoundError as error:
            expected = f"a network folder holds {CONFIG} and {WEIGHTS}"
            raise FileNotFoundError(f"{file} is missing: {expected}") from error
    with _naming(folder):
        described = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(described, dict):
            raise ValueError(f"{CONFIG} must hold _class_name and the arguments: got {described}")
        network = build(described, trust)
    if not is_weightless():
        tensors = read_file(weights)
        with _naming(folder):
            network.load_state_dict(tensors)
    return network


def _from_file(file: Path, trust: bool, weights: Weights | None, heads: int | None) -> Network:
    content = read_file(file)
    if not isinstance(content, dict) or not isinstance(content.get("network"), dict):
        try:
            return import_public(tensors_in(content, weights), heads)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    with _naming(file):
        network, prefix = build(content["network"], trust), PREFIXES[weights]
        if not is_weightless():
            state = content["state_dict"].items()
            network.load_state_dict({n.removeprefix(prefix): v for n, v in state if n.startswith(prefix)})
    return network


def _from_shards(folder: Path, trust: bool, weights: Weights | None) -> Network:
    described = _description(read_rest(folder), folder)
    with _naming(folder):
        network = build(described, trust)
    if not is_weightless():
        fill({f"{PREFIXES[weights]}{name}": tensor for name, tensor in network.state_dict().items()}, folder)
    return network


def _on_this_machine(path: str | Path) -> Path:
    if is_hub_name(path):
        return download(path, "network", [CONFIG, WEIGHTS])
    try:
        # Unlike Path.exists, which takes a missing permission for a missing file in some versions of Python.
        Path(path).stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no checkpoint or folder at {path}") from error
    return Path(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        cause = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        # Torch names every weight that does not fit.
        raise ValueError(f"{path} cannot be loaded: {shorten(cause, 300, placeholder=' ...')}") from error


def _description(checkpoint: Any, path: Path) -> dict[str, Any]:
    described = checkpoint.get("network") if isinstance(checkpoint, dict) else None
    if not isinstance(described, dict):
        raise ValueError(f"{path} is not a checkpoint of decm-lightning: it does not describe its network")
    return described
