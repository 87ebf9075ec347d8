"""The dual engine: one pass of dual values through the network."""

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
    check_finite: bool = False,
) -> JVPResult:
    """Return u with its ordinary graph and jvp without a graph, from one pass through the network.

    Each operation computes its value as usual and also, under no_grad, its derivative along the tangent in the rows
    that have one. A tangent is freed once the next operations have read it. Attention runs on the fused kernel.

    The network must consist of torch operations, none of them in place. It may be compiled, as a whole or in parts.
    Dropout outside attention and non-reentrant checkpointing are supported; autograd.Function is not. A dual is not a
    torch.Tensor: code that branches on isinstance(x, torch.Tensor) takes the other branch, which may change u.

    Args:
        network: the student.
        x_t: start points, (b, *d).
        t: start times, (b,).
        s: end times, (b,).
        condition: class labels, (b,), or None.
        tangent: tangent over (x, t, s) of the first rows; None to skip the derivative.
        check_finite: stop at the first tangent that is not finite; this reads every tangent.

    Raises:
        NoTangentError: if an operation has no tangent, or with check_finite a tangent that is not finite. The message
            names the operation and its layer.
    """
    if tangent is None:
        return JVPResult(network(x_t, t, s, condition), None)
    rows = len(tangent.t)
    rule_set = RuleSet(check_finite)
    inputs: list[Any] = [
        value if part is None else Dual(value, part.detach().to(value), rule_set)
        for value, part in ((x_t, tangent.x), (t, tangent.t), (s, tangent.s))
    ]
    try:
        u: Any = network(inputs[0], inputs[1], inputs[2], condition)
        if not isinstance(u, Dual):
            return JVPResult(u, torch.zeros_like(u[:rows]))
        return JVPResult(u.primal, u.padded()[:rows])
    except NoTangentError as error:
        raise NoTangentError(f"{error}{_place(network, error)}") from error
    finally:
        # Gradient checkpointing stores a block's inputs and recomputes it in the backward pass, without tangents.
        for member in list(rule_set):
            member.tangent = None


def _place(network: FlowMapNetwork, error: BaseException) -> str:
    """Return the innermost layer of the network in which the error was raised, as text for its message."""
    names = {id(module): name for name, module in network.named_modules()} if isinstance(network, nn.Module) else {}
    layer, frame = "", error.__traceback__
    while frame is not None:
        layer = names.get(id(frame.tb_frame.f_locals.get("self")), layer)
        frame = frame.tb_next
    return f", in layer {layer}" if layer else ""
