"""decm consolidate: of a checkpoint in shards, one that a single process reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli

from decm_lightning.files import atomic
from decm_lightning.networks import load, save
from decm_lightning.networks.pretrained import check_target
from decm_lightning.networks.sharded import read_rest, read_whole


def consolidate(
    checkpoint: str, out: str | None = None, to: Literal["folder", "ckpt"] = "folder", trust: bool = False
) -> None:
    """Make one of the shards that the processes of FSDP2 have written.

    Args:
        checkpoint: the folder that decm fit has written with save_distributed_checkpoint.
        out: the folder or file to write; by default beside the checkpoint, its name ending in .consolidated.
        to: "folder" for the averaged weights as decm export writes them (config.json, model.safetensors); "ckpt" for
            an ordinary checkpoint, with the optimizer's state, that decm fit --ckpt_path goes on with on one device.
        trust: import the module of a network class from outside this package, which runs its code.
    """
    folder = Path(checkpoint)
    if out == "":
        raise ValueError("out must be the name of a folder or file: got ''")
    target = Path(out) if out is not None else folder.with_name(f"{folder.name}.consolidated")
    try:
        folder.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no checkpoint at {checkpoint}") from error
    if target.exists() and target.samefile(folder):
        raise ValueError(f"out must be another path than the checkpoint: got {out}")
    read_rest(folder)
    if to == "folder":
        save(load(folder, trust=trust), check_target(target))
        print(f"wrote {target}/config.json and {target}/model.safetensors")
    else:
        _write(folder, target)
        print(f"wrote {target}")


def run(argv: Sequence[str]) -> None:
    """Parse and consolidate."""
    auto_cli(consolidate, args=list(argv), prog="decm consolidate", exit_on_error=False)


def _write(folder: Path, file: Path) -> None:
    if file.is_dir():
        raise IsADirectoryError(f"out must be a file with --to ckpt: {file} is a folder")
    with atomic(file) as partial:
        torch.save(read_whole(folder, partial.parent), partial)
