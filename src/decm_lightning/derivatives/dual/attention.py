"""The tangent of attention, by a fused kernel or in blocks of queries, without storing a tokens x tokens matrix."""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decm_lightning.derivatives.dual.dispatch import Pair, rule
from decm_lightning.derivatives.dual.fused_attention import fused_tangent, supports
from decm_lightning.derivatives.dual.tangent_rows import TangentRows
from decm_lightning.derivatives.dual.value import unsupported

BLOCK = 256
"""Queries per block. At 1,024 tokens this takes half the time and a quarter of the memory of forward mode."""
ANNOUNCED: set[str | None] = set()
"""Reasons that have been logged."""
log = logging.getLogger(__name__)


class FusedCall(NamedTuple):
    """A call of the fused kernel: shapes of queries, keys and values, which of them have tangents, dtype and scale."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    tangents: tuple[bool, bool, bool]
    dtype: torch.dtype
    scale: float

    @classmethod
    def of(
        cls, q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, v: Tensor, dv: Tensor | None, scale: float
    ) -> "FusedCall":
        """Describe the call with these operands."""
        present = (dq is not None, dk is not None, dv is not None)
        return cls(tuple(q.shape), tuple(k.shape), tuple(v.shape), present, q.dtype, scale)


RECORDED: list[set[FusedCall]] = []
"""Calls of the fused kernel, recorded instead of computed while `fused_check` collects them."""


def _before_matrices(rows: TangentRows, *_: Any, **__: Any) -> bool:
    return rows.axis < -2


@rule("scaled_dot_product_attention", is_rowwise=_before_matrices, broadcasts=True)
def attention(
    rows: TangentRows | None,
    func: Callable,
    value: Tensor,
    /,
    query: Any,
    key: Any,
    content: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return P dV + dP V, with P = softmax(S), dP = P dS - P rowsum(P dS), S = c Q K^T, dS = c (dQ K^T + Q dK^T)."""
    if dropout_p or isinstance(attn_mask, Pair):
        unsupported("scaled_dot_product_attention", "with dropout or with a mask that has a tangent")
    # Autocast casts the inputs of torch's attention, but not of our kernel.
    (q, dq), (k, dk), (v, dv) = (_split(operand, value.dtype) for operand in (query, key, content))
    if enable_gqa:
        groups = q.shape[-3] // k.shape[-3]
        k, v = (x.repeat_interleave(groups, -3) for x in (k, v))
        dk, dv = (dx if dx is None else dx.repeat_interleave(groups, -3) for dx in (dk, dv))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    reason = "a mask" if attn_mask is not None or is_causal else supports(q, k, v)
    if reason is None and RECORDED:
        RECORDED[-1].add(FusedCall.of(q, dq, k, dk, v, dv, factor))
    elif q.device.type != "meta":
        # The meta device is only used to select an engine.
        _announce(reason)
        if reason is None:
            return fused_tangent(q, dq, k, dk, v, dv, factor)
    dq, dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    # On some devices autocast would compute the softmax in float32, and products would mix dtypes.
    with torch.autocast(q.device.type, enabled=False):
        return by_blocks(q, dq, k, dk, v, dv, factor, BLOCK, attn_mask, is_causal)


def by_blocks(
    q: Tensor,
    dq: Tensor,
    k: Tensor,
    dk: Tensor,
    v: Tensor,
    dv: Tensor,
    factor: float,
    block: int,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Return the tangent of attention, for `block` queries at a time; operands are (..., tokens, head size)."""
    keys, keys_with_tangents = k.mT, torch.cat([k, dk], -1).mT
    blocks = []
    for start in range(0, q.shape[-2], block):
        rows = slice(start, start + block)
        query, dquery = q[..., rows, :] * factor, dq[..., rows, :] * factor
        mask = _mask(attn_mask, is_causal, rows, query, k)
        p = _weights(query @ keys, mask)
        dp = torch._softmax_backward_data(torch.cat([dquery, query], -1) @ keys_with_tangents, p, -1, p.dtype)
        blocks.append(p @ dv + dp @ v)
    return torch.cat(blocks, -2)


def _split(operand: Pair | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if isinstance(operand, Pair):
        return operand.primal.to(dtype), operand.tangent.to(dtype)
    return operand.to(dtype), None


# The compiler calls it while tracing and leaves it out of the compiled code.
@torch.compiler.assume_constant_result
def _announce(reason: str | None) -> None:
    if reason not in ANNOUNCED:
        ANNOUNCED.add(reason)
        how = "in one fused kernel" if reason is None else f"in blocks of {BLOCK} queries ({reason})"
        log.info("attention's tangent is computed %s", how)


def _mask(mask: Tensor | None, is_causal: bool, rows: slice, q: Tensor, k: Tensor) -> Tensor | None:
    if is_causal:
        positions = torch.arange(rows.start, rows.start + q.shape[-2], device=q.device)
        return positions[:, None] >= torch.arange(k.shape[-2], device=q.device)
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]


def _weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores)
    # As in torch's attention, a query whose keys are all masked returns 0 and not NaN.
    return scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0)
