"""FSDP2 over all processes, with checkpoints that are either complete or absent."""

import errno
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from decm_lightning.files import FULL, PARTIAL, remove, replace_folder


class FSDP2(ModelParallelStrategy):
    """ModelParallelStrategy that shards every network over all processes, for any number of devices and nodes.

    Lightning's default shards only over nodes, and other sizes must repeat devices x nodes. A sharded checkpoint is
    written into PATH.partial, which is renamed to PATH when all processes have written their parts. Until then an
    existing checkpoint at PATH is unchanged. While it is replaced, it is named PATH.previous.

    Args:
        save_distributed_checkpoint: whether each process writes its part into a folder; otherwise the first process
            gathers all parts into one file.
        process_group_backend: None for the device's default.
        timeout: how long a process waits for the others.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """Set the data-parallel size to the number of processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint completely or not at all.

        Raises:
            OSError: in every process, naming the checkpoint, if one process cannot write its part.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        partial = path.with_name(path.name + PARTIAL)
        try:
            # All processes complete each step together: if one failed alone, the others would wait forever.
            self._together(path, lambda: remove(partial), first_only=True)
            self._together(path, lambda: partial.mkdir(parents=True, exist_ok=True))
            save = super().save_checkpoint
            self._together(path, lambda: save(checkpoint, partial, storage_options))
            self._together(path, lambda: replace_folder(path, partial), first_only=True)
        except BaseException:
            if self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _together(self, path: Path, action: Callable[[], None], first_only: bool = False) -> None:
        """Run an action in every process, or in the first one only; if it fails in one, raise an error in all.

        Raises:
            OSError: naming the checkpoint and the cause in the first process that failed.
        """
        failure, caught = None, None
        try:
            if self.is_global_zero or not first_only:
                action()
        # CheckpointException is a BaseException with the errors of all processes.
        except (Exception, CheckpointException) as error:
            failure, caught = Failure.of(error, path, self.global_rank), error
        failures: list[Failure | None] = [failure]
        if self.world_size > 1:
            failures *= self.world_size
            dist.all_gather_object(failures, failure)
        for failed in filter(None, failures):
            raise OSError(failed.errno, f"{failed.text} (process {failed.rank})", str(path)) from caught


class Failure(NamedTuple):
    """The reason why a process failed."""

    errno: int
    text: str
    rank: int

    @classmethod
    def of(cls, error: BaseException, path: Path, rank: int) -> "Failure":
        """Return the cause of an error while a checkpoint is written."""
        causes = error.failures if isinstance(error, CheckpointException) else {rank: (error, None)}
        rank, (cause, _) = next(iter(causes.items()))
        if isinstance(cause, OSError) and cause.errno:
            return cls(cause.errno, os.strerror(cause.errno), rank)
        # torch reports a full disk without an errno.
        place = next(parent for parent in path.absolute().parents if parent.exists())
        if "No space left" in str(cause) or shutil.disk_usage(place).free < FULL:
            return cls(errno.ENOSPC, os.strerror(errno.ENOSPC), rank)
        return cls(errno.EIO, (str(cause) or type(cause).__name__).splitlines()[0], rank)
