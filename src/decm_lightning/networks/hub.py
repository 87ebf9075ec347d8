"""Folders that are on this machine, or on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json", ".yaml")


def is_hub_name(path: str | Path) -> bool:
    """Return whether a path can only be a name on the hub: user/name, where no folder `user` is on this machine.

    A mistyped path such as runs/digits is thus never looked up there, nor is a missing file.
    """
    name = str(path)
    return bool(HUB_NAME.fullmatch(name)) and not name.endswith(FILES) and not Path(name).parent.exists()


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
