"""The folder of this package: config.json, model.safetensors, the record and a model card."""

from pathlib import Path

from torch import dtype

from decm_lightning.networks import Network, save
from decm_lightning.networks.pretrained import WEIGHTS
from decm_lightning.networks.record import CONFIG, RECORD


def write(network: Network, out: Path, dtype: dtype) -> list[Path]:
    """Write a network's folder, see `networks.save`, and return its files."""
    save(network.to(dtype), out)
    return [out / CONFIG, out / WEIGHTS, *([out / RECORD] if network.record else [])]
