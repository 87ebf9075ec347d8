"""Check the fused kernel against the blockwise path before a run, with the network's shapes and precision."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decm_lightning.derivatives.dual.attention import ANNOUNCED, BLOCK, RECORDED, FusedCall, by_blocks
from decm_lightning.derivatives.dual.engine import dual
from decm_lightning.derivatives.dual.fused_attention import fused_tangent, refuse_fused, supports
from decm_lightning.derivatives.forward import Tangent

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""The largest allowed relative error |fused - exact| / |exact|: about ten times the rounding error."""
log = logging.getLogger(__name__)


def check_fused(network: nn.Module, example: tuple[Any, ...]) -> str | None:
    """Compare the kernel with the blockwise path on the network's attention; return why it is refused, or None.

    If the kernel raises or differs, this process stops using it and logs the reason in one line. If the kernel is not
    supported, as on a CPU, nothing happens. Call this under the precision's autocast.

    Args:
        network: the student on its training device; its random state and running statistics are left unchanged.
        example: x_t, t, s and condition as passed to the network, on its device; their values are ignored.
    """
    device = example[0].device
    if supports(*torch.empty(3, 1, 16, dtype=torch.bfloat16, device=device)[:, None]) is not None:
        return None
    try:
        calls = fused_calls(network, example)
        reasons = (difference(call, device) for call in sorted(calls, key=str))
        reason = next((reason for reason in reasons if reason is not None), None)
    except Exception as error:  # compilers and drivers may raise anything
        reason = f"the fused kernel could not be checked: {_line(error)}"
    if reason is not None:
        refuse_fused(reason)
        # Logged here, so not again at the first step.
        ANNOUNCED.add(reason)
        log.warning("attention's tangent is computed in blocks of %d queries: %s", BLOCK, reason)
    return reason


def fused_calls(network: nn.Module, example: tuple[Any, ...]) -> set[FusedCall]:
    """Return the distinct calls of the fused kernel in one pass of the dual engine."""
    x_t, t, s, condition = example
    RECORDED.append(set())
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _undisturbed(network, x_t.device):
            dual(network, x_t, t, s, condition, Tangent(x_t, t, s))
    finally:
        calls = RECORDED.pop()
    return calls


def difference(call: FusedCall, device: torch.device) -> str | None:
    """Return how the kernel fails on random operands, or None if it agrees with the blockwise path."""
    q, dq, k, dk, v, dv = random_operands(call, device)
    where = f"queries {list(call.query)}, keys {list(call.key)}, {str(call.dtype).removeprefix('torch.')}"
    try:
        fused = fused_tangent(q, dq, k, dk, v, dv, call.scale)
        if device.type == "cuda":
            # Kernel errors are asynchronous: without this a later call would raise them.
            torch.cuda.synchronize(device)
    except Exception as error:  # compilers and drivers may raise anything
        return f"the fused kernel raises {_line(error)} ({where})"
    dq, dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    q, dq, k, dk, v, dv = (operand.double() for operand in (q, dq, k, dk, v, dv))
    with torch.autocast(device.type, enabled=False):
        exact = by_blocks(q, dq, k, dk, v, dv, call.scale, BLOCK)
    off = ((fused.double() - exact).norm() / exact.norm()).item()
    # Compared so that NaN is refused too.
    return None if off <= TOLERANCE[call.dtype] else f"the fused kernel has a relative error of {off:.2g} ({where})"


def random_operands(call: FusedCall, device: torch.device) -> list[Any]:
    """Return normally distributed q, dq, k, dk, v, dv for a call; None for a missing tangent."""
    generator = torch.Generator().manual_seed(0)
    operands: list[Tensor | None] = []
    for shape, moves in zip((call.query, call.key, call.value), call.tangents, strict=True):
        value, tangent = torch.randn(2, *shape, generator=generator).to(device, call.dtype)
        operands += [value, tangent if moves else None]
    return operands


@contextmanager
def _undisturbed(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the network in eval mode, and restore its modes and the random state afterwards."""
    training = [module for module in network.modules() if module.training]
    devices = [device] if device.type == "cuda" else []
    network.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module in training:
            module.training = True


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
