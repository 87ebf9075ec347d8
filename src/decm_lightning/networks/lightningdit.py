"""Public LightningDiT checkpoints (arXiv 2501.01423; FACM's, arXiv 2507.03738) read as a DiT of this package."""

import math
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

from decm_lightning.networks.dit import DiT
from decm_lightning.networks.layers import Rotary

Weights: TypeAlias = Literal["ema", "model"]
"""The two sets of weights in a training checkpoint: averaged, and as trained."""

WRAPPERS = ("module", "_orig_mod")
"""What DistributedDataParallel and torch.compile put into the names of the tensors they wrap."""
SECOND = "ema_models.1.ema_model."
"""Of the two averages in FACM's own checkpoints, the one that FACM samples with."""
# The tensors whose shapes, of so many dimensions, tell the architecture.
SHAPES = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.w3.weight": 2,
    "blocks.0.adaLN_modulation.1.weight": 2,
}


def load_lightningdit(path: str | Path, weights: Weights | None = None) -> DiT:
    """Return the network of a LightningDiT checkpoint, in float32 and eval mode.

    Its path is that of this package: t = 0 noise, t = 1 data, and the output is data minus noise. The architecture is
    found from the shapes of the tensors, and every tensor must have its place. Rotary tables may be there or not.

    Args:
        path: a .safetensors file, or one of torch.save (.pt) that holds tensors by name, alone or under `ema` or
            `model`, or FACM's `emas`. Names may be prefixed with `module.` and `_orig_mod.`.
        weights: which of `ema` and `model` to read; None for `ema`, and where there is none for `model`. Tensors that
            stand alone are read whatever is asked.

    Raises:
        FileNotFoundError: if there is no file at `path`.
        ValueError: if the file cannot be read, holds no LightningDiT with RMSNorm, SwiGLU and rotary positions, lacks
            the weights asked for, or has a tensor too few, too many, of another shape, or with other rotary positions.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: load_lightningdit reads a .pt or .safetensors file")
    try:
        return _network(_plainly_named(_chosen(_read(path), weights)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the DiT that has these tensors, from their shapes alone.

    Raises:
        ValueError: if a tensor that would tell is missing or has too many or too few dimensions.
    """
    unfit = [n for n, dims in SHAPES.items() if n not in tensors or tensors[n].ndim != dims or not tensors[n].numel()]
    if unfit:
        raise ValueError(
            f"no LightningDiT with SwiGLU: missing or of other dimensions are {_few(unfit)}; "
            f"it holds {_few(list(tensors))}"
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
        "heads": max(width // _head_width(tensors), 1),
        "mlp_ratio": _mlp_ratio(width, tensors["blocks.0.mlp.w3.weight"].shape[1]),
        "num_classes": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "landing_time": any(name.startswith("r_embedder.") for name in tensors),
        "qk_norm": any(name.endswith(".q_norm.weight") for name in tensors),
        "shift": tensors["blocks.0.adaLN_modulation.1.weight"].shape[0] != 4 * width,
    }


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # FACM keeps its command line's arguments beside the weights: a Namespace, which can do no harm.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Bytes that are no checkpoint can fail in any way.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"neither safetensors nor what torch.load reads with weights_only=True: {reason}") from error


def _chosen(content: Any, weights: Weights | None) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"no tensors by name, but one {type(content).__name__}")
    parts = {name: content[name] for name in ("ema", "model") if isinstance(content.get(name), Mapping)}
    if isinstance(content.get("emas"), Mapping):
        averages = {str(name): tensor for name, tensor in content["emas"].items()}
        parts = {"ema": {n.removeprefix(SECOND): v for n, v in averages.items() if n.startswith(SECOND)}} | parts
    wanted = weights or ("ema" if "ema" in parts else "model")
    if parts and wanted not in parts:
        raise ValueError(f"no weights {wanted!r} in it, only {', '.join(parts)}: ask for weights={next(iter(parts))!r}")
    tensors = parts[wanted] if parts else content
    others = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        raise ValueError(f"tensors by name are expected, alone or under ema or model: got {_few(others) or 'nothing'}")
    return {str(name): tensor for name, tensor in tensors.items()}


def _plainly_named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in plain:
            raise ValueError(f"{bare} is there twice, as {name} too: keep one of them")
        plain[bare] = tensor
    return plain


def _network(tensors: Mapping[str, Tensor]) -> DiT:
    config = architecture(tensors)
    # Without memory: only the names and shapes of its tensors are needed, which are then put in their places.
    with torch.device("meta"):
        network = DiT(**config)
    places = network.state_dict()
    tables = Rotary(config["width"] // config["heads"], network.side).state_dict(prefix="feat_rope.")
    _check_places(tensors, places, [name for name in places if name not in tables])
    _check_tables(tensors, tables, network.side)
    state = {
        name: tables[name]
        if name in tables
        # A copy of its own: the file may be changed while the network lives.
        else tensors[name].detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name in places
    }
    network.load_state_dict(state, assign=True)
    return network.eval()


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
            f"{_counted(unfit)}; only a LightningDiT with RMSNorm, SwiGLU and as many channels out as in has a place "
            "for each: take out of the file what is no part of it"
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


def _head_width(tensors: Mapping[str, Tensor]) -> int:
    for name in ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos"):
        if name in tensors and tensors[name].ndim and tensors[name].numel():
            return tensors[name].shape[-1]
    raise ValueError(
        "the number of heads cannot be told: there is no blocks.0.attn.q_norm.weight (QK norm) and no "
        "feat_rope.freqs_cos (rotary table); add the table, (tokens, width / heads), to the file"
    )


def _mlp_ratio(width: int, hidden: int) -> float:
    # The shortest decimal that gives the hidden width.
    ratios = (round((hidden + 0.5) * 1.5 / width, digits) for digits in range(17))
    return next(ratio for ratio in ratios if int(2 / 3 * ratio * width) == hidden)


def _few(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} ({_few(names)})" if names else "0"
