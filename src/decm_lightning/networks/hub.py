"""Find folders on this machine or on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json", ".yaml")


def is_hub_name(path: str | Path) -> bool:
    """Return whether a path can only be a hub name: user/name, without a local folder `user`.

    Mistyped paths in an existing folder, such as runs/digits, and missing files are therefore never looked up there.
    """
    name = str(path)
    return bool(HUB_NAME.fullmatch(name)) and not name.endswith(FILES) and not Path(name).parent.exists()


def download(path: str | Path, what: str, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """Return the folder at `path`, or download the folder of that name from the hub once.

    An existing folder takes precedence. Only files that match the patterns, and none of `ignore`, are downloaded.

    Raises:
        FileNotFoundError: in one line that names `what`, if neither exists or the hub cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(patterns), ignore_patterns=list(ignore)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        fault = f"{what} {path} not found, neither as a folder nor on the Hugging Face hub ({reason})"
        raise FileNotFoundError(fault) from error
