"""Sharded checkpoints: a folder into which each process of FSDP2 has written its part of every tensor.

Lightning's ModelParallelStrategy writes weights and optimizers by torch.distributed.checkpoint, and all else that an
ordinary checkpoint holds, such as the step and what describes the network, into `meta.pt` beside them.
torch.distributed.checkpoint is imported where it is needed alone: it takes a second.
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
"""What is no tensor, and where the parts of each tensor are; both are written last."""


def is_sharded(path: Path) -> bool:
    """Return whether there is a sharded checkpoint at `path`, or what is left of one."""
    return path.is_dir() and ((path / REST).exists() or (path / INDEX).exists() or any(path.glob("*.distcp")))


def read_rest(folder: Path) -> dict[str, Any]:
    """Return all of a sharded checkpoint but weights and optimizers.

    Raises:
        ValueError: if `folder` holds no sharded checkpoint, or one whose saving was cut short.
    """
    missing = [name for name in (INDEX, REST) if not (folder / name).is_file()]
    if missing and is_sharded(folder):
        raise ValueError(f"{folder} has no {' and no '.join(missing)}: its saving was cut short, take an earlier one")
    if missing:
        raise ValueError(f"{folder} is no sharded checkpoint: a folder with {INDEX} and {REST} is expected")
    rest = read_file(folder / REST)
    if not isinstance(rest, dict):
        raise ValueError(f"{folder / REST} must hold a dict: got {type(rest).__name__}")
    return rest


def fill(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Read weights into tensors, in place and by their names in the state_dict; of the files no more than these.

    Raises:
        ValueError: if one is missing or has another shape, or a file is missing or cut short.
    """
    from torch.distributed import checkpoint as dcp

    with _as_one_line(folder), warnings.catch_warnings():
        # That only this process reads is what is wanted.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load({"state_dict": dict(tensors)}, checkpoint_id=folder, no_dist=True)


def read_whole(folder: Path, scratch: Path) -> dict[str, Any]:
    """Return a sharded checkpoint as one process would have written it, optimizers included.

    Args:
        folder: the checkpoint.
        scratch: a folder with room for all tensors, which are written there temporarily.

    Raises:
        OSError: naming `scratch`, if that cannot be written, for example because the disk is full.
        ValueError: if `folder` holds no sharded checkpoint, or not all of one.
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
    # Sharded, an optimizer knows its parameters by name; otherwise by their place in its groups.
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
    """Return in one line what a CheckpointException is about: its own text holds the traceback of every process."""
    first, _ = next(iter(error.failures.values()))
    return str(first).splitlines()[0] if str(first) else type(first).__name__
