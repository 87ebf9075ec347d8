"""LoRA files by ComfyUI's rules, implemented here from its public source, on tiny random models."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.export.lora_cases import case, error, sampling_of

__all__ = ["case"]
ATTENTION = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}


def comfyui_name(name, kind):
    """Return ComfyUI's name of a layer of diffusers, and its place in a fused layer; None if it is not mapped.

    From `mmdit_to_diffusers` and `flux_to_diffusers` in comfy/utils.py.
    """
    block, _, layer = name.partition(".attn")
    number = block.rpartition(".")[2]
    if layer:
        attention, _, layer = layer.partition(".")
        context = layer.startswith("add_") or layer == "to_add_out"
        if block.startswith("single_transformer_blocks"):
            return f"single_blocks.{number}.linear1", ATTENTION[layer]
        if kind == "sd3":
            inside = f"joint_blocks.{number}.{'context' if context else 'x'}_block.attn{attention}"
        else:
            inside = f"double_blocks.{number}.{'txt' if context else 'img'}_attn"
        return (f"{inside}.qkv", ATTENTION[layer]) if layer in ATTENTION else (f"{inside}.proj", None)
    if name == "time_text_embed.timestep_embedder.linear_2":
        return "t_embedder.mlp.2" if kind == "sd3" else "time_in.out_layer", None
    return None


def as_comfyui(model, kind, file):
    """Apply a file to a transformer of diffusers by the rules of ComfyUI's `load_lora`; return the keys it used.

    For each name of its key map, ComfyUI looks for `transformer.<name in diffusers>` with .lora_A.weight and
    .lora_B.weight, whose product is added to the rows of the fused weight, scaled by alpha / rank or 1 without alpha,
    and .diff_b, which is added to the bias of a whole layer.
    """
    lora, used = load_file(file), set()
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    mapped = {name: comfyui_name(name, kind) for name in linear if comfyui_name(name, kind)}
    fused = {}
    for name, (target, _) in sorted(mapped.items(), key=lambda item: (item[1][0], item[1][1] or 0)):
        fused.setdefault(target, []).append(linear[name])
    weights = {target: torch.cat([layer.weight.data for layer in layers]) for target, layers in fused.items()}
    for name, (target, place) in mapped.items():
        a, b, diff = (f"transformer.{name}.{ending}" for ending in ("lora_A.weight", "lora_B.weight", "diff_b"))
        if b in lora:
            rows = slice(None) if place is None else slice(place * len(lora[b]), (place + 1) * len(lora[b]))
            weights[target][rows] += lora[b] @ lora[a]
            used |= {a, b}
        if diff in lora:
            assert place is None
            linear[name].bias.data += lora[diff]
            used.add(diff)
    for target, layers in fused.items():
        for layer, weight in zip(layers, weights[target].chunk(len(layers)), strict=True):
            layer.weight.data = weight
    return used


@pytest.mark.parametrize("case", ["sd3", "flux", "guided flux"], indirect=True)
def test_comfyui_reads_the_file_as_the_same_network(case, request):
    file = case.export("lora-comfyui")
    base = case.pipe(4, sampling_of(file))
    used = as_comfyui(case.pipeline.transformer, "sd3" if "[sd3]" in request.node.name else "flux", file)
    assert used == load_file(file).keys()
    # FlowMatchLCMScheduler's step is that of ComfyUI's sampler lcm.
    expected = case.sample(4)
    assert error(case.pipe(4, sampling_of(file)), expected) < 1e-4
    assert error(base, expected) > 0.1
