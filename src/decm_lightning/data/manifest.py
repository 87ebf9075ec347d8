"""A folder of latents while it is encoded: what was asked for, which shards are done, and how it is finished."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from decm_lightning.data.scaling import STATISTICS, Moments
from decm_lightning.data.shards import MANIFEST, Provenance, checksum, write_whole

REQUEST = "request.json"
SCALING: dict[str, bool | float] = {"latent_norm": True, "latent_multiplier": 1.0}


@dataclass(frozen=True)
class Request:
    """What decides every number of the latents: a folder is finished by the request that began it, or not at all.

    Args:
        vae: identity of the VAE.
        size: height and width of the images in pixels.
        posterior: "sample" or "mode".
        seed: of the samples of the posterior.
        images_sha256: SHA-256 of the names and labels of all images in order.
        num_images: how many there are.
        num_classes: labels are below it.
        shard_size: images in each shard but the last, at least 1.

    Raises:
        ValueError: if shard_size is below 1.
    """

    vae: str
    size: int
    posterior: str
    seed: int
    images_sha256: str
    num_images: int
    num_classes: int
    shard_size: int

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1: got {self.shard_size}")


class Manifest:
    """The shards of a folder: fixed ranges of the images, each written whole or not at all.

    The subfolder `manifest` holds the request and, for each shard, a record with its checksum and moments. The record
    is written before the shard, so that a shard that is there is done. Each shard belongs to one process.

    Args:
        folder: where the shards go, made if need be.
        request: what was asked for.

    Raises:
        ValueError: if another request began the folder, or it holds shards that nobody asked for here.
    """

    def __init__(self, folder: str | Path, request: Request) -> None:
        self.folder = Path(folder)
        self.request = request
        count, step = request.num_images, request.shard_size
        self.shards = [range(start, min(start + step, count)) for start in range(0, count, step)]
        self._digits = max(3, len(str(len(self.shards) - 1)))
        begun = self._records / REQUEST
        if begun.is_file():
            self._compare(json.loads(begun.read_text()))
        elif self.folder.is_dir() and any(self.folder.glob("*.safetensors")):
            raise ValueError(f"{folder} holds shards that were not encoded here: give --out a folder of its own")

    def begin(self) -> None:
        """Write the request; for one process only."""
        self._records.mkdir(parents=True, exist_ok=True)
        _write_json(self._records / REQUEST, asdict(self.request))

    def name(self, shard: int) -> str:
        """Return a shard's file name, in LightningDiT's way.

        The rank is 0 in all of them: which process encoded a shard is nothing that the result depends on.
        """
        return f"latents_rank00_shard{shard:0{self._digits}d}.safetensors"

    def pending(self, rank: int = 0, world: int = 1) -> list[int]:
        """Return which of the shards of a process, every world-th, are still to be written.

        Raises:
            ValueError: if a shard that is there has changed since it was written.
        """
        return [shard for shard in range(rank, len(self.shards), world) if not self._is_done(shard)]

    def write(self, shard: int, tensors: dict[str, Tensor], moments: Moments) -> None:
        """Write a shard with its record."""

        def shard_and_record(part: Path) -> None:
            save_file(tensors, part)
            _write_json(self._record(shard), {"checksum": checksum(part), "moments": moments.as_json()})

        write_whole(self.folder / self.name(shard), shard_and_record)

    def finish(self, shape: Sequence[int]) -> Provenance:
        """Write latents_stats.pt and cache.json from the records of all shards; for one process only.

        Raises:
            ValueError: if a shard is missing.
        """
        names = [self.name(shard) for shard in range(len(self.shards))]
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            what = f"{len(missing)} of {len(names)} shards are missing in {self.folder}, {missing[0]} first"
            raise ValueError(f"{what}: run decm encode again")
        records = [json.loads(self._record(shard).read_text()) for shard in range(len(self.shards))]
        moments = Moments(shape[0])
        for record in records:
            moments.merge(Moments.from_json(record["moments"]))
        content = io.BytesIO()
        torch.save(moments.statistics(), content)
        statistics = self.folder / STATISTICS
        write_whole(statistics, lambda part: part.write_bytes(content.getvalue()))
        checksums = {name: record["checksum"] for name, record in zip(names, records, strict=True)}
        checksums[STATISTICS] = checksum(statistics)
        asked = self.request
        provenance = Provenance(
            asked.vae, SCALING, list(shape), asked.num_images, asked.num_classes, checksums, asdict(asked)
        )
        provenance.write(self.folder)
        return provenance

    @property
    def _records(self) -> Path:
        return self.folder / MANIFEST

    def _record(self, shard: int) -> Path:
        return self._records / f"{self.name(shard)}.json"

    def _is_done(self, shard: int) -> bool:
        file, record = self.folder / self.name(shard), self._record(shard)
        if not (file.is_file() and record.is_file()):
            return False
        if json.loads(record.read_text())["checksum"] != checksum(file):
            raise ValueError(f"{file} has changed since it was written: delete it, and it will be encoded again")
        return True

    def _compare(self, begun: dict[str, Any]) -> None:
        for name, value in asdict(self.request).items():
            if begun.get(name) != value:
                was = f"{self.folder} was begun with {name} {begun.get(name)}"
                raise ValueError(f"{was}: got {value}; give the same, or another --out")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))
