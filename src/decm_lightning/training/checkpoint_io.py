"""Where checkpoints are written: next to their final name, never by way of the temporary directory."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from decm_lightning.files import atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, next to its final name; a full disk is named by the checkpoint's path.

    Lightning's own keeps the whole checkpoint in memory, then writes it into the temporary directory and copies it: on
    a cluster that is often another, smaller disk, or memory again. Remote paths (s3://, ...) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write the checkpoint.

        Raises:
            OSError: naming the path, if it cannot be written.
        """
        local = str(path).removeprefix("file://")
        if storage_options is not None or "://" in local:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic(local) as partial:
            torch.save(checkpoint, partial)
