"""Write students as folders that diffusers loads with `DiffusionPipeline.from_pretrained`."""

from pathlib import Path

import torch
from diffusers import FlowMapEulerDiscreteScheduler

from decm_lightning.export.diffusers.flow_map_class_pipeline import FlowMapClassPipeline
from decm_lightning.export.diffusers.flow_map_dit import FlowMapDiT
from decm_lightning.networks import Network


def write(network: Network, out: Path, dtype: torch.dtype) -> list[Path]:
    """Write."""
    with torch.device("meta"):
        transformer = FlowMapDiT(**network.config)
    transformer.network = network.to(dtype)
    pipeline = FlowMapClassPipeline(transformer, FlowMapEulerDiscreteScheduler(shift=1.0))
    pipeline.save_pretrained(out)
    return sorted(out.rglob("*"))
