"""Create cached files and folders safely when several processes start at once or one is killed."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from decm_lightning.files import PARTIAL


def make_once(path: Path, make: Callable[[], None], is_current: Callable[[], bool] | None = None) -> None:
    """Call `make` to create `path` unless it already exists. A second process waits until the first has finished.

    Args:
        path: the file or folder to create. `path`.lock is locked while `make` runs.
        make: creates `path`. It must write to a name ending in .partial and rename it at the end.
        is_current: returns whether `path` exists and is up to date; by default, whether it exists.
    """
    is_current = is_current or path.exists
    if is_current():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not is_current():
            make()


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove partial files and folders left by killed processes. Those still being written are not touched.

    Args:
        folder: the folder to search.
        pattern: pattern of the final names, such as "pairs-*".
    """
    for partial in folder.glob(pattern + PARTIAL):
        # A process that is still writing holds the lock.
        with suppress(Timeout), FileLock(f"{str(partial).removesuffix(PARTIAL)}.lock", blocking=False):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
