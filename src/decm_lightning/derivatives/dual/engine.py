"""The engine: one pass of dual values over the network."""

from typing import Any

import torch

from decm_lightning.derivatives.dual.value import Dual, Family
from decm_lightning.derivatives.jet import Jet, Tangent
from decm_lightning.types import Condition, FlowMapNetwork, Sample, Time


def dual(network: FlowMapNetwork, x_t: Sample, t: Time, s: Time, condition: Condition, tangent: Tangent | None) -> Jet:
    """Return u with its ordinary graph and du without any, both from one pass over the network.

    Every operation gives its value as always and beside it, under no_grad, its derivative along the tangent in the rows
    that have one; a tangent is freed once the next operations have read it. Attention runs on the fused kernel. The
    network's code must be eager and made of torch's operations, none in place; dropout is carried but in attention,
    checkpointing unless it is reentrant, and an autograd.Function is not.

    Raises:
        NotImplementedError: if an operation has no tangent; the message names it.
    """
    if tangent is None:
        return Jet(network(x_t, t, s, condition), None)
    rows = len(tangent.t)
    family = Family()
    inputs: list[Any] = [
        Dual(value, along.detach().to(value), family)
        for value, along in ((x_t, tangent.x), (t, tangent.t), (s, tangent.s))
    ]
    try:
        end: Any = network(inputs[0], inputs[1], inputs[2], condition)
        if not isinstance(end, Dual):
            return Jet(end, torch.zeros_like(end[:rows]))
        return Jet(end.primal, end.padded()[:rows])
    finally:
        # Gradient checkpointing keeps a block's inputs and runs it again in the backward pass, without tangents.
        for member in list(family):
            member.tangent = None
