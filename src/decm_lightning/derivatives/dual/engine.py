"""The engine: one pass of dual values over the network."""

from typing import Any

import torch
from torch import nn

from decm_lightning.derivatives.dual.value import Dual, NoTangentError, RuleSet
from decm_lightning.derivatives.forward import JVPResult, Tangent
from decm_lightning.types import Condition, FlowMapNetwork, Sample, Time


def dual(
    network: FlowMapNetwork,
    x_t: Sample,
    t: Time,
    s: Time,
    condition: Condition,
    tangent: Tangent | None,
    watched: bool = False,
) -> JVPResult:
    """Return u with its ordinary graph and jvp without any, both from one pass over the network.

    Every operation gives its value as always and beside it, under no_grad, its derivative along the tangent in the rows
    that have one; a tangent is freed once the next operations have read it. Attention runs on the fused kernel. The
    network's code must be made of torch's operations, none in place, and may be compiled, whole or in parts; dropout is
    carried but in attention, checkpointing unless it is reentrant, and an autograd.Function is not. A dual is no
    torch.Tensor: code that asks isinstance takes its other branch, which may give another u.

    Args:
        network: the student.
        x_t: start points, (b, *d).
        t: start times, (b,).
        s: end times, (b,).
        condition: class labels, (b,), or None.
        tangent: direction over (x, t, s) of the first rows; None to skip the derivative.
        watched: stop at the first tangent that is not finite; it costs a look at every one of them.

    Raises:
        NoTangentError: if an operation has no tangent, or no finite one; the message names it and its layer.
    """
    if tangent is None:
        return JVPResult(network(x_t, t, s, condition), None)
    rows = len(tangent.t)
    rule_set = RuleSet(watched)
    inputs: list[Any] = [
        value if along is None else Dual(value, along.detach().to(value), rule_set)
        for value, along in ((x_t, tangent.x), (t, tangent.t), (s, tangent.s))
    ]
    try:
        end: Any = network(inputs[0], inputs[1], inputs[2], condition)
        if not isinstance(end, Dual):
            return JVPResult(end, torch.zeros_like(end[:rows]))
        return JVPResult(end.primal, end.padded()[:rows])
    except NoTangentError as error:
        raise NoTangentError(f"{error}{_place(network, error)}") from error
    finally:
        # Gradient checkpointing keeps a block's inputs and runs it again in the backward pass, without tangents.
        for member in list(rule_set):
            member.tangent = None


def _place(network: FlowMapNetwork, error: BaseException) -> str:
    """Return the innermost layer of the network that was at work when the error was raised."""
    names = {id(module): name for name, module in network.named_modules()} if isinstance(network, nn.Module) else {}
    found, frame = "", error.__traceback__
    while frame is not None:
        found = names.get(id(frame.tb_frame.f_locals.get("self")), found)
        frame = frame.tb_next
    return f", in layer {found}" if found else ""
