"""The parts of `Network.generate`: the flow map, the conditions and their placement."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from decm_lightning import samplers
from decm_lightning.conditions import select
from decm_lightning.text import CaptionEncoder
from decm_lightning.types import Captions, Condition, FlowMapNetwork

Requested = int | str | Sequence[int] | Sequence[str] | Tensor | Captions | None
"""Labels or captions, or a single one for all samples; None for each class once, or for no condition."""
BATCH = 256
"""Samples per batch, as in `decm sample`."""
log = logging.getLogger(__name__)


def flow_map(network: Any) -> FlowMapNetwork:
    """Return a network as a flow map. The noise that a public DiT predicts is converted to a velocity of `path`."""
    prediction = getattr(network, "prediction", "velocity")
    if prediction == "velocity":
        return network  # type: ignore[no-any-return]
    # Imported here: only public networks need it.
    from decm_lightning.teachers.noise_prediction import NoisePrediction
    from decm_lightning.teachers.prediction import prediction_of

    prediction = prediction or prediction_of(network)
    if prediction is None:
        log.warning("cannot tell whether the network predicts velocity or noise; assuming velocity")
    if prediction == "noise":
        convert = NoisePrediction().velocity
        return samplers.flow_map_of(
            lambda x_t, t, condition: convert(lambda z, step: network(z, step, step, condition), x_t, t)
        )
    return network  # type: ignore[no-any-return]


def placement(network: Any) -> dict[str, Any]:
    """Return the shape, device and dtype of a network's samples."""
    # LoRA adapters may have a wider dtype than the frozen weights; such a model casts its input itself.
    dtype = reduce(torch.promote_types, (parameter.dtype for parameter in network.parameters()))
    return {"shape": network.sample_shape, "device": next(network.parameters()).device, "dtype": dtype}


def conditions_of(
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
    used: CaptionEncoder = network.caption_encoder(encoder)
    if used is not encoder:
        used.to(next(network.parameters()).device)
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
