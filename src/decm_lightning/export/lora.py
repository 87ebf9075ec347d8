"""A student as one plain LoRA file, for the stock pipelines of diffusers or for ComfyUI.

Every step of the consistency sampler ends at s = 1, so the embedding of s is a constant vector e. SD3, Flux and Sana
embed the time as linear_2(...) plus other terms: adding e to the bias of linear_2 is exact, and no code of this package
is needed. Samplers with other end times cannot use the file.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decm_lightning.export.own_formats import check_target
from decm_lightning.files import atomic
from decm_lightning.networks import Network
from decm_lightning.networks.record import Record
from decm_lightning.path import DATA
from decm_lightning.samplers import Sampler, sampler
from decm_lightning.teachers.diffusers_network import DiffusersNetwork
from decm_lightning.types import Condition, Sample, Time

LIBRARY = "decm-lightning"
COMFYUI = ("SD3Transformer2DModel", "FluxTransformer2DModel")
"""The transformers whose names in diffusers ComfyUI maps to its own (comfy/utils.py)."""
STEPS = (1, 2, 4, 8)
"""The numbers of steps for which the metadata list sigmas."""


class Folded(NamedTuple):
    """A student as a change of the pretrained weights: W + B A for each layer, and bias + e for one.

    Attributes:
        adapters: (A, B) by the layer's name in diffusers, "transformer." first; zeros if only the bias changes.
        layer: the layer whose bias changes.
        bias: the embedding e of s = 1, (width,).
    """

    adapters: dict[str, tuple[Tensor, Tensor]]
    layer: str
    bias: Tensor


def write(network: Network, out: Path, dtype: torch.dtype) -> list[Path]:
    """Write a file for `load_lora_weights` of StableDiffusion3Pipeline, FluxPipeline or SanaPipeline.

    Raises:
        OSError: naming the file, if it cannot be written.
        ValueError: if `out` does not end in .safetensors or is the file of another model, the network is not a LoRA
            student, or its transformer predicts noise.
    """
    student = _student(network)
    adapters, layer, bias = fold(student)
    # peft expects a bias in every adapted layer if it finds one in any.
    biases = {f"{name}.lora_B.bias": torch.zeros(len(b)) for name, (_, b) in adapters.items()}
    return _save(_matrices(adapters) | biases | {f"{layer}.lora_B.bias": bias}, student, out, dtype)


def write_comfyui(network: Network, out: Path, dtype: torch.dtype) -> list[Path]:
    """Write a file for ComfyUI, which reads the change of a bias as `diff_b`."""
    student = _student(network)
    if student.kind not in COMFYUI:
        raise ValueError(f"ComfyUI reads LoRA files of {' and '.join(COMFYUI)}: got {student.kind}, use --to lora")
    adapters, layer, bias = fold(student)
    return _save(_matrices(adapters) | {f"{layer}.diff_b": bias}, student, out, dtype)


@torch.no_grad()
def fold(student: DiffusersNetwork) -> Folded:
    """Return a LoRA student of SD3, Flux or Sana as a change of the pretrained weights, with s fixed to 1."""
    embedding = student.family.embedding
    state = {
        # The model's own embedding is inside a TimeInput.
        name.removeprefix("model.").replace(f"{embedding}.embedding.", f"{embedding}."): tensor
        for name, tensor in student.state_dict().items()
    }
    bias = student.model.get_submodule(embedding).end_time(torch.full((1,), DATA))[0]
    layer, rank = f"transformer.{embedding}.timestep_embedder.linear_2", student.config["lora_rank"]
    adapters = {layer: (bias.new_zeros(rank, len(bias)), bias.new_zeros(len(bias), rank))}
    a, b = ".lora_A.default.weight", ".lora_B.default.weight"
    names = [name.removesuffix(a) for name in state if name.endswith(a)]
    return Folded(adapters | {f"transformer.{name}": (state[name + a], state[name + b]) for name in names}, layer, bias)


def sigmas(method: Sampler, steps: int) -> list[float]:
    """Return 1 - t at each step of a sampler, which is the argument `sigmas` of a diffusers pipeline.

    >>> sigmas(sampler("consistency"), 4)
    [1.0, 0.3, 0.2, 0.1]

    Raises:
        ValueError: if a step does not end at s = 1.
    """
    found = []

    def student(x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        if s.item() != DATA:
            raise ValueError(f"every step must end at s = 1: got {s.item():.3g}")
        found.append(round(1 - t.item(), 6))
        return torch.zeros_like(x_t)

    method(student, torch.zeros(1, 1), None, steps)
    return found


def metadata(student: DiffusersNetwork) -> dict[str, str]:
    """Return the metadata of the file: base model, rank, and how to sample."""
    record, rank = student.record or Record(), str(student.config["lora_rank"])
    recommended = {steps: name for steps, name in record.sampling.items() if name.startswith("consistency")}
    methods = dict.fromkeys(STEPS, "consistency") | recommended
    sampling = {
        "scheduler": "FlowMatchLCMScheduler",
        "shift": 1.0,
        # A Flux with embedded guidance takes its scale as guidance_scale. It is one pass all the same.
        "guidance_scale": student.config["embedded_guidance"] if student.embeds_guidance else 1.0,
        "sigmas": {steps: sigmas(sampler(name), steps) for steps, name in sorted(methods.items())},
    }
    return {
        "format": "pt",
        "library": f"{LIBRARY} {version(LIBRARY)}",
        "base_model": student.config["model"],
        "base_class": student.kind,
        "base_identity": student.config["base"],
        "base_license": (record.teacher and record.teacher.license) or "unknown",
        "rank": rank,
        "alpha": rank,
        "sampling": json.dumps(sampling),
    }


def _student(network: Network) -> DiffusersNetwork:
    if not isinstance(network, DiffusersNetwork) or not network.added:
        found = f"a {type(network).__name__} without adapters"
        raise ValueError(f"a LoRA file needs a LoRA student of SD3, Flux or Sana: got {found}, use --to folder")
    if network.family.predicts_noise:
        reason = "predicts noise and its pipeline has no load_lora_weights"
        raise ValueError(f"{network.kind} {reason}, so a LoRA file cannot replace the student: use --to folder")
    return network


def _matrices(adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    pairs = {name: dict(zip("AB", pair, strict=True)) for name, pair in adapters.items()}
    return {f"{name}.lora_{part}.weight": matrix for name, pair in pairs.items() for part, matrix in pair.items()}


def _save(tensors: dict[str, Tensor], student: DiffusersNetwork, out: Path, dtype: torch.dtype) -> list[Path]:
    check_target(out)
    if out.exists() and not _is_ours(out):
        raise ValueError(f"{out} is not a LoRA file of {LIBRARY}: choose another name")
    with atomic(out) as partial:
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, partial, metadata(student))
    return [out]


def _is_ours(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as content:
            return (content.metadata() or {}).get("library", "").startswith(LIBRARY)
    except (SafetensorError, OSError):
        return False
