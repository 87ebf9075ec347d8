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
        ValueError: if the file cannot be read, or holds other things or not the weights asked for.
    """
    return _plainly_named(_chosen(read_file(path), weights))


def read_file(path: Path) -> Any:
    """Return what is in a .safetensors file, or in one of torch.save, on the CPU; nothing in it is run.

    Raises:
        ValueError: if it cannot be read, or could run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # FACM keeps its command line's arguments beside the weights: a Namespace, which can do no harm.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Bytes that are no checkpoint can fail in any way.
        reason = _reason(error)
        raise ValueError(f"neither safetensors nor what torch.load reads with weights_only=True: {reason}") from error


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
