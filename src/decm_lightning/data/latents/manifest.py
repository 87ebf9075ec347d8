"""A folder of latents while it is encoded: the settings, which shards are up to date, and how it is finished."""

import io
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from decm_lightning.data.latents.normalization import STATISTICS, Moments
from decm_lightning.data.latents.provenance import MANIFEST, RECORD, Provenance
from decm_lightning.files import PARTIAL, atomic, file_sha256, text_sha256, write_json
from decm_lightning.seeds import check_seed

REQUEST = "request.json"
STARTS = "shard_starts"
LOCK = "encode.lock"
SHARDS = "latents_rank00_shard*.safetensors"
SCALING: dict[str, bool | float] = {"latent_norm": True, "latent_multiplier": 1.0}
Order = tuple[str, ...]


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


class Manifest:
    """The shards of a folder: neighboring images, written as a whole or not at all.

    The subfolder `manifest` holds the settings, the first image of each shard, and for each shard a `ShardRecord`,
    which is written before the shard. A shard is up to date if its images have the names, labels, sizes and times of
    its record, and its file the checksum of the record. Where shards begin is kept, so that an image that is removed
    or added changes its own shard only. Files that are damaged are encoded again.

    Args:
        folder: where the shards are written, created if it is missing.
        settings: what the latents depend on.
    """

    def __init__(self, folder: str | Path, settings: EncodingSettings) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self._starts: list[Order] = []
        self._lock = FileLock(self._records / LOCK)

    def lock(self) -> None:
        """Keep other processes from encoding into the folder until `unlock`, or the end of this process.

        Raises:
            ValueError: if another process encodes into it.
        """
        self._records.mkdir(parents=True, exist_ok=True)
        try:
            # Some network disks have no locks.
            with suppress(NotImplementedError):
                self._lock.acquire(blocking=False)
        except Timeout as error:
            what = f"another process encodes into {self.folder}"
            raise ValueError(f"{what}: wait until it has ended, or give another --out") from error

    def unlock(self) -> None:
        """Let other processes encode into the folder."""
        self._lock.release()

    def plan(self, order: Sequence[Order], identities: Sequence[str]) -> list[Shard]:
        """Return the shards of all images.

        Args:
            order: what each image is sorted by, ascending.
            identities: what differs for each image after it was replaced.

        Raises:
            ValueError: if the folder was begun with other settings, or holds shards that were not encoded here.
        """
        starts = self._begun()
        ranges = _ranges([bisect_left(order, start) for start in starts], len(order))
        # Also where there are no starts yet.
        if max(map(len, ranges)) > 2 * self.settings.shard_size or not starts:
            ranges = _ranges(list(range(0, len(order), self.settings.shard_size)), len(order))
            starts = [order[part.start] for part in ranges]
        self._starts = starts
        digits = max(3, len(str(len(starts) - 1)))
        return [
            # LightningDiT's form. The rank is 0 in all of them: which process encodes a shard makes no difference.
            Shard(
                f"latents_rank00_shard{number:0{digits}d}.safetensors",
                part,
                text_sha256("\n".join(identities[part.start : part.stop])),
            )
            for number, part in enumerate(ranges)
            if part
        ]

    def begin(self) -> None:
        """Write the settings and the first images of the shards that were planned last."""
        write_json(self._records / REQUEST, asdict(self.settings) | {STARTS: self._starts})
        # Until all shards are written, the folder is not complete.
        (self.folder / RECORD).unlink(missing_ok=True)

    def is_up_to_date(self, shard: Shard, allow_skipped: bool = False) -> bool:
        """Return whether a shard need not be encoded.

        Args:
            shard: as planned.
            allow_skipped: whether it may lack images that could not be read.
        """
        record, file = ShardRecord.read(self._record(shard.name)), self.folder / shard.name
        if record is None or record.images_sha256 != shard.images_sha256 or (record.skipped and not allow_skipped):
            return False
        if not record.checksum:
            return not file.exists()
        return file.is_file() and file_sha256(file) == record.checksum

    def write(
        self, shard: Shard, tensors: dict[str, Tensor], moments: Moments, skipped: Mapping[str, str] | None = None
    ) -> None:
        """Write a shard with its record; without rows there is no file."""
        file, record = self.folder / shard.name, self._record(shard.name)
        rows = len(next(iter(tensors.values()), ()))
        known = ShardRecord("", shard.images_sha256, rows, moments.as_json(), dict(skipped or {}))
        if not rows:
            file.unlink(missing_ok=True)
            known.write(record)
            return
        with atomic(file) as part:
            save_file(tensors, part)
            replace(known, checksum=file_sha256(part)).write(record)

    def finish(self, shape: Sequence[int], shards: Sequence[Shard]) -> tuple[Provenance, dict[str, str]]:
        """Write latents_stats.pt and cache.json from the records of all shards, and remove files of former shards.

        Returns:
            What cache.json holds, and what was wrong with the images that were left out, by name.

        Raises:
            ValueError: if a shard is missing, or none has an image.
        """
        records = {shard.name: ShardRecord.read(self._record(shard.name)) for shard in shards}
        missing = [
            name
            for name, record in records.items()
            if record is None or (record.checksum and not (self.folder / name).is_file())
        ]
        if missing:
            what = f"{len(missing)} of {len(shards)} shards are missing in {self.folder}, {missing[0]} first"
            raise ValueError(f"{what}: run decm encode again")
        known = {name: record for name, record in records.items() if record is not None}
        self._remove_others(known)
        moments = Moments(shape[0])
        for record in known.values():
            if record.num_images:
                moments.merge(Moments.from_json(record.moments))
        skipped = {name: what for record in known.values() for name, what in record.skipped.items()}
        if not moments.count:
            raise ValueError(f"none of the {len(skipped)} images can be read")
        return self._write_provenance(shape, moments, known, shards), skipped

    def _write_provenance(
        self, shape: Sequence[int], moments: Moments, known: Mapping[str, ShardRecord], shards: Sequence[Shard]
    ) -> Provenance:
        content = io.BytesIO()
        torch.save(moments.statistics(), content)
        with atomic(self.folder / STATISTICS) as file:
            file.write_bytes(content.getvalue())
        checksums = {name: record.checksum for name, record in known.items() if record.checksum}
        checksums[STATISTICS] = file_sha256(self.folder / STATISTICS)
        images = text_sha256("\n".join(shard.images_sha256 for shard in shards))
        count, settings = sum(record.num_images for record in known.values()), self.settings
        encoding = asdict(settings) | {"images_sha256": images}
        provenance = Provenance(settings.vae, SCALING, list(shape), count, settings.num_classes, checksums, encoding)
        provenance.write(self.folder)
        return provenance

    def _remove_others(self, known: Mapping[str, ShardRecord]) -> None:
        """Remove shards that a former plan had more than this one, and what killed processes have left."""
        for file in self.folder.glob(SHARDS):
            if file.name not in known or not known[file.name].checksum:
                file.unlink()
        for record in self._records.glob(f"{SHARDS}.json"):
            if record.name.removesuffix(".json") not in known:
                record.unlink()
        for part in (*self.folder.glob(f"*{PARTIAL}"), *self._records.glob(f"*{PARTIAL}")):
            part.unlink()

    @property
    def _records(self) -> Path:
        return self.folder / MANIFEST

    def _record(self, shard: str) -> Path:
        return self._records / f"{shard}.json"

    def _begun(self) -> list[Order]:
        """Return the first image of each shard, none if the folder was not begun."""
        file, ours = self._records / REQUEST, set(self.folder.glob(SHARDS))
        foreign = sorted(set(self.folder.glob("*.safetensors")) - (ours if file.is_file() else set()))
        if foreign:
            what = f"{self.folder} holds shards that were not encoded here, such as {foreign[0].name}"
            raise ValueError(f"{what}: give --out another folder")
        if not file.is_file():
            return []
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
            starts = [tuple(map(str, start)) for start in begun[STARTS]]
            found = {field.name: begun[field.name] for field in fields(EncodingSettings)}
            if starts != sorted(starts):
                raise ValueError("the first images of the shards are not in order")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged: delete {self.folder}, or give another --out") from error
        for name, value in asdict(self.settings).items():
            if found[name] != value:
                was = f"{self.folder} was begun with {name} {found[name]}"
                raise ValueError(f"{was}: got {value}; give the same, or another --out")
        return starts


def _ranges(starts: Sequence[int], count: int) -> list[range]:
    """Return the ranges between the starts; the first begins at 0."""
    return [range(start, stop) for start, stop in pairwise([0, *starts[1:], count])]
