"""Cached files and folders that several processes may make at once, and whose maker may be killed."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from decm_lightning.files import PARTIAL


def make_once(path: Path, make: Callable[[], None], is_current: Callable[[], bool] | None = None) -> None:
    """Call `make`, which creates `path`, unless it exists. Of two processes, the second waits for the first.

    Args:
        path: a file or folder; while it is made, `path`.lock is locked.
        make: creates it, through a name that ends with .partial.
        is_current: whether it exists and need not be made again; by default, whether it exists.
    """
    is_current = is_current or path.exists
    if is_current():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not is_current():
            make()


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the partial files and folders that killed processes left, but not those that are being written.

    Args:
        folder: where they are.
        pattern: of the final names, such as "pairs-*".
    """
    for partial in folder.glob(pattern + PARTIAL):
        # The process that writes it holds its lock.
        with suppress(Timeout), FileLock(f"{str(partial).removesuffix(PARTIAL)}.lock", blocking=False):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
