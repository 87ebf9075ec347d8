"""The formats of this package: a folder, or one .safetensors file with weights, config, record and license."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_model

from decm_lightning.export.licenses import base_of, license_of
from decm_lightning.files import atomic
from decm_lightning.networks import Network, describe, save
from decm_lightning.networks.checkpoint_files import read_single_file
from decm_lightning.networks.pretrained import WEIGHTS
from decm_lightning.networks.record import CONFIG, RECORD

SUFFIX = ".safetensors"


def check_target(out: str | Path) -> Path:
    """Return the path of a file to write, whose name must end in .safetensors."""
    if Path(out).suffix != SUFFIX:
        raise ValueError(f"out is one file, whose name must end in {SUFFIX}: got {out}")
    return Path(out)


def write_folder(network: Network, out: Path, dtype: torch.dtype) -> list[Path]:
    """Write a network's folder, see `networks.save`, and return its files."""
    save(network.to(dtype), out)
    return [out / CONFIG, out / WEIGHTS, *([out / RECORD] if network.record else [])]


def write(network: Network, out: Path, dtype: torch.dtype) -> list[Path]:
    """Write a file that `decm_lightning.load` reads, and return it.

    Its metadata are "network" (the description) and "record" as JSON, "license", "license_link" and "base_model", as
    far as they are known.
    """
    check_target(out)
    if out.is_file() and not read_single_file(out, {}):
        raise ValueError(f"{out} contains another model: choose another file")
    base = base_of(network)
    license = license_of(base)
    metadata = {
        "format": "pt",
        "network": json.dumps(describe(network), sort_keys=True),
        "record": None if network.record is None else json.dumps(network.record.as_dict()),
        "license": license.name or license.id,
        "license_link": license.link,
        "base_model": None if base is None else base.name,
    }
    with atomic(out) as partial:
        save_model(network.to(dtype), str(partial), {key: value for key, value in metadata.items() if value})
    return [out]
