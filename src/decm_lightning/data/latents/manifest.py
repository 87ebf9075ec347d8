"""The state of a folder of latents during encoding: its settings, its shards, and what is written at the end."""

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

from decm_lightning.autoencoders.normalization import STATISTICS, Moments
from decm_lightning.autoencoders.provenance import MANIFEST, RECORD, SCALING, Provenance
from decm_lightning.errors import check_at_least
from decm_lightning.files import PARTIAL, atomic, file_sha256, text_sha256, write_json
from decm_lightning.seeds import check_seed

REQUEST = "request.json"
STARTS = "shard_starts"
LOCK = "encode.lock"
SHARDS = "latents_rank00_shard*.safetensors"
Order = tuple[str, ...]


@dataclass(frozen=True)
class EncodingSettings:
    """All settings that determine the latents of an image. A folder can only be resumed with the same settings."""

    vae: str
    size: int
    posterior: str
    seed: int
    num_classes: int
    shard_size: int

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_at_least(1, shard_size=self.shard_size)


@dataclass(frozen=True)
class Shard:
    """The images of one file: a range of the images in their order, not empty, and the SHA-256 of their identities."""

    name: str
    images: range
    images_sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """The record of a shard that has been written.

    Attributes:
        checksum: SHA-256 of the file; "" if the shard has no file because none of its images could be read.
        images_sha256: `Shard.images_sha256` at the time of encoding.
        num_images: number of rows in the file.
        moments: moments of its latents, from Moments.as_json.
        skipped: errors of the images that were left out, by name.
    """

    checksum: str
    images_sha256: str
    num_images: int
    moments: dict[str, Any]
    skipped: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> "ShardRecord | None":
        """Read a record; return None if the file is missing or damaged."""
        try:
            record = cls(**json.loads(file.read_text(encoding="utf-8")))
            Moments.from_json(record.moments)
            texts = (record.checksum, record.images_sha256, *record.skipped.values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):
            return None
        return record if all(isinstance(text, str) for text in texts) and isinstance(record.num_images, int) else None


class Manifest:
    """The shards of a folder. Each holds consecutive images and is written atomically.

    The subfolder `manifest` stores the settings, the first image of each shard, and a `ShardRecord` for each shard,
    which is written before the shard. A shard is up to date if the names, labels, sizes and times of its images and the
    checksum of its file match the record. Other shards, such as damaged ones, are encoded again. Because the first
    images are stored, adding or removing an image changes only one shard.
    """

    def __init__(self, folder: str | Path, settings: EncodingSettings) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self._starts: list[Order] = []
        self._lock = FileLock(self._records / LOCK)

    def lock(self) -> None:
        """Prevent other processes from encoding into the folder until `unlock` or the end of this process.

        Raises:
            ValueError: if another process is encoding into the folder.
        """
        self._records.mkdir(parents=True, exist_ok=True)
        try:
            # Some network file systems do not support locks.
            with suppress(NotImplementedError):
                self._lock.acquire(blocking=False)
        except Timeout as error:
            what = f"another process is encoding into {self.folder}"
            raise ValueError(f"{what}: wait until it ends, or choose another --out") from error

    def unlock(self) -> None:
        """Allow other processes to encode into the folder."""
        self._lock.release()

    def plan(self, order: Sequence[Order], identities: Sequence[str]) -> list[Shard]:
        """Assign all images to shards, given their ascending sort keys and identities, which change with the images.

        Raises:
            ValueError: if the folder was started with other settings, or holds shards from another source.
        """
        starts = self._begun()
        ranges = _ranges([bisect_left(order, start) for start in starts], len(order))
        # A new folder has no starts.
        if max(map(len, ranges)) > 2 * self.settings.shard_size or not starts:
            ranges = _ranges(list(range(0, len(order), self.settings.shard_size)), len(order))
            starts = [order[part.start] for part in ranges]
        self._starts = starts
        digits = max(3, len(str(len(starts) - 1)))
        return [
            # LightningDiT's name has the rank of the process, on which these shards do not depend.
            Shard(
                f"latents_rank00_shard{number:0{digits}d}.safetensors",
                part,
                text_sha256("\n".join(identities[part.start : part.stop])),
            )
            for number, part in enumerate(ranges)
            if part
        ]

    def begin(self) -> None:
        """Write the settings and the first images of the shards of the last plan."""
        write_json(self._records / REQUEST, asdict(self.settings) | {STARTS: self._starts})
        # cache.json marks the folder as complete.
        (self.folder / RECORD).unlink(missing_ok=True)

    def is_up_to_date(self, shard: Shard, allow_skipped: bool = False) -> bool:
        """Return whether a shard is complete and matches its images; it may lack broken images if they are allowed."""
        record, file = ShardRecord.read(self._record(shard.name)), self.folder / shard.name
        if record is None or record.images_sha256 != shard.images_sha256 or (record.skipped and not allow_skipped):
            return False
        if not record.checksum:
            return not file.exists()
        return file.is_file() and file_sha256(file) == record.checksum

    def write(
        self, shard: Shard, tensors: dict[str, Tensor], moments: Moments, skipped: Mapping[str, str] | None = None
    ) -> None:
        """Write a shard and its record. A shard without rows has only a record."""
        file, record = self.folder / shard.name, self._record(shard.name)
        rows = len(next(iter(tensors.values()), ()))
        content = ShardRecord("", shard.images_sha256, rows, moments.as_json(), dict(skipped or {}))
        if not rows:
            file.unlink(missing_ok=True)
            write_json(record, asdict(content))
            return
        with atomic(file) as part:
            save_file(tensors, part)
            write_json(record, asdict(replace(content, checksum=file_sha256(part))))

    def finish(self, shape: Sequence[int], shards: Sequence[Shard]) -> tuple[Provenance, dict[str, str]]:
        """Write latents_stats.pt and cache.json from the records of all shards, and remove obsolete files.

        Returns:
            The content of cache.json, and the errors of the images that were left out, by name.

        Raises:
            ValueError: if a shard is missing, or no image could be read.
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
        """Remove shards that are not in the plan, and partial files of killed processes."""
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
        """Return the sort key of the first image of each shard; empty for a new folder."""
        file, ours = self._records / REQUEST, set(self.folder.glob(SHARDS))
        foreign = sorted(set(self.folder.glob("*.safetensors")) - (ours if file.is_file() else set()))
        if foreign:
            what = f"{self.folder} holds shards that this command did not write, such as {foreign[0].name}"
            raise ValueError(f"{what}: set --out to another folder")
        if not file.is_file():
            return []
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
            starts = [tuple(map(str, start)) for start in begun[STARTS]]
            found = {field.name: begun[field.name] for field in fields(EncodingSettings)}
            if starts != sorted(starts):
                raise ValueError("the first images of the shards are not sorted")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged: delete {self.folder}, or choose another --out") from error
        for name, value in asdict(self.settings).items():
            if found[name] != value:
                what = f"{self.folder} was started with {name} {found[name]}, but now {name} is {value}"
                raise ValueError(f"{what}: use the same value, or choose another --out")
        return starts


def _ranges(starts: Sequence[int], count: int) -> list[range]:
    """Return the ranges between the starts. The first range begins at 0."""
    return [range(start, stop) for start, stop in pairwise([0, *starts[1:], count])]
