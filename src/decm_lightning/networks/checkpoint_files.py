"""The tensors of a public checkpoint: wherever they are in its file, and however their names are prefixed."""

import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

from decm_lightning.files import describe_unreadable

Weights: TypeAlias = Literal["ema", "model"]
"""The two sets of weights in a training checkpoint: averaged, and as trained."""

INSIDE = ("ema", "state_dict", "model", "vae", "module")
"""The entries of a checkpoint under which training scripts put tensors; the first one found is read."""
WRAPPERS = ("module", "_orig_mod")
"""What DistributedDataParallel and torch.compile put into the names of the tensors they wrap."""
SECOND = "ema_models.1.ema_model."
"""Of the two averages in FACM's own checkpoints, the one that FACM samples with."""


def read_tensors(path: Path, weights: Weights | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file by their plain names; `tensors_in` says where they may be.

    Raises:
        OSError: naming the file, if it is missing, a folder, or may not be read.
        ValueError: naming the file, if it cannot be read, or holds other things or not the requested weights.
    """
    content = read_file(path)
    try:
        return tensors_in(content, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tensors_in(content: Any, weights: Weights | None = None) -> dict[str, Tensor]:
    """Return the tensors in the content of a public checkpoint by their plain names.

    Args:
        content: tensors by name, alone or, however deep, under `ema`, `state_dict`, `model`, `vae` or `module`, or
            FACM's `emas`. Names may contain `module.` and `_orig_mod.`, which are left out.
        weights: which of `ema` and `model` to read; None for the first of the entries. Tensors that stand alone are
            read whatever is requested.

    Raises:
        ValueError: if there are other things, or not the requested weights.
    """
    while isinstance(content, Mapping) and (parts := _parts(content)):
        if weights is not None and weights not in parts and parts.keys() & {"ema", "model"}:
            remedy = f"give weights={next(iter(parts))!r}"
            raise ValueError(f"no weights {weights!r} in it, only {', '.join(parts)}: {remedy}")
        content = parts[weights] if weights in parts else next(iter(parts.values()))
        weights = None if weights in parts else weights
    if not isinstance(content, Mapping):
        raise ValueError(f"expected tensors by name: got one {type(content).__name__}")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        found = few(others) or "nothing"
        raise ValueError(f"expected tensors by name, alone or under {', '.join(INSIDE)}: got {found}")
    return _plainly_named({str(name): tensor for name, tensor in content.items()})


def read_file(path: str | Path) -> Any:
    """Return the content of a safetensors file, whatever its name, or of one of torch.save; nothing in it is run.

    Raises:
        OSError: naming the file, if it is missing, a folder, or may not be read.
        ValueError: naming the file and the cause, if it is cut short or not such a file, or could run code.
    """
    path = Path(path)
    # safetensors and torch report a missing permission as a missing file.
    head = _head(path)
    try:
        if head[8:9] == b"{" or path.suffix == ".safetensors":
            return load_file(path)
        # FACM keeps its command line's arguments next to the weights: a Namespace, which can do no harm.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Bytes that are not a checkpoint can fail in any way.
        raise ValueError(f"{path} cannot be read: {describe_unreadable(path) or _reason(error)}") from error


def _head(path: Path) -> bytes:
    # Opening a pipe would wait for its writer.
    if path.is_fifo():
        raise ValueError(f"{path} cannot be read: not a regular file")
    with path.open("rb") as content:
        return content.read(9)


def few(names: Sequence[str], count: int = 3) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _reason(error: Exception) -> str:
    """Return in one line why a file cannot be read."""
    if unsafe := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        remedy = "if you trust the file, load it with weights_only=False and save its tensors alone"
        return f"it holds {unsafe[1]}, which could run code; {remedy}"
    # torch.load's advice to load it without a check is for those who know what it is.
    first = str(error).partition("\n")[0].partition(". ")[0]
    return first or type(error).__name__


def _parts(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Return the entries that may hold tensors, the first choice first."""
    parts = {name: content[name] for name in INSIDE if isinstance(content.get(name), Mapping)}
    if isinstance(content.get("emas"), Mapping):
        averages = {str(name): tensor for name, tensor in content["emas"].items()}
        parts = {"ema": {n.removeprefix(SECOND): v for n, v in averages.items() if n.startswith(SECOND)}} | parts
    return parts


def _plainly_named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in plain:
            raise ValueError(f"{bare} is there twice, as {name} too: keep one of them")
        plain[bare] = tensor
    return plain
