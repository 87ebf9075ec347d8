"""Read and write the record of a network: in its folder, in a checkpoint, and in the table of a later test."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from decm_lightning.files import write_json
from decm_lightning.networks.network import Network
from decm_lightning.networks.record import QUALITY, RECORD, WEIGHTS_HASH, Record, default_sampling, measured_sampling
from decm_lightning.networks.sharded import is_sharded

log = logging.getLogger(__name__)


def quality_file(path: str | Path) -> Path:
    """Return the file to which `decm test` writes the table of a model: quality.json in its folder.

    The table of a file or a sharded checkpoint is next to it, such as last.quality.json for last.ckpt.
    """
    path = Path(path)
    is_folder = path.is_dir() and not is_sharded(path)
    return path / QUALITY if is_folder else path.with_suffix(f".{QUALITY}")


def write_record(record: Record | None, folder: Path) -> None:
    """Write record.json, or remove that of a previous network."""
    if record is None:
        (folder / RECORD).unlink(missing_ok=True)
    else:
        write_json(folder / RECORD, record.as_dict())


def read_record(folder: Path) -> Record | None:
    """Return the record of a network folder, None if it has none."""
    try:
        return Record.from_dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def record_in(checkpoint: dict[str, Any]) -> Record | None:
    """Return the record in a training checkpoint, None if it has none."""
    if "record" not in checkpoint:
        return None
    record, config = Record.from_dict(checkpoint["record"]), checkpoint.get("config")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # The record of a single file includes the config.
    return record if config is None else replace(record, config=yaml.load(config, loader))


def with_table(network: Network, file: Path) -> Record | None:
    """Return the record of a network with the table in `file`, if there is one and it is of the same weights."""
    if not file.is_file():
        return network.record
    try:
        quality = json.loads(file.read_text(encoding="utf-8"))
        if quality["protocol"][WEIGHTS_HASH] == network.identity():
            sampling = default_sampling(network.reads_end_time) | measured_sampling(quality)
            return replace(network.record or Record(), quality=quality, sampling=sampling)
        cause = "it was measured with other weights"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        # The network is complete without the table.
        cause = f"not a table of decm test: {error!r}"
    log.warning("%s is not used: %s", file, cause)
    return network.record
