"""Small networks of each kind with random weights."""

from pathlib import Path

import torch
from torch import nn

from decm_lightning.networks import DiT, Network, TextDiT
from decm_lightning.teachers import DiffusersTeacher
from tests.teachers.pipelines import sd3, t5


def randomized(network: nn.Module, scale: float = 0.1) -> nn.Module:
    """Change every parameter at random, so that no output is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def dit(**options) -> Network:
    sizes = {"input_size": 8, "in_channels": 1, "patch_size": 2, "width": 32, "depth": 2, "heads": 2, "num_classes": 4}
    return randomized(DiT(**{**sizes, "end_time": True, **options}))


def text_dit(encoder: Path, **options) -> Network:
    """A network that reads captions of a tiny T5, which is written to the folder `encoder`."""
    model, tokenizer = t5()
    model.save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    sizes = {"input_size": 8, "in_channels": 3, "caption_width": 16, "patch_size": 4, "width": 32, "depth": 2}
    more = {"heads": 2, "features": 8, "end_time": True, "text_encoder": str(encoder)}
    return randomized(TextDiT(**{**sizes, **more, **options}))


def sd3_student(base: Path) -> Network:
    """A LoRA student of a tiny SD3, whose pipeline is written to the folder `base`."""
    pipeline = sd3(levels=2, layers=2)
    randomized(pipeline.transformer, 0.05)
    pipeline.save_pretrained(base)
    return randomized(DiffusersTeacher(str(base), lora_rank=2).student(), 0.05)
