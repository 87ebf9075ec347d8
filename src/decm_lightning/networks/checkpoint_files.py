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

WRAPPERS = ("module", "_orig_mod")
"""What DistributedDataParallel and torch.compile put into the names of the tensors they wrap."""
SECOND = "ema_models.1.ema_model."
"""Of the two averages in FACM's own checkpoints, the one that FACM samples with."""


def read_tensors(path: Path, weights: Weights | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file by their plain names.

    Args:
        path: a .safetensors file, or one of torch.save that holds tensors by name, alone or under `ema` or `model`, or
            FACM's `emas`. Names may be prefixed with `module.` and `_orig_mod.`.
        weights: which of `ema` and `model` to read; None for `ema`, and where there is none for `model`. Tensors that
            stand alone are read whatever is asked.

    Raises:
        OSError: naming the file, if it is missing, a folder, or may not be read.
        ValueError: naming the file, if it cannot be read, or holds other things or not the requested weights.
    """
    content = read_file(path)
    try:
        return _plainly_named(_chosen(content, weights))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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
        # FACM keeps its command line's arguments beside the weights: a Namespace, which can do no harm.
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


def _chosen(content: Any, weights: Weights | None) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"no tensors by name, but one {type(content).__name__}")
    parts = {name: content[name] for name in ("ema", "model") if isinstance(content.get(name), Mapping)}
    if isinstance(content.get("emas"), Mapping):
        averages = {str(name): tensor for name, tensor in content["emas"].items()}
        parts = {"ema": {n.removeprefix(SECOND): v for n, v in averages.items() if n.startswith(SECOND)}} | parts
    wanted = weights or ("ema" if "ema" in parts else "model")
    if parts and wanted not in parts:
        raise ValueError(f"no weights {wanted!r} in it, only {', '.join(parts)}: ask for weights={next(iter(parts))!r}")
    tensors = parts[wanted] if parts else content
    others = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        raise ValueError(f"tensors by name are expected, alone or under ema or model: got {few(others) or 'nothing'}")
    return {str(name): tensor for name, tensor in tensors.items()}


def _plainly_named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in plain:
            raise ValueError(f"{bare} is there twice, as {name} too: keep one of them")
        plain[bare] = tensor
    return plain
