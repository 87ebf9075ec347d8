"""What is known of a folder of latents while it is encoded: its settings, and for each shard a record."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decm_lightning.data.latents.scaling import Moments
from decm_lightning.files import atomic
from decm_lightning.seeds import check_seed


@dataclass(frozen=True)
class EncodingSettings:
    """All settings that determine the latents of an image. A folder can only be resumed with the same settings.

    Args:
        vae: identity of the VAE.
        size: height and width of the images in pixels.
        posterior: "sample" or "mode".
        seed: of the samples of the posterior, in [0, 2^63).
        num_classes: labels are below it.
        shard_size: images in each new shard but the last, at least 1.

    Raises:
        ValueError: if seed or shard_size is out of range.
    """

    vae: str
    size: int
    posterior: str
    seed: int
    num_classes: int
    shard_size: int

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1: got {self.shard_size}")


@dataclass(frozen=True)
class Shard:
    """The images of one file.

    Attributes:
        name: of the file.
        images: the range of the images in their order, which is not empty.
        images_sha256: SHA-256 of the names, labels, sizes and times of the images.
    """

    name: str
    images: range
    images_sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a shard that is written.

    Attributes:
        checksum: SHA-256 of the file; "" if no image of the shard could be read, in which case there is no file.
        images_sha256: as in `Shard`, at the time of encoding.
        num_images: rows of the file.
        moments: of its latents, as Moments.as_json gives them.
        skipped: what was wrong with each image that was left out, by name.
    """

    checksum: str
    images_sha256: str
    num_images: int
    moments: dict[str, Any]
    skipped: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> "ShardRecord | None":
        """Return the record in a file, None if the file is missing or damaged."""
        try:
            record = cls(**json.loads(file.read_text(encoding="utf-8")))
            Moments.from_json(record.moments)
            texts = (record.checksum, record.images_sha256, *record.skipped.values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):
            return None
        return record if all(isinstance(text, str) for text in texts) and isinstance(record.num_images, int) else None

    def write(self, file: Path) -> None:
        """Write the record."""
        write_json(file, asdict(self))


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file of JSON, whole or not at all."""
    with atomic(file) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
