"""decm consolidate: a sharded checkpoint as one file that a single process reads."""

from pathlib import Path

import torch

from decm_lightning.files import atomic
from decm_lightning.networks.sharded import read_rest, read_whole


def consolidate(checkpoint: str, out: str | None = None) -> None:
    """Merge the shards that the processes of FSDP2 have written into an ordinary checkpoint, optimizer included.

    decm fit --ckpt_path resumes from it on one device. For the averaged weights alone use decm export, which reads
    shards too.

    Args:
        checkpoint: the folder that decm fit has written with save_distributed_checkpoint.
        out: the file to write; by default next to the checkpoint, its name ending in .consolidated.
    """
    folder = Path(checkpoint)
    if out == "":
        raise ValueError("out must be the name of a file: got ''")
    file = Path(out) if out is not None else folder.with_name(f"{folder.name}.consolidated")
    if file.exists() and file.samefile(folder):
        raise ValueError(f"out must be another path than the checkpoint: got {out}")
    if file.is_dir():
        raise IsADirectoryError(f"out must be a file: {file} is a folder")
    read_rest(folder)
    with atomic(file) as partial:
        torch.save(read_whole(folder, partial.parent), partial)
    print(f"wrote {file}")
