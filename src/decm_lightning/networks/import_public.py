"""Import public LightningDiT, FACM, SiT and DiT checkpoints as a DiT of this package.

Sources: LightningDiT (arXiv 2501.01423), FACM (2507.03738), SiT (2401.08740), DiT (2212.09748). Their tensors have the
names used in `dit`.
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

# The tensors that determine the architecture, and their numbers of dimensions.
SHAPES = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.adaLN_modulation.1.weight": 2,
    "final_layer.linear.weight": 2,
}
GELU, SWIGLU = "blocks.0.mlp.fc2.weight", "blocks.0.mlp.w3.weight"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Heads by the width of the published sizes S, B, L and XL, for checkpoints in which no tensor shows the head width."""


def import_public(tensors: Mapping[str, Tensor], heads: int | None = None) -> DiT:
    """Return the network with these tensors, in float32 and eval mode.

    The architecture is inferred from the names and shapes of the tensors, which must match it exactly. LightningDiT and
    SiT follow the path of this package (t = 0 noise, t = 1 data) and predict data minus noise; DiT predicts noise.
    Rotary tables are optional: a network with SwiGLU always has rotary positions, one with GELU only with the tables.

    Raises:
        ValueError: if the tensors are not of such a network, the number of heads cannot be inferred, or a tensor is
            missing, unexpected, of the wrong shape, or a table of different rotary positions.
    """
    config = architecture(tensors, heads)
    # On the meta device: only names and shapes are needed, because the tensors are assigned afterwards.
    with torch.device("meta"):
        network = DiT(**config)
    expected = network.state_dict()
    tables = _tables(config["width"] // config["heads"], network.side) if config["rotary"] else {}
    _check_tensors(tensors, expected, [name for name in expected if name not in tables])
    _check_tables(tensors, tables, network.side)
    if is_weightless():
        return network.eval()
    state = {
        name: tables[name]
        if name in tables
        # Copied: the file may be memory-mapped, and may change while the network is in use.
        else tensors[name].detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name in expected
    }
    network.load_state_dict(state, assign=True)
    return network.eval()


def architecture(tensors: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """Return the arguments of the DiT with these tensors, inferred from their names and shapes."""
    mlp_out = GELU if GELU in tensors else SWIGLU
    needed = SHAPES | {mlp_out: 2}
    faulty = [n for n, dims in needed.items() if n not in tensors or tensors[n].ndim != dims or not tensors[n].numel()]
    if faulty:
        raise ValueError(
            "neither a checkpoint of decm-lightning, which describes its network, nor a LightningDiT, SiT or DiT: "
            f"missing or with the wrong number of dimensions: {few(faulty)}; found: {few(list(tensors))}"
        )
    width, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    tokens = tensors["pos_embed"].shape[1]
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ValueError(f"pos_embed must cover a square grid: got {tokens} tokens")
    return {
        "input_size": grid * patch_size,
        "in_channels": channels,
        "patch_size": patch_size,
        "width": width,
        "depth": len({match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if match}),
        "heads": _heads(tensors, width) if heads is None else heads,
        "mlp_ratio": _mlp_ratio(width, tensors[mlp_out].shape[1], 1.0 if mlp_out == GELU else 2 / 3),
        "num_classes": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "prediction": None,
        "pixel_skip": False,
        "end_time": any(name.startswith("r_embedder.") for name in tensors),
        "qk_norm": any(name.endswith(".q_norm.weight") for name in tensors),
        "shift": tensors["blocks.0.adaLN_modulation.1.weight"].shape[0] != 4 * width,
        "norm": "rms" if "final_layer.norm_final.weight" in tensors else "layer",
        "mlp": "gelu" if mlp_out == GELU else "swiglu",
        "rotary": mlp_out == SWIGLU or any(name.startswith("feat_rope.") for name in tensors),
        "learn_sigma": tensors["final_layer.linear.weight"].shape[0] == 2 * patch_size**2 * channels,
    }


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    faulty = [
        f"{name} {tuple(tensors[name].shape)} of {tensors[name].dtype}, not {tuple(place.shape)}"
        for name, place in expected.items()
        if name in tensors and not (tensors[name].shape == place.shape and tensors[name].is_floating_point())
    ]
    if missing or unexpected or faulty:
        raise ValueError(
            f"tensors missing: {_counted(missing)}; unexpected: {_counted(unexpected)}; wrong shape or type: "
            f"{_counted(faulty)}; the file must contain exactly the tensors of a LightningDiT, SiT or DiT"
        )


def _check_tables(tensors: Mapping[str, Tensor], tables: Mapping[str, Tensor], grid: int) -> None:
    for name, table in tables.items():
        if name not in tensors:
            continue
        found = tensors[name]
        # The error of an angle is the rounding of its frequency times the row; narrower dtypes also round the table.
        rounding = max(grid * torch.finfo(torch.float32).eps, torch.finfo(found.dtype).eps)
        difference = (found.double() - table.double()).abs().max().item()
        if not difference <= max(1e-6, rounding):
            raise ValueError(
                f"{name} differs by {difference:.2g} from rotary positions with base 10,000 on a {grid} x {grid} grid: "
                "other rotary positions are not supported"
            )


def _tables(head_width: int, grid: int) -> dict[str, Tensor]:
    return Rotary(head_width, grid).state_dict(prefix="feat_rope.")


def _heads(tensors: Mapping[str, Tensor], width: int) -> int:
    for name in ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos"):
        if name in tensors and tensors[name].ndim and tensors[name].numel():
            return max(width // tensors[name].shape[-1], 1)
    if width not in HEADS:
        raise ValueError(
            "the number of heads cannot be inferred: blocks.0.attn.q_norm.weight (QK norm) and feat_rope.freqs_cos "
            f"(rotary table) are missing, and no published size has width {width}: pass heads"
        )
    return HEADS[width]


def _mlp_ratio(width: int, hidden: int, part: float) -> float:
    # The shortest decimal that yields the hidden width.
    ratios = (round((hidden + 0.5) / part / width, digits) for digits in range(17))
    return next(ratio for ratio in ratios if int(part * ratio * width) == hidden)


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} ({few(names)})" if names else "0"
