"""Read tensors from public checkpoints, wherever the file nests them and however their names are prefixed."""

import json
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from decm_lightning.files import describe_load_error, describe_unreadable

Weights: TypeAlias = Literal["ema", "model"]
"""The two sets of weights in a training checkpoint: the moving average (EMA) and the trained weights."""

INSIDE = ("ema", "state_dict", "model", "vae", "module")
"""The entries under which training scripts store tensors, in order of preference."""
WRAPPERS = ("module", "_orig_mod")
"""The name components that DistributedDataParallel and torch.compile insert."""
SECOND = "ema_models.1.ema_model."
"""The prefix of the average that FACM samples with. FACM's own checkpoints contain two averages."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their plain names; `tensors_in` describes the supported layouts."""
    content = read_file(path)
    try:
        return tensors_in(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tensors_in(content: Any, weights: Weights | None = None) -> dict[str, Tensor]:
    """Return the tensors in the content of a public checkpoint by their plain names.

    >>> list(tensors_in({"ema": {"module.weight": torch.zeros(2)}, "step": 5}))
    ['weight']

    The content is a dict of tensors, at the top level or nested under `ema`, `state_dict`, `model`, `vae`, `module`, or
    FACM's `emas`. The components `module.` and `_orig_mod.` are removed from the names. Without `weights`, the first
    entry that exists is read. A checkpoint with only one set of tensors ignores it.

    Raises:
        ValueError: if the content has anything but tensors, or lacks the requested weights.
    """
    while isinstance(content, Mapping) and (parts := _parts(content)):
        if weights is not None and weights not in parts and parts.keys() & {"ema", "model"}:
            remedy = f"pass weights={next(iter(parts))!r}"
            raise ValueError(f"weights {weights!r} not found, available are {', '.join(parts)}: {remedy}")
        content = parts[weights] if weights in parts else next(iter(parts.values()))
        weights = None if weights in parts else weights
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a dict of tensors: got {type(content).__name__}")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        found = few(others) or "nothing"
        raise ValueError(f"expected a dict of tensors, at the top level or under {', '.join(INSIDE)}: got {found}")
    return _plainly_named({str(name): tensor for name, tensor in content.items()})


def read_file(path: str | Path) -> Any:
    """Return the content of a safetensors or torch.save file, whatever its suffix, without running code from it.

    Raises:
        OSError: naming the file, if it is missing, is a folder, or may not be read.
        ValueError: naming the file and the cause, if it is truncated, has another format, or could run code.
    """
    path = Path(path)
    # Opened first: safetensors and torch report a missing permission as a missing file.
    head = _head(path)
    try:
        if head[8:9] == b"{" or path.suffix == ".safetensors":
            return load_file(path)
        # FACM stores its command-line arguments next to the weights, in a harmless Namespace.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Arbitrary bytes can raise any exception.
        raise ValueError(f"{path} cannot be read: {describe_unreadable(path) or describe_load_error(error)}") from error


def read_single_file(path: Path, tensors: Any) -> dict[str, Any]:
    """Return a network that `decm export --to safetensors` wrote, with the keys of a training checkpoint.

    `tensors` is the content of the file. The result is {"network", "record", "state_dict"}, or empty for another file.
    """
    if _head(path)[8:9] != b"{":
        return {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "network" not in metadata:
        return {}
    try:
        read = {key: json.loads(metadata[key]) for key in ("network", "record") if key in metadata}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: its metadata are not JSON ({error})") from error
    return read | {"state_dict": tensors}


def _head(path: Path) -> bytes:
    # Opening a pipe would block until something writes to it.
    if path.is_fifo():
        raise ValueError(f"{path} cannot be read: not a regular file")
    with path.open("rb") as content:
        return content.read(9)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn the errors of unexpected content into a ValueError in one line that begins with `path`."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        cause = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        # The message of torch lists every weight that does not match.
        raise ValueError(f"{path} cannot be loaded: {shorten(cause, 300, placeholder=' ...')}") from error


def few(names: Sequence[str], count: int = 3) -> str:
    """Return the first names and the number of the others.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _parts(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Return the entries that may contain tensors, in order of preference."""
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
            raise ValueError(f"duplicate tensor {bare}, also stored as {name}: remove one of them")
        plain[bare] = tensor
    return plain
