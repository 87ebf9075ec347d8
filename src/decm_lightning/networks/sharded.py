"""Sharded checkpoints: folders to which each FSDP2 process writes its shard of every tensor.

Lightning's ModelParallelStrategy saves weights and optimizers with torch.distributed.checkpoint. The other entries of a
checkpoint, such as the step and the description of the network, are stored next to them in `meta.pt`.
torch.distributed.checkpoint is imported only where it is needed, because that takes a second.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from decm_lightning.files import atomic
from decm_lightning.networks.checkpoint_files import read_file

REST, INDEX = "meta.pt", ".metadata"
"""The file of everything but tensors, and the index of the shards; both are written last."""


def is_sharded(path: Path) -> bool:
    """Return whether `path` is a complete or incomplete sharded checkpoint."""
    return path.is_dir() and ((path / REST).exists() or (path / INDEX).exists() or any(path.glob("*.distcp")))


def read_rest(folder: Path) -> dict[str, Any]:
    """Return the entries of a sharded checkpoint other than weights and optimizers."""
    missing = [name for name in (INDEX, REST) if not (folder / name).is_file()]
    if missing and is_sharded(folder):
        raise ValueError(f"{folder} is incomplete, it lacks {' and '.join(missing)}: use an earlier checkpoint")
    if missing:
        raise ValueError(f"{folder} is not a sharded checkpoint: expected a folder with {INDEX} and {REST}")
    rest = read_file(folder / REST)
    if not isinstance(rest, dict):
        raise ValueError(f"{folder / REST} must contain a dict: got {type(rest).__name__}")
    return rest


def fill(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Read weights into tensors in place, by their names in the state_dict. Other weights are not read."""
    from torch.distributed import checkpoint as dcp

    with _as_one_line(folder), warnings.catch_warnings():
        # Only this process is supposed to read.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load({"state_dict": dict(tensors)}, checkpoint_id=folder, no_dist=True)


def read_whole(folder: Path, scratch: Path) -> dict[str, Any]:
    """Return a sharded checkpoint in the layout of a checkpoint in one file, including the optimizers.

    The folder `scratch` needs space for a temporary copy of all tensors.

    Raises:
        OSError: naming `scratch`, if it cannot be written to, for example because the disk is full.
        ValueError: if `folder` is not a sharded checkpoint, or an incomplete one.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    rest = read_rest(folder)
    with TemporaryDirectory(dir=scratch) as place:
        file = Path(place) / "tensors.pt"
        with _as_one_line(folder), atomic(file) as partial:
            dcp_to_torch_save(folder, partial)
        parts = read_file(file)
    optimizers = sorted((name for name in parts if name.startswith("optimizer_")), key=lambda name: int(name[10:]))
    states = [_by_number(parts[name]) for name in optimizers]
    return {**rest, "state_dict": parts["state_dict"], "optimizer_states": states}


def _by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    # Sharded optimizer states use parameter names as keys, ordinary ones use positions in the parameter groups.
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: state for name, state in optimizer["state"].items()},
        "param_groups": [
            group | {"params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]
        ],
    }


@contextmanager
def _as_one_line(folder: Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {cause(error)}") from error


def cause(error: Any) -> str:
    """Return the cause of a CheckpointException in one line; its message has the tracebacks of all processes."""
    first, _ = next(iter(error.failures.values()))
    return str(first).splitlines()[0] if str(first) else type(first).__name__
