"""Folders of samples. A folder has one set of settings and only complete images, so metrics never mix two models."""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from textwrap import shorten
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from decm_lightning.files import atomic
from decm_lightning.image_listing import list_files
from decm_lightning.image_writer import has_whole_png, to_pil

SETTINGS = "settings.json"
SAMPLE = re.compile(r"\d{6,}(_class\d+)?\.png")
"""Matches the names that `sample_name` returns."""
SHOWN = 4
"""The largest number of differences that an error lists."""


@dataclass(frozen=True)
class SampleFolder:
    """A folder of samples with the same settings. Several processes can write it, and an interrupted run can resume.

    Call `check` before expensive work; it writes nothing. Call `begin` before the first sample is written; several
    processes may call it at once. Then `write` the samples that `missing` returns.

    Example:
        >>> import tempfile, torch
        >>> names = [sample_name(0, label=3), sample_name(1, label=5)]
        >>> folder = SampleFolder(Path(tempfile.mkdtemp()), {"sampler": "mix", "steps": 2, "seed": 0}, names)
        >>> folder.check()
        >>> folder.begin()
        >>> folder.write(names[0], torch.zeros(3, 32, 32, dtype=torch.uint8))
        >>> folder.missing(names, size=(32, 32))
        ['000001_class5.png']

    Args:
        folder: the folder, which may not exist yet.
        settings: all settings that determine the images, as JSON: a hash of the weights, sampler, steps, seed, ...
        names: the paths of all samples, relative to the folder; None for all names that `sample_name` returns. Images
            with other names are refused.
    """

    folder: Path
    settings: Mapping[str, Any]
    names: Collection[str] | None = None

    @property
    def file(self) -> Path:
        """The file with the settings."""
        return self.folder / SETTINGS

    def check(self) -> None:
        """Check that the folder has no images, or only samples of these settings.

        Raises:
            ValueError: naming the differences, if the folder has samples of other settings; naming the image, if it has
                other images; naming settings.json, if it is damaged.
            OSError: if the folder cannot be read.
        """
        begun = self._has_settings()
        own = self._is_own if begun else lambda image: False
        foreign = next((image for image in _images(self.folder) if not own(image)), None)
        if foreign is None:
            return
        if not begun and self._has_settings():
            # Another process has begun in the meantime.
            self.check()
            return
        what = "is not one of its samples" if begun else f"exists without {SETTINGS}"
        raise ValueError(f"{self.folder} has other images ({foreign} {what}): choose another folder, or remove them")

    def begin(self) -> None:
        """Create the folder and settings.json, if they are missing.

        Several processes may call this at once, and must have the same settings.
        """
        self.check()
        if self._has_settings():
            return
        # A link is atomic: one process succeeds, and others never see an incomplete file.
        own = self.folder / f"{SETTINGS}.{token_hex(4)}"
        with atomic(own) as partial:
            partial.write_text(json.dumps(dict(self.settings), indent=2) + "\n", encoding="utf-8")
        try:
            os.link(own, self.file)
        except FileExistsError:
            self._has_settings()
        except OSError:
            # Some file systems do not support links.
            os.replace(own, self.file)
        finally:
            own.unlink(missing_ok=True)

    def missing(self, names: Sequence[str], size: tuple[int, int] | None = None) -> list[str]:
        """Return the names of samples that are not complete PNG files of this size (width, height)."""
        return [name for name in names if not has_whole_png(self.folder / name, size)]

    def write(self, name: str, image: UInt8[Tensor, "c h w"]) -> None:
        """Write one sample as a PNG, completely or not at all."""
        with atomic(self.folder / name) as partial:
            to_pil(image).save(partial, "PNG")

    def _is_own(self, image: Path) -> bool:
        return bool(SAMPLE.fullmatch(str(image))) if self.names is None else image.as_posix() in self._known

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names or ())

    def _has_settings(self) -> bool:
        """Return whether the folder has settings. Refuse different settings."""
        saved = read_settings(self.file)
        if saved is not None:
            refuse_others(self.folder, saved, json.loads(json.dumps(self.settings)))
        return saved is not None


def sample_name(number: int, label: int | None = None) -> str:
    """Return the name of sample `number` in a folder: 000012_class3.png, or 000012.png without a label."""
    return f"{number:06d}.png" if label is None else f"{number:06d}_class{label}.png"


def read_settings(file: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, or None if it does not exist."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise _damaged(file, "empty" if not file.stat().st_size else str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(file, f"expected a JSON object: got {type(content).__name__}")
    return content


def _damaged(file: Path, cause: str) -> ValueError:
    return ValueError(f"{file} is damaged ({cause}): remove the folder to start again, or choose another")


def refuse_others(place: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that saved settings equal the requested ones."""
    differing = [key for key in {**settings, **saved} if saved.get(key) != settings.get(key)]
    if differing:
        short = {key: [shorten(str(part.get(key)), 60) for part in (saved, settings)] for key in differing[:SHOWN]}
        values = "; ".join(f"{key}: {old} in the folder, requested {new}" for key, (old, new) in short.items())
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise ValueError(f"{place} has samples of other settings ({values}{more}): choose another folder")


def _images(folder: Path) -> list[Path]:
    """Return the images in a folder and below, relative to it; hidden files are left out."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [Path(*parts) for parts in list_files(folder, suffixes).files] if folder.exists() else []
