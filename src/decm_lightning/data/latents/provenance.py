"""Where a folder of latents comes from: cache.json, which its encoder writes next to the shards."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decm_lightning.data.latents.shards import Shards
from decm_lightning.files import describe_unreadable, file_sha256, write_json

RECORD = "cache.json"
MANIFEST = "manifest"


@dataclass(frozen=True)
class Provenance:
    """Where a folder of latents comes from: what its encoder writes next to the shards as cache.json.

    Args:
        vae: name or hash of the VAE that encoded the images, and must decode samples.
        scaling: the `latent_norm` and `latent_multiplier` that training uses.
        shape: [c, h, w] of a latent.
        num_images: rows of all shards together.
        num_classes: labels are below it.
        checksums: SHA-256 by file name: of latents_stats.pt, and, optionally, of shards.
        encoding: what else decides the latents: size of the images, their names, posterior and seed.
    """

    vae: str
    scaling: dict[str, bool | float]
    shape: list[int]
    num_images: int
    num_classes: int
    checksums: dict[str, str]
    encoding: dict[str, str | int] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> "Provenance | None":
        """Return a folder's record, None if it has none. Entries that it does not know are left alone.

        Raises:
            ValueError: naming the file and the entries, if it cannot be read, is not JSON, lacks entries or has some of
                another type, or is still to come.
        """
        file = Path(folder) / RECORD
        if not os.path.lexists(file):
            if (file.parent / MANIFEST).is_dir():
                raise ValueError(f"the latents in {folder} are not complete: run decm encode again to resume")
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: {describe_unreadable(file, text=True) or f'not JSON: {error}'}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} must hold an object with {', '.join(ENTRIES)}: got {_short(content)}")
        if missing := [name for name in ENTRIES if name not in content and name != "encoding"]:
            raise ValueError(f"{file} lacks {', '.join(missing)}")
        wrong = [
            f"{name} must be {expected}: got {_short(content[name])}"
            for name, (fits, expected) in ENTRIES.items()
            if not fits(content.get(name))
        ]
        if wrong:
            raise ValueError(f"{file}: {'; '.join(wrong)}")
        known: dict[str, Any] = {name: content.get(name) for name in ENTRIES}
        return cls(**known)

    def write(self, folder: str | Path) -> None:
        """Write the record into a folder."""
        write_json(Path(folder) / RECORD, asdict(self))

    def check(self, shards: Shards, scaling: dict[str, bool | float]) -> None:
        """Refuse shards or a scaling that are not those of the record.

        Raises:
            ValueError: naming the first thing that differs, or is missing.
        """
        if found := self.differences(shards, scaling):
            raise ValueError(found[0])

    def differences(self, shards: Shards, scaling: dict[str, bool | float]) -> list[str]:
        """Describe everything that differs from the record, or is missing."""
        found = {
            "shape": list(shards.shape),
            "num_images": len(shards),
            "num_classes": shards.num_classes,
            "scaling": scaling,
        }
        recorded = {name: getattr(self, name) for name in found}
        recorded["scaling"] = {name: self.scaling[name] for name in scaling}
        if shards.left_out:
            del found["num_images"]
        file = shards.folder / RECORD
        differing = [name for name in found if found[name] != recorded[name]]
        missing = [shards.folder / name for name in self.checksums if not (shards.folder / name).is_file()]
        return [
            *(f"{file} says that {name} is {recorded[name]}: got {found[name]}" for name in differing),
            *(f"no file {path}, which {RECORD} names" for path in missing),
        ]

    def check_file(self, file: Path) -> None:
        """Refuse a file that has changed since the record was written; one that the record does not name passes.

        Raises:
            ValueError: naming the file.
        """
        recorded = self.checksums.get(file.name)
        if recorded is not None and recorded != (found := file_sha256(file)):
            raise ValueError(f"{file} is not the one that {RECORD} names: its SHA-256 is {found}")

    def check_vae(self, folder: str | Path, vae: str, identity: str) -> None:
        """Refuse a VAE that did not encode the images.

        Args:
            folder: of the latents.
            vae: the name that the user knows it by.
            identity: its `Autoencoder.identity`.

        Raises:
            ValueError: naming both.
        """
        if self.vae != identity:
            raise ValueError(
                f"{Path(folder) / RECORD} says that {self.vae} encoded these latents: {vae} is {identity}, which would "
                "decode them wrongly"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_scaling(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("latent_norm"), bool):
        return False
    multiplier = value.get("latent_multiplier")
    return isinstance(multiplier, int | float) and not isinstance(multiplier, bool) and 0 < multiplier < math.inf


def _is_checksums(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


ENTRIES: dict[str, tuple[Callable[[object], bool], str]] = {
    "vae": (lambda value: isinstance(value, str), "a string"),
    "scaling": (_is_scaling, "latent_norm (true or false) and latent_multiplier (a number above 0)"),
    "shape": (
        lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_count, value)),
        "[channels, height, width], integers above 0",
    ),
    "num_images": (_is_count, "an integer above 0"),
    "num_classes": (_is_count, "an integer above 0"),
    "checksums": (_is_checksums, "SHA-256 by file name"),
    "encoding": (lambda value: value is None or isinstance(value, dict), "an object or null"),
}
"""The entries of cache.json: whether a value fits, and what is expected."""


def _short(value: object) -> str:
    """Return a value as JSON, at most 60 characters of it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
