"""Stock pipelines of tiny random models, and students of them, for the tests of LoRA files."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SanaPipeline
from einops import rearrange
from safetensors.torch import safe_open
from torch import nn

from decm_lightning.export import writer
from decm_lightning.networks import Network
from decm_lightning.samplers import consistency
from decm_lightning.teachers import DiffusersPrompts, DiffusersTeacher
from tests.teachers.pipelines import flux, pixart, sana, sd3

PROMPTS = ["a red cat", "a dog"]


def guided_flux():
    """Return a Flux that embeds guidance and has both kinds of blocks."""
    pipeline = flux()
    sizes = {"num_layers": 1, "num_single_layers": 1, "in_channels": 16, "axes_dims_rope": (2, 2, 4)}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 16, "pooled_projection_dim": 8}
    pipeline.register_modules(transformer=FluxTransformer2DModel(**heads, **sizes, guidance_embeds=True))
    return pipeline


FAMILIES = {"sd3": partial(sd3, layers=2), "flux": flux, "guided flux": guided_flux, "sana": sana, "pixart": pixart}


@dataclass
class Case:
    """A stock pipeline, its folder, and a student of it whose added weights are random."""

    pipeline: Any
    folder: Path
    student: Network

    def export(self, to="lora", dtype=torch.float32):
        """Return the path of the student's LoRA file."""
        return writer(to)(self.student, self.folder / "lora.safetensors", dtype)[0]

    def noise(self):
        """Return x_0 in the layout of the pipeline: a Flux packs 2 x 2 latents into one token."""
        x_0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        return pack(x_0) if isinstance(self.pipeline, FluxPipeline) else x_0

    def sample(self, steps):
        """Return our samples; all added noise is from torch's global generator, as in the pipelines."""
        packed = isinstance(self.pipeline, FluxPipeline)

        def u(x_t, t, s, condition):
            return pack(self.student(unpack(x_t), t, s, condition)) if packed else self.student(x_t, t, s, condition)

        captions = DiffusersPrompts(str(self.folder), max_tokens=6)(PROMPTS)
        torch.manual_seed(2)
        return consistency(u, self.noise(), captions, steps)

    def pipe(self, steps, sampling):
        """Return the pipeline's samples with the settings in a file's metadata."""
        self.pipeline.scheduler = getattr(diffusers, sampling["scheduler"])(shift=sampling["shift"])
        options = {"sigmas": sampling["sigmas"][str(steps)], "guidance_scale": sampling["guidance_scale"]}
        options |= {"max_sequence_length": 6, "output_type": "latent", "height": 4, "width": 4}
        if isinstance(self.pipeline, SanaPipeline):
            # It refuses smaller sizes, but uses those of the latents.
            options |= {"height": 32, "width": 32, "clean_caption": False, "use_resolution_binning": False}
        torch.manual_seed(2)
        latents = self.noise().to(self.pipeline.transformer.dtype)
        return self.pipeline(PROMPTS, latents=latents, **options).images


def pack(x):
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(x):
    return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=2, p=2, q=2)


@pytest.fixture
def case(request, tmp_path):
    """One of the families."""
    torch.manual_seed(0)
    pipeline = FAMILIES[request.param]()
    for parameter in pipeline.transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    return Case(pipeline, tmp_path, random(DiffusersTeacher(str(tmp_path), 2, latent_size=4, embedded_guidance=2.0)))


def random(teacher):
    """Return a student whose added weights are random."""
    student = teacher.student().eval()
    for name, parameter in student.named_parameters():
        if name in student.added:
            nn.init.normal_(parameter, std=0.3)
    return student


def sampling_of(file):
    """Return how the metadata of a file say to sample."""
    with safe_open(file, "pt") as content:
        return json.loads(content.metadata()["sampling"])


def error(actual, expected):
    return (actual - expected).abs().max().item()
