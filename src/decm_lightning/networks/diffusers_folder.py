"""Models of diffusers from a folder or the hub: which of their files are read, and which file is at fault."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from decm_lightning.files import describe_unreadable
from decm_lightning.networks.checkpoint_files import few

WEIGHTS = "diffusion_pytorch_model"
"""How the names of weights begin."""
VARIANT = "fp16"
"""The variant that is read if a model has no weights in full precision."""
FAULTS = {
    "missing_keys": "missing",
    "unexpected_keys": "left over",
    "mismatched_keys": "of another shape",
    "error_msgs": "errors",
}
"""What diffusers reports about the tensors that it has loaded."""
log = logging.getLogger(__name__)


def find_config(cls: Any, path: str, subfolder: str, what: str) -> tuple[str | None, dict[str, Any]]:
    """Find a model that is alone in a folder or hub repository, or one part of a pipeline, and read its config.

    Args:
        cls: any model class of diffusers.
        path: a folder, or a name on the Hugging Face hub.
        subfolder: where a pipeline has the model.
        what: the model, for errors.

    Returns:
        The subfolder it is in, None for the folder itself; and its config.

    Raises:
        OSError: if there is no such folder or name.
        ValueError: naming the file, if the config is not JSON.
    """
    if Path(path).is_dir():
        for place in (None, subfolder):
            file = Path(path, place or "", "config.json")
            if file.is_file():
                return place, _read_config(file, what)
        remedy = f"give the folder of a {what} or of its pipeline"
        raise FileNotFoundError(f"no config.json in {path} or {path}/{subfolder}: {remedy}")
    try:
        return None, cls.load_config(path)
    except OSError:
        try:
            return subfolder, cls.load_config(path, subfolder=subfolder)
        except OSError as error:
            name = f"no folder {path}, and no {what} of that name on the Hugging Face hub"
            raise FileNotFoundError(name) from error


def _read_config(file: Path, what: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold the arguments of a {what}: got {type(config).__name__}")
    return config


def from_pretrained(cls: Any, path: str, subfolder: str | None, **options: Any) -> Any:
    """Load a diffusers model, and check that its files have exactly its weights.

    Args:
        cls: its class, such as diffusers.AutoencoderKL.
        path: a folder, or a name on the Hugging Face hub.
        subfolder: where in it the model is; None for the folder itself.
        options: for the class's own from_pretrained.

    Raises:
        OSError: if there is no such folder or name.
        ValueError: naming the file, if one cannot be read; or naming tensors, if some are missing or left over.
    """
    try:
        model, report = _load(cls, path, subfolder, options)
    except Exception as error:
        # diffusers reports a missing permission and a damaged file in many ways.
        for file in sorted(Path(path, subfolder or "").glob("*.safetensors")):
            if cause := describe_unreadable(file):
                raise ValueError(f"{file} cannot be read: {cause}") from error
        if isinstance(error, RuntimeError):
            # torch names every tensor that does not fit.
            cause = shorten(str(error).replace("\t", " "), 300, placeholder=" ...")
            raise ValueError(f"{Path(path, subfolder or '')} cannot be loaded: {cause}") from error
        raise
    # It would continue with random weights.
    refuse_unfit(path, {word: [str(name) for name in report.get(key, ())] for key, word in FAULTS.items()})
    return model


def refuse_unfit(where: str | Path, faults: Mapping[str, Sequence[str]]) -> None:
    """Compare the tensors of a file or folder with those of a model.

    Raises:
        ValueError: that lists the tensors that do not fit, by what is wrong with them.
    """
    found = "; ".join(f"{word}: {few(names, 5)}" for word, names in faults.items() if names)
    if found:
        raise ValueError(f"{where}: its tensors are not those of its architecture; {found}")


def _load(cls: Any, path: str, subfolder: str | None, options: dict[str, Any]) -> Any:
    options |= {"subfolder": subfolder, "output_loading_info": True}
    folder = Path(path, subfolder or "")
    if not (half := _has_half_only(folder)):
        try:
            return cls.from_pretrained(path, **options)
        except OSError as error:
            if folder.is_dir() or "file named" not in str(error):
                raise
    # The files of a name on the hub are not known in advance.
    loaded = cls.from_pretrained(path, variant=VARIANT, **options)
    log.warning("%s has weights in %s only: read those", folder if half else path, VARIANT)
    return loaded


def _has_half_only(folder: Path) -> bool:
    names = [file.name for file in folder.glob(f"{WEIGHTS}*")]
    full = any(re.fullmatch(rf"{WEIGHTS}(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name) for name in names)
    return not full and any(f".{VARIANT}" in name for name in names)
