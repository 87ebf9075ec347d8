"""Folders that are on this machine, or on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-]+")
"""user/name: one slash and no suffix, so that a missing file is never looked for on the hub."""


def is_hub_name(path: str | Path) -> bool:
    """Return whether nothing is at `path` on this machine and it has the form user/name."""
    return HUB_NAME.fullmatch(str(path)) is not None and not Path(path).exists()


def download(path: str | Path, what: str, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """Return the folder at `path`; or the one of that name on the hub, which is downloaded once.

    Args:
        path: a folder, which goes before a name on the hub.
        what: it holds, for the error.
        patterns: of the files to download.
        ignore: patterns of files that are not downloaded.

    Raises:
        FileNotFoundError: in one line, if it is neither, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(patterns), ignore_patterns=list(ignore)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"no {what} {path}: neither a folder nor on the Hugging Face hub ({reason})") from error
