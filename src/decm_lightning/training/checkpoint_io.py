"""Write checkpoints next to their final path, without the temporary directory."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from decm_lightning.files import atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all. An error of a full disk names the checkpoint's path.

    Lightning holds the whole checkpoint in memory, writes it into the temporary directory and copies it. On a cluster
    that directory is often a smaller disk or in memory. Lightning still writes to remote paths (s3://, ...).
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
