"""The implementation of `Network.generate`: images or other samples for labels or captions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree

from decm_lightning import samplers
from decm_lightning.conditions import select
from decm_lightning.image_writer import to_pil, to_uint8
from decm_lightning.samplers import Sampler
from decm_lightning.seeds import check_seed
from decm_lightning.text import CaptionEncoder, named_encoder
from decm_lightning.types import Captions, Condition, Sample

Requested = int | str | Sequence[int] | Sequence[str] | Tensor | Captions | None
"""Labels or captions, or a single one for all samples; None for each class once, or for no condition."""
BATCH = 256
"""Samples per batch, as in `decm sample`."""


def generate(
    network: Any,
    condition: Requested,
    steps: int | None,
    seed: int,
    sampler: str | Sampler | None,
    rows: Sequence[int] | None,
    encoder: CaptionEncoder | str | None,
    decoder: Callable[[Sample], Sample] | None,
    options: Mapping[str, Any],
) -> list[Image.Image] | Tensor:
    """Return images or samples; see `Network.generate`."""
    check_seed(seed)
    if sampler is None:
        sampler = "mix" if network.reads_end_time else "euler"
    if steps is None:
        steps = 50 if sampler == "euler" else 2
    is_image = len(network.sample_shape) == 3
    if is_image and decoder is None and network.sample_shape[0] not in (1, 3):
        raise ValueError(f"the samples are latents {network.sample_shape}, not images: pass decoder=, such as a VAE's")
    method = samplers.sampler(sampler, **options)
    with evaluating(network), torch.no_grad():
        conditions, rows = _conditions(network, condition, rows, encoder)
        batches = [slice(first, first + BATCH) for first in range(0, len(rows), BATCH)]
        parts = [_samples(network, method, select(conditions, part), steps, rows[part], seed) for part in batches]
        if not is_image:
            return torch.cat(parts)
        decoded = parts if decoder is None else [decoder(part) for part in parts]
        return [to_pil(image) for part in decoded for image in to_uint8(part).cpu()]


def _samples(network: Any, method: Sampler, condition: Condition, steps: int, rows: Sequence[int], seed: int) -> Sample:
    # LoRA adapters may have a wider dtype than the frozen weights; such a model casts its input itself.
    dtype = reduce(torch.promote_types, (parameter.dtype for parameter in network.parameters()))
    device = next(network.parameters()).device
    return samplers.generate(
        network, method, condition, steps, shape=network.sample_shape, rows=rows, seed=seed, device=device, dtype=dtype
    )


def _conditions(
    network: Any, requested: Requested, rows: Sequence[int] | None, encoder: CaptionEncoder | str | None
) -> tuple[Condition, Sequence[int]]:
    """Return the condition of each sample, on the network's device, and the sample numbers."""
    device = next(network.parameters()).device
    condition: Condition
    if isinstance(network.example(1)[3], Captions):
        condition = _captions(network, requested, encoder)
    elif encoder is not None or isinstance(requested, str | Captions):
        raise ValueError(f"{type(network).__name__} does not accept captions")
    elif not network.num_classes:
        if requested is not None:
            raise ValueError(f"{type(network).__name__} does not accept a condition: got {requested!r}")
        condition = None
    else:
        condition = _labels(network, requested, rows)
    count = 1 if condition is None else len(_pytree.tree_leaves(condition)[0])
    rows = range(count) if rows is None else rows
    if count == 1 < len(rows):
        condition = select(condition, torch.zeros(len(rows), dtype=torch.long))
    elif count != len(rows) or not count:
        raise ValueError(
            f"rows and conditions must have the same length, at least 1: got {len(rows)} rows and {count} conditions"
        )
    return _pytree.tree_map_only(Tensor, lambda part: part.to(device), condition), rows


def _captions(network: Any, requested: Requested, encoder: CaptionEncoder | str | None) -> Condition:
    if isinstance(requested, Captions):
        return requested
    texts = [requested] if isinstance(requested, str) else requested
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{type(network).__name__} needs a caption or a list of captions: got {requested!r}")
    used: CaptionEncoder = network.caption_encoder() if encoder is None else encoder  # type: ignore[assignment]
    if isinstance(encoder, str):
        used = named_encoder(encoder)
    unique = list(dict.fromkeys(map(str, texts)))
    used.measured(unique)
    captions = used(unique)
    return select(captions, torch.tensor([unique.index(str(text)) for text in texts]))


def _labels(network: Any, requested: Requested, rows: Sequence[int] | None) -> Tensor:
    if requested is None:
        requested = [row % network.num_classes for row in (range(network.num_classes) if rows is None else rows)]
    labels = torch.atleast_1d(torch.as_tensor(requested))
    if labels.ndim > 1 or (labels.numel() and labels.is_floating_point()):
        raise ValueError(f"labels must be a list of integers: got {labels.dtype} {tuple(labels.shape)}")
    if (outside := labels[(labels < 0) | (labels > network.num_classes)]).numel():
        raise ValueError(f"labels must be from 0 to {network.num_classes} (the null class): got {outside.tolist()}")
    return labels.long()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore the mode of each submodule afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
