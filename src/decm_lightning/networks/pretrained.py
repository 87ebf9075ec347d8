"""Load and save networks: folders with config.json and model.safetensors, training checkpoints, and public files."""

import json
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from decm_lightning.files import atomic
from decm_lightning.networks.checkpoint_files import Weights, naming, read_file, read_single_file, tensors_in
from decm_lightning.networks.dit import DiT
from decm_lightning.networks.hub import download, is_hub_name
from decm_lightning.networks.import_public import import_public
from decm_lightning.networks.mlp import MLP
from decm_lightning.networks.network import Network, describe
from decm_lightning.networks.record import CONFIG, RECORD, read_record, record_in, with_table, write_record
from decm_lightning.networks.sharded import fill, is_sharded, read_rest
from decm_lightning.networks.text_dit import TextDiT
from decm_lightning.networks.weightless import is_weightless, on_meta

CLASSES: dict[str, type[Network]] = {"DiT": DiT, "MLP": MLP, "TextDiT": TextDiT}

WEIGHTS = "model.safetensors"
"""The file with the weights in a network folder."""
INDEX = "model_index.json"
"""The description of a pipeline of diffusers."""
PREFIXES: dict[Weights | None, str] = {None: "average.", "ema": "average.", "model": "network."}
"""The name prefixes of the averaged and of the trained weights in a training checkpoint."""


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    trust: bool = False,
    weights: Weights | None = None,
    heads: int | None = None,
) -> Network:
    """Load a network in eval mode, by default with the averaged (EMA) weights of a training checkpoint.

    Its `record` is that of the folder or checkpoint, with the table of a later `decm test` of the same weights.
    Within `weightless.without_weights`, no weights are read and the network is on the meta device.

    Example:
        >>> load("weights/digits/student").sample_shape
        (1, 8, 8)

    Args:
        path: a folder written by `save`; a .safetensors file of `decm export`; a training checkpoint (a .ckpt file or a
            folder of shards); a public LightningDiT, SiT or DiT (a .pt or .safetensors file); or user/name, a folder on
            the Hugging Face hub. Local paths take precedence, and only a name with one slash and no suffix is looked up
            on the hub.
        device: the device to move the network to.
        trust: import the module of a network class from outside this package, which runs its code. A class that is
            already imported does not need it.
        weights: the set to read from a training checkpoint: "ema" or "model"; None for "ema" if it exists. A folder or
            file with a single set ignores it.
        heads: attention heads of a public network; None to infer them from its tensors or its published size.

    Raises:
        OSError: naming the file, if nothing exists at `path`, it may not be read, or it is not on the hub.
        ValueError: naming `path` and the cause, if it is damaged or its class or architecture is unknown.
    """
    place = _on_this_machine(path)
    if is_sharded(place):
        network = _from_shards(place, trust, weights)
    else:
        network = _from_folder(place, trust) if place.is_dir() else _from_file(place, trust, weights, heads)
    network.place = place.absolute()
    if not is_weightless():
        network.record = with_table(network, place)
    return (network if is_weightless() else network.to(device)).eval()


def save(network: Network, folder: str | Path) -> None:
    """Write config.json, model.safetensors and the network's record to `folder`. `decm export` writes a model card.

    The folder is created if necessary. An existing network is replaced once all files are complete, and stays usable
    if writing fails.

    Raises:
        OSError: naming the file, if it cannot be written, for example because the disk is full.
        ValueError: if `folder` contains anything other than a network of this package.
    """
    write(network, check_target(folder))


def write(network: Network, folder: Path) -> None:
    """Write a network like `save`, without a check of the folder's content."""
    with atomic(folder / WEIGHTS) as weights:
        save_model(network, str(weights))
        with weights.open("rb") as content:
            # Flushing the large weights now keeps the time between the two renames short.
            os.fsync(content.fileno())
        with atomic(folder / CONFIG) as config:
            config.write_text(json.dumps(describe(network), sort_keys=True, indent=2), encoding="utf-8")
            write_record(network.record, folder)


def check_target(folder: str | Path) -> Path:
    """Return `folder` if `save` may write to it: it must not exist yet, or not contain another model.

    Raises:
        NotADirectoryError: if it is a file.
        ValueError: if it is "", or contains a sharded checkpoint, a pipeline of diffusers, or a config.json or
            model.safetensors of another model.
    """
    if not str(folder):
        raise ValueError("the output folder must have a name: got ''")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose a folder")
    if is_sharded(folder):
        raise ValueError(f"{folder} is a sharded checkpoint: choose another folder")
    if (folder / INDEX).exists():
        raise ValueError(f"{folder} contains a pipeline of diffusers ({INDEX}): choose another folder")
    found = _class_in(folder / CONFIG)
    if (folder / WEIGHTS).exists() if found is None else found not in CLASSES and "." not in found:
        file = WEIGHTS if found is None else CONFIG
        raise ValueError(f"{folder} contains another model ({file} is not of decm-lightning): choose another folder")
    return folder


def _class_in(config: Path) -> str | None:
    """Return the class that a config.json names, "" if it names none, None if the file does not exist."""
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return ""
    return str(described.get("_class_name", "")) if isinstance(described, dict) else ""


def description(checkpoint: str | Path) -> dict[str, Any]:
    """Return the description of the network in a training checkpoint, without reading the weights."""
    path = Path(checkpoint)
    return _description(read_rest(path) if path.is_dir() else read_file(path), path)


def refuse_another(found: dict[str, Any], network: Network, where: str | Path) -> None:
    """Check that a checkpoint was saved from a network with the same arguments."""
    # Older descriptions may lack newer arguments, whose defaults preserve the old behavior.
    expected = {key: value for key, value in describe(network).items() if key in found and found[key] != value}
    if expected:
        differing = ", ".join(
            f"{key}: {found[key]} in the checkpoint, {value} in the config" for key, value in expected.items()
        )
        fault = f"{where} was saved from a different network than the config describes ({differing})"
        raise ValueError(f"{fault}: change one of them")


def refuse_partial(checkpoint: Path, module: nn.Module, resume: bool) -> None:
    """Check that a training checkpoint in one file has everything that a module, or a resumed run, reads from it.

    Raises:
        ValueError: naming the missing entries, or the first weight that is missing or has the wrong shape.
    """
    found = read_file(checkpoint)
    needed = ("state_dict", "seed", "optimizer_states") if resume else ("state_dict", "seed")
    if lacking := [key for key in needed if key not in found]:
        remedy = "use a full checkpoint, written by ModelCheckpoint without save_weights_only"
        raise ValueError(f"{checkpoint} lacks {' and '.join(lacking)}: {remedy}")
    weights = found["state_dict"]
    for name, tensor in module.state_dict().items():
        if name not in weights:
            raise ValueError(f"{checkpoint} lacks the weights {name}: use another checkpoint")
        shape, expected = tuple(weights[name].shape), tuple(tensor.shape)
        if shape != expected:
            raise ValueError(
                f"{checkpoint} has weights {name} of shape {shape}, not {expected}: use another checkpoint"
            )


def build(description: dict[str, Any], trust: bool = False) -> Network:
    """Create a network from the result of `describe`; for `trust` see `load`.

    Raises:
        ValueError: if the class is unknown, or in a module that may not be imported.
    """
    arguments = dict(description)
    name = arguments.pop("_class_name", None)
    if not isinstance(name, str):
        raise ValueError(f"the description must name a network class (_class_name): got {name}")
    cls = _class_of(name, trust)
    return on_meta(cls, **arguments) if is_weightless() else cls(**arguments)


def _class_of(name: str, trust: bool) -> type[Network]:
    known = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _subclasses(Network)}  # type: ignore[type-abstract]
    if (cls := CLASSES.get(name) or known.get(name)) is not None:
        return cls
    module, _, attribute = name.rpartition(".")
    if module and not (trust or module.startswith("decm_lightning.")):
        # A file must not decide which code runs.
        remedy = "import its module first, or pass trust=True (--trust true) if you trust the file"
        raise ValueError(f"the network class {name} is not imported: {remedy}")
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
    if (folder / INDEX).exists() and not (folder / CONFIG).exists():
        remedy = "load it with DiffusionPipeline.from_pretrained, or export the checkpoint to another folder"
        raise ValueError(f"{folder} is a pipeline of diffusers: {remedy}")
    config, weights = folder / CONFIG, folder / WEIGHTS
    for file in (config, weights):
        try:
            file.stat()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{file} is missing: a network folder contains {CONFIG} and {WEIGHTS}") from error
    with naming(folder):
        described = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(described, dict):
            raise ValueError(f"{CONFIG} must contain _class_name and the arguments: got {described}")
        network = _build_with_base(described, folder, trust)
    with naming(folder / RECORD):
        network.record = read_record(folder)
    if not is_weightless():
        tensors = read_file(weights)
        with naming(folder):
            network.load_state_dict(tensors)
    return network


def _from_file(file: Path, trust: bool, weights: Weights | None, heads: int | None) -> Network:
    content, prefix = read_file(file), PREFIXES[weights]
    if single := read_single_file(file, content):
        content, prefix = single, ""
    if not isinstance(content, dict) or not isinstance(content.get("network"), dict):
        try:
            return import_public(tensors_in(content, weights), heads)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    with naming(file):
        network = _build_with_base(content["network"], file, trust)
        network.record = record_in(content)
        if not is_weightless():
            state = content["state_dict"].items()
            network.load_state_dict({n.removeprefix(prefix): v for n, v in state if n.startswith(prefix)})
    return network


def _from_shards(folder: Path, trust: bool, weights: Weights | None) -> Network:
    rest = read_rest(folder)
    described = _description(rest, folder)
    with naming(folder):
        network = _build_with_base(described, folder, trust)
        network.record = record_in(rest)
    if not is_weightless():
        fill({f"{PREFIXES[weights]}{name}": tensor for name, tensor in network.state_dict().items()}, folder)
    return network


def _build_with_base(described: dict[str, Any], path: Path, trust: bool) -> Network:
    try:
        return build(described, trust)
    except OSError as error:
        if described.get("lora_rank") is None:
            raise
        base = f"{described.get('model')} with the weights {described.get('base')}"
        raise FileNotFoundError(shorten(f"{path} is a LoRA student of {base}: {error}", 400)) from error


def _on_this_machine(path: str | Path) -> Path:
    if is_hub_name(path):
        return download(path, "network", [CONFIG, WEIGHTS, RECORD])
    try:
        # In some Python versions, Path.exists reports a missing permission as a missing file.
        Path(path).stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no checkpoint or folder at {path}") from error
    return Path(path)


def _description(checkpoint: Any, path: Path) -> dict[str, Any]:
    described = checkpoint.get("network") if isinstance(checkpoint, dict) else None
    if not isinstance(described, dict):
        raise ValueError(f"{path} is not a checkpoint of decm-lightning: it does not describe its network")
    return described
