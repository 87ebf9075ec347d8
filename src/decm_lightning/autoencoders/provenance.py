"""The origin of a folder of latents: cache.json, which the encoder writes next to the shards."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from decm_lightning.autoencoders.latent_coder import LatentCoder
from decm_lightning.autoencoders.loading import load_autoencoder
from decm_lightning.autoencoders.normalization import LatentNormalization
from decm_lightning.files import describe_unreadable, file_sha256, write_json

RECORD = "cache.json"
MANIFEST = "manifest"
SCALING: dict[str, bool | float] = {"latent_norm": True, "latent_multiplier": 1.0}
"""The scaling of latents that `decm encode` writes, and of folders without cache.json."""


class LatentRows(Protocol):
    """The latents of a folder, such as data.latents.shards.Shards."""

    folder: Path
    shape: tuple[int, ...]
    num_classes: int
    left_out: int

    def __len__(self) -> int:
        """Return the number of images."""


@dataclass(frozen=True)
class Provenance:
    """The content of cache.json, which records where a folder of latents comes from.

    Args:
        vae: name or hash of the VAE that encoded the images. The same VAE must decode samples.
        scaling: `latent_norm` and `latent_multiplier` for training.
        shape: [c, h, w] of a latent.
        num_images: total number of rows in all shards.
        num_classes: labels are below it.
        checksums: SHA-256 by file name, for latents_stats.pt and optionally for shards.
        encoding: all other settings that determine the latents, such as image size, posterior and seed.
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
        """Read the record of a folder; return None if there is none. Unknown entries are ignored."""
        file = Path(folder) / RECORD
        if not os.path.lexists(file):
            if (file.parent / MANIFEST).is_dir():
                raise ValueError(f"the latents in {folder} are incomplete: run decm encode again to resume")
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

    def check(self, shards: LatentRows, scaling: dict[str, bool | float]) -> None:
        """Refuse shards or a scaling that do not match the record."""
        if found := self.differences(shards, scaling):
            raise ValueError(found[0])

    def differences(self, shards: LatentRows, scaling: dict[str, bool | float]) -> list[str]:
        """Describe all differences from the record, and all missing files."""
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
            *(f"{path} is missing, but {RECORD} lists it" for path in missing),
        ]

    def check_file(self, file: Path) -> None:
        """Refuse a file that has changed since the record was written. Files without a checksum are accepted."""
        recorded = self.checksums.get(file.name)
        if recorded is not None and recorded != (found := file_sha256(file)):
            raise ValueError(f"{file} has changed since {RECORD} was written: its SHA-256 is {found}, not {recorded}")

    def check_vae(self, folder: str | Path, vae: str, identity: str) -> None:
        """Refuse a VAE, with this name and identity, that did not encode the images of a folder."""
        if self.vae != identity:
            raise ValueError(
                f"{Path(folder) / RECORD} says that {self.vae} encoded these latents, but {vae} is {identity}: use "
                "the VAE that encoded them"
            )


def read_coder(vae: str, folder: str | Path | None, normalization: LatentNormalization | None = None) -> LatentCoder:
    """Load the coder for a folder of latents.

    Args:
        vae: the VAE; see `load_autoencoder`.
        folder: folder of the latents, with cache.json and latents_stats.pt; None for the normalization in the config of
            the VAE.
        normalization: normalization used in training; None for the one in cache.json, or else (z - mean) / std.

    Raises:
        FileNotFoundError: if the VAE or latents_stats.pt does not exist.
        ValueError: if cache.json names another VAE, or the latents have another number of channels.
    """
    autoencoder = load_autoencoder(vae)
    if not folder:
        return LatentCoder(autoencoder)
    provenance = Provenance.read(folder)
    if provenance is not None:
        provenance.check_vae(folder, vae, autoencoder.identity)
    if normalization is None:
        options = provenance.scaling if provenance else SCALING
        normalization = LatentNormalization.read(
            folder, autoencoder.latent_channels, bool(options["latent_norm"]), options["latent_multiplier"]
        )
    return LatentCoder(autoencoder, normalization)


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
"""The entries of cache.json, each with a check of its value and a description of valid values."""


def _short(value: object) -> str:
    """Return a value as JSON, cut to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
