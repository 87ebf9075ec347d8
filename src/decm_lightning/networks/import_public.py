"""Public checkpoints of diffusion transformers as a DiT of this package: LightningDiT's, FACM's, SiT's and DiT's.

LightningDiT is of arXiv 2501.01423, FACM of 2507.03738, SiT of 2401.08740, DiT of 2212.09748. Their tensors are named
as those of `dit`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from decm_lightning.networks.checkpoint_files import few
from decm_lightning.networks.dit import DiT
from decm_lightning.networks.layers import Rotary
from decm_lightning.networks.weightless import is_weightless

# The tensors whose shapes, of so many dimensions, tell the architecture.
SHAPES = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.adaLN_modulation.1.weight": 2,
    "final_layer.linear.weight": 2,
}
GELU, SWIGLU = "blocks.0.mlp.fc2.weight", "blocks.0.mlp.w3.weight"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Heads by the width of the published sizes S, B, L and XL, for networks in which nothing has the width of a head."""


def import_public(tensors: Mapping[str, Tensor], heads: int | None = None) -> DiT:
    """Return the network that has these tensors, in float32 and eval mode.

    Their path is that of this package: t = 0 noise, t = 1 data. A LightningDiT and a SiT give data minus noise, a DiT
    gives noise. The architecture is found from the names and shapes of the tensors, and every tensor must have its
    place. Rotary tables may be there or not: a network with SwiGLU has rotary positions in any case, one with GELU if
    the tables are there.

    Args:
        tensors: by their plain names.
        heads: attention heads; None for what QK norm or the rotary table tells, else for those of the published sizes.

    Raises:
        ValueError: if they are not of such a network, do not tell the heads, or one is missing, left over, of another
            shape, or with other rotary positions.
    """
    config = architecture(tensors, heads)
    # Without memory: only the names and shapes of its tensors are needed, which are then put in their places.
    with torch.device("meta"):
        network = DiT(**config)
    network.prediction = None
    places = network.state_dict()
    tables = _tables(config["width"] // config["heads"], network.side) if config["rotary"] else {}
    _check_places(tensors, places, [name for name in places if name not in tables])
    _check_tables(tensors, tables, network.side)
    if is_weightless():
        return network.eval()
    state = {
        name: tables[name]
        if name in tables
        # A copy of its own: the file may be changed while the network lives.
        else tensors[name].detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name in places
    }
    network.load_state_dict(state, assign=True)
    return network.eval()


def architecture(tensors: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """Return the arguments of the DiT that has these tensors, from their names and shapes alone.

    Raises:
        ValueError: if a tensor that would tell is missing or has too many or too few dimensions, or nothing tells the
            heads.
    """
    mlp_out = GELU if GELU in tensors else SWIGLU
    needed = SHAPES | {mlp_out: 2}
    unfit = [n for n, dims in needed.items() if n not in tensors or tensors[n].ndim != dims or not tensors[n].numel()]
    if unfit:
        raise ValueError(
            "neither a checkpoint of decm-lightning, which describes its network, nor a LightningDiT, SiT or DiT: "
            f"missing or of other dimensions are {few(unfit)}; it holds {few(list(tensors))}"
        )
    width, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    tokens = tensors["pos_embed"].shape[1]
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ValueError(f"pos_embed must be that of a square grid: got {tokens} tokens")
    return {
        "input_size": grid * patch_size,
        "in_channels": channels,
        "patch_size": patch_size,
        "width": width,
        "depth": len({match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if match}),
        "heads": _heads(tensors, width) if heads is None else heads,
        "mlp_ratio": _mlp_ratio(width, tensors[mlp_out].shape[1], 1.0 if mlp_out == GELU else 2 / 3),
        "num_classes": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "end_time": any(name.startswith("r_embedder.") for name in tensors),
        "qk_norm": any(name.endswith(".q_norm.weight") for name in tensors),
        "shift": tensors["blocks.0.adaLN_modulation.1.weight"].shape[0] != 4 * width,
        "norm": "rms" if "final_layer.norm_final.weight" in tensors else "layer",
        "mlp": "gelu" if mlp_out == GELU else "swiglu",
        "rotary": mlp_out == SWIGLU or any(name.startswith("feat_rope.") for name in tensors),
        "learn_sigma": tensors["final_layer.linear.weight"].shape[0] == 2 * patch_size**2 * channels,
    }


def _check_places(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in tensors]
    left_over = [name for name in tensors if name not in places]
    unfit = [
        f"{name} {tuple(tensors[name].shape)} of {tensors[name].dtype}, not {tuple(place.shape)}"
        for name, place in places.items()
        if name in tensors and not (tensors[name].shape == place.shape and tensors[name].is_floating_point())
    ]
    if missing or left_over or unfit:
        raise ValueError(
            f"tensors missing: {_counted(missing)}; left over: {_counted(left_over)}; of another shape or type: "
            f"{_counted(unfit)}; a LightningDiT, SiT or DiT has a place for each: remove other tensors from the file"
        )


def _check_tables(tensors: Mapping[str, Tensor], tables: Mapping[str, Tensor], grid: int) -> None:
    for name, table in tables.items():
        if name not in tensors:
            continue
        given = tensors[name]
        # An angle is as wrong as its frequency is rounded, times the row; narrower types round the table itself.
        rounding = max(grid * torch.finfo(torch.float32).eps, torch.finfo(given.dtype).eps)
        difference = (given.double() - table.double()).abs().max().item()
        if not difference <= max(1e-6, rounding):
            raise ValueError(
                f"{name} is not that of rotary positions with base 10,000 on a {grid} x {grid} grid: they differ by "
                f"{difference:.2g}; such a network is not supported"
            )


def _tables(head_width: int, grid: int) -> dict[str, Tensor]:
    return Rotary(head_width, grid).state_dict(prefix="feat_rope.")


def _heads(tensors: Mapping[str, Tensor], width: int) -> int:
    for name in ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos"):
        if name in tensors and tensors[name].ndim and tensors[name].numel():
            return max(width // tensors[name].shape[-1], 1)
    if width not in HEADS:
        raise ValueError(
            "the number of heads cannot be told: there is no blocks.0.attn.q_norm.weight (QK norm) and no "
            f"feat_rope.freqs_cos (rotary table), and {width} is the width of no published size: give heads"
        )
    return HEADS[width]


def _mlp_ratio(width: int, hidden: int, part: float) -> float:
    # The shortest decimal that gives the hidden width.
    ratios = (round((hidden + 0.5) / part / width, digits) for digits in range(17))
    return next(ratio for ratio in ratios if int(part * ratio * width) == hidden)


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} ({few(names)})" if names else "0"
