"""decm consolidate: merge a sharded checkpoint into one file that a single process reads."""

from pathlib import Path

import torch

from decm_lightning.files import atomic
from decm_lightning.networks.sharded import read_rest, read_whole


def consolidate(checkpoint: str, out: str | None = None) -> None:
    """Merge the shards written by FSDP2 into one checkpoint file, including the state of the optimizer.

    Resume from the file on one device with decm fit --ckpt_path. If you only need the averaged weights, use decm
    export, which also reads sharded checkpoints.

    Args:
        checkpoint: the folder that decm fit wrote with save_distributed_checkpoint.
        out: the file to write; by default the checkpoint's path with .consolidated appended.
    """
    folder = Path(checkpoint)
    file = Path(out) if out is not None else folder.with_name(f"{folder.name}.consolidated")
    if file.exists() and file.samefile(folder):
        raise ValueError(f"out must differ from the path of the checkpoint: got {out}")
    if file.is_dir():
        raise IsADirectoryError(f"out must be a file: {file} is a folder")
    read_rest(folder)
    with atomic(file) as partial:
        torch.save(read_whole(folder, partial.parent), partial)
    print(f"wrote {file}")
