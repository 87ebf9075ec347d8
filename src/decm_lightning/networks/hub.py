"""Find folders on this machine or on the Hugging Face hub."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SECONDS = 4
"""The time in which the hub has to answer."""
FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json", ".yaml")


def is_hub_name(path: str | Path) -> bool:
    """Return whether a path can only be a hub name: user/name, without a local folder `user`.

    Mistyped paths in an existing folder, such as runs/digits, and missing files are therefore never looked up there.
    """
    name = str(path)
    return bool(HUB_NAME.fullmatch(name)) and not name.endswith(FILES) and not Path(name).parent.exists()


@contextmanager
def cache_without_network(path: str | Path) -> Iterator[None]:
    """While a path is looked up on the hub, let Hugging Face's libraries use only their caches if it does not answer.

    Otherwise each of them repeats its requests for up to a minute before it fails.
    """
    from huggingface_hub import constants, get_session

    places = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    before = [place.HF_HUB_OFFLINE for place in places]
    if not constants.HF_HUB_OFFLINE and not Path(path).exists():
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except Exception:  # of the HTTP library, which differs between versions
            for place in places:
                place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


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
        options: dict[str, Any] = {
            "allow_patterns": list(patterns),
            "ignore_patterns": list(ignore),
            "etag_timeout": SECONDS,
        }
        return Path(snapshot_download(str(path), **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        fault = f"{what} {path} not found, neither as a folder nor on the Hugging Face hub ({reason})"
        raise FileNotFoundError(fault) from error
