"""Load diffusers models from a folder or the Hugging Face hub, with errors that name the file at fault."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from decm_lightning.files import describe_unreadable
from decm_lightning.networks.checkpoint_files import few
from decm_lightning.networks.hub import cache_without_network, download, is_hub_name

WEIGHTS = "diffusion_pytorch_model"
"""The prefix of the names of weight files."""
VARIANT = "fp16"
"""The variant to load if a model has no full-precision weights."""
FAULTS = {
    "missing_keys": "missing",
    "unexpected_keys": "unexpected",
    "mismatched_keys": "wrong shape",
    "error_msgs": "errors",
}
"""The faults in the loading report of diffusers, and how errors name them."""
log = logging.getLogger(__name__)


def find_config(path: str, subfolder: str, what: str) -> tuple[str | None, dict[str, Any]]:
    """Find a model, alone or in a subfolder of a pipeline: return this subfolder, or None, and the model's config.

    `path` is a folder, or a name on the Hugging Face hub. Errors call the model `what`.
    """
    if not Path(path).is_dir() and not is_hub_name(path):
        # Without a connection, the hub's client would try for half a minute.
        raise FileNotFoundError(f"{what} {path} not found, neither as a folder nor on the Hugging Face hub")
    folder = download(path, what, ["config.json", f"{subfolder}/config.json"])
    for place in (None, subfolder):
        file = folder / (place or "") / "config.json"
        if file.is_file():
            return place, _read_config(file, what)
    remedy = f"pass the folder of a {what} or of its pipeline"
    raise FileNotFoundError(f"no config.json in {path} or {path}/{subfolder}: {remedy}")


def _read_config(file: Path, what: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must contain the arguments of a {what}: got {type(config).__name__}")
    return config


def from_pretrained(cls: Any, path: str, subfolder: str | None, **options: Any) -> Any:
    """Load a model of diffusers from a folder or the hub, and check that its files contain exactly its weights."""
    try:
        with cache_without_network(path):
            model, report = _load(cls, path, subfolder, options)
    except Exception as error:
        # diffusers raises various errors for files that are damaged or may not be read, without naming the file.
        for file in sorted(Path(path, subfolder or "").glob("*.safetensors")):
            if cause := describe_unreadable(file):
                raise ValueError(f"{file} cannot be read: {cause}") from error
        if isinstance(error, RuntimeError):
            # The message of torch lists every tensor that does not match.
            cause = shorten(str(error).replace("\t", " "), 300, placeholder=" ...")
            raise ValueError(f"{Path(path, subfolder or '')} cannot be loaded: {cause}") from error
        raise
    # diffusers initializes missing weights at random.
    refuse_unfit(path, {word: [str(name) for name in report.get(key, ())] for key, word in FAULTS.items()})
    return model


def refuse_unfit(where: str | Path, faults: Mapping[str, Sequence[str]]) -> None:
    """Raise an error if any tensor of a file or folder does not match the model."""
    found = "; ".join(f"{word}: {few(names, 5)}" for word, names in faults.items() if names)
    if found:
        raise ValueError(f"{where}: the tensors do not match the architecture; {found}")


def _load(cls: Any, path: str, subfolder: str | None, options: dict[str, Any]) -> Any:
    options |= {"subfolder": subfolder, "output_loading_info": True}
    folder = Path(path, subfolder or "")
    if not (half := _has_half_only(folder)):
        try:
            return cls.from_pretrained(path, **options)
        except OSError as error:
            if folder.is_dir() or "file named" not in str(error):
                raise
    # The files in a hub repository are not known in advance.
    loaded = cls.from_pretrained(path, variant=VARIANT, **options)
    log.warning("%s only has %s weights: using those", folder if half else path, VARIANT)
    return loaded


def _has_half_only(folder: Path) -> bool:
    names = [file.name for file in folder.glob(f"{WEIGHTS}*")]
    full = any(re.fullmatch(rf"{WEIGHTS}(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name) for name in names)
    return not full and any(f".{VARIANT}" in name for name in names)
