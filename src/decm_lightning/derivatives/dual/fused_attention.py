"""The tangent of attention in one Triton kernel: one pass over the keys, without a weight matrix in memory.

Only torch's CUDA builds include Triton. Without it this module can be imported, and `supports` gives the reason.
"""

import math
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
    from triton.language import constexpr
except ImportError:
    triton = tl = constexpr = None
_jit = getattr(triton, "jit", lambda function: function)

LARGEST_HEAD = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
"""The largest head size per dtype: a larger block does not fit into the registers of a GPU."""
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""With TRITON_INTERPRET=1 Triton runs kernels in numpy, also on CPU tensors. This is slow and meant for tests."""

REFUSED: list[str] = []
"""The reason why this process does not use the kernel, if any: it raised, or its result was wrong."""


def refuse_fused(reason: str) -> None:
    """Make `supports` return this reason from now on."""
    REFUSED[:] = [reason]


def supports(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return None if `fused_tangent` can be used, or the reason why it cannot."""
    head = query.shape[-1]
    if REFUSED:
        return REFUSED[0]
    if triton is None:
        return "Triton is not installed"
    if not INTERPRETED and not _is_ampere_or_later(query.device):
        return "the device is not an NVIDIA GPU of the Ampere generation or later"
    if query.dtype not in LARGEST_HEAD:
        return f"{query.dtype} is not bfloat16, float16 or float32"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values have different dtypes"
    if not head == key.shape[-1] == value.shape[-1]:
        return "queries, keys and values have different head sizes"
    if head > LARGEST_HEAD[query.dtype]:
        return f"head size {head} is above {LARGEST_HEAD[query.dtype]} for {query.dtype}"
    return None if query.numel() and key.numel() else "queries or keys are empty"


def fused_tangent(
    q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, v: Tensor, dv: Tensor | None, scale: float
) -> Tensor:
    """Return dO = P dV + (P * dS) V - rowsum(P * dS) O: P = softmax(S), S = c Q K^T, dS = c (dQ K^T + Q dK^T).

    Queries have shape (..., n, d), keys and values (..., m, d); the leading axes broadcast. A tangent has the shape and
    the dtype of its primal; None means zero and is skipped.

    Raises:
        RuntimeError: if `supports` returns a reason.
        ValueError: if shapes do not match.
    """
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])

    def align(operand: Tensor | None) -> Tensor | None:
        if operand is None:
            return None
        operand = operand.expand(*leading, *operand.shape[-2:])
        return operand[(None,) * (2 - len(leading))].flatten(0, -4)

    tangent = attention_tangent(*(align(operand) for operand in (q, dq, k, dk, v, dv)), scale)
    return tangent.reshape(*leading, *q.shape[-2:])


# Not a triton_op: the compiler would trace into it, find nothing to fuse, and launch the kernel by its own launcher,
# which does not accept tuples and bypasses the interpreter.
@torch.library.custom_op("decm_lightning::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, v: Tensor, dv: Tensor | None, scale: float
) -> Tensor:
    """Return the tangent of attention as `fused_tangent` does, for operands of shape (b, h, n, d)."""
    if reason := supports(q, k, v):
        raise RuntimeError(f"attention has no fused tangent: {reason}")
    for operand, like in ((dq, q), (dk, k), (v, k), (dv, k), (k[:, :, :0], q[:, :, :0])):
        # Otherwise the kernel would read beyond the tensor.
        if operand is not None and operand.shape != like.shape:
            shapes = f"{tuple(operand.shape)} and {tuple(like.shape)}"
            raise ValueError(f"operands of attention must have the same shape: got {shapes}")
    out = _empty(q)
    operands = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (out, q, dq, k, dk, v, dv)]
    # Triton uses 16-byte loads only if it knows that rows are aligned, from strides that are multiples of 16. With head
    # size 72 they are multiples of 8, so strides are passed in units of a constant that Triton knows.
    unit = math.gcd(16 // q.element_size(), *(step for x in operands if x is not None for step in x.stride()[:-1]))
    arguments = [x if x is None else (x, *(step // unit for step in x.stride()[:-1])) for x in operands]
    batch, heads, queries, size = q.shape
    width = max(16, 1 << (size - 1).bit_length())
    block, step, warps = _blocks(q.dtype, width)
    # All programs are on the first axis: the other axes are limited to 65,535.
    grid = (batch * heads * -(-queries // block),)
    sizes = (heads, queries, k.shape[2])
    with torch.cuda.device_of(q):
        _kernel[grid](*arguments, sizes, scale, size, width, unit, block, step, num_warps=warps, num_stages=2)
    return out


@attention_tangent.register_fake
def _empty(q: Tensor, *_: Any) -> Tensor:
    # The memory layout is (b, n, h, d), as in networks before they split heads and after they join them.
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


@torch.compiler.assume_constant_result
def _is_ampere_or_later(device: torch.device) -> bool:
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def _blocks(dtype: torch.dtype, width: int) -> tuple[int, int, int]:
    """Return the queries per program, the keys per step, and the warps.

    On sm_86, sm_89 and sm_120, which have 99 KB of shared memory, these need at most 96 KB.
    """
    if dtype == torch.float32:
        return (64, 16, 4) if width <= 64 else (16, 16, 4)
    if width <= 128:
        return (128, 64, 8) if width <= 64 else (128, 32, 8)
    return 32, 16, 4


@_jit
def _rows(operand, sample, head, first, count: constexpr, width: constexpr, unit: constexpr):  # type: ignore[no-untyped-def]
    """Return pointers to a tile of rows, in 64 bits because tensors may have more than 2^31 elements."""
    tensor, sample_stride, head_stride, row_stride = operand
    start = tl.cast(sample, tl.int64) * sample_stride + tl.cast(head, tl.int64) * head_stride
    rows = (tl.cast(first, tl.int64) + tl.arange(0, count))[:, None] * row_stride
    return tensor + (start + rows) * unit + tl.arange(0, width)[None, :]


@_jit
def _add_product(total, left, right):  # type: ignore[no-untyped-def]
    # Float32 as three TF32 products, as in torch's attention: exact to 1e-6 and on tensor cores, unlike "ieee".
    return tl.dot(left, right, total, input_precision="tf32x3")


@_jit
def _kernel(  # type: ignore[no-untyped-def]
    out,
    q,
    dq,
    k,
    dk,
    v,
    dv,
    sizes,
    scale,
    size: constexpr,
    width: constexpr,
    unit: constexpr,
    block: constexpr,
    step: constexpr,
):
    """Compute one block of rows of one head. Operands are tuples of a tensor and its strides; tangents may be None."""
    heads, queries, keys = sizes
    blocks = tl.cdiv(queries, block)
    first = tl.program_id(0) % blocks * block
    head, sample = tl.program_id(0) // blocks % heads, tl.program_id(0) // blocks // heads
    columns = tl.arange(0, width)[None, :] < size
    here = (first + tl.arange(0, block) < queries)[:, None] & columns
    query = tl.load(_rows(q, sample, head, first, block, width, unit), mask=here, other=0.0)
    if dq is not None:
        dquery = tl.load(_rows(dq, sample, head, first, block, width, unit), mask=here, other=0.0)

    # Running sums over the keys, with e = exp(S - largest): of e, e dS, e V, and e dS V + e dV.
    largest = tl.full([block], float("-inf"), tl.float32)
    total, dtotal = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    mean, dmean = tl.zeros([block, width], tl.float32), tl.zeros([block, width], tl.float32)
    for start in range(0, keys, step):
        seen = start + tl.arange(0, step) < keys
        there = seen[:, None] & columns
        key = tl.load(_rows(k, sample, head, start, step, width, unit), mask=there, other=0.0)
        value = tl.load(_rows(v, sample, head, start, step, width, unit), mask=there, other=0.0)
        scores = _add_product(tl.zeros([block, step], tl.float32), query, tl.trans(key))
        dscores = tl.zeros([block, step], tl.float32)
        if dq is not None:
            dscores = _add_product(dscores, dquery, tl.trans(key))
        if dk is not None:
            dkey = tl.load(_rows(dk, sample, head, start, step, width, unit), mask=there, other=0.0)
            dscores = _add_product(dscores, query, tl.trans(dkey))

        # Multiplied by log2(e), because exp2 is used.
        scores = tl.where(seen[None, :], scores * (scale * 1.4426950408889634), float("-inf"))
        # Finite from the first step on, since every step has a key: infinities are never subtracted.
        larger = tl.maximum(largest, tl.max(scores, 1))
        largest, shrink = larger, tl.exp2(largest - larger)
        weights = tl.exp2(scores - largest[:, None])
        dweights = weights * dscores * scale
        total = total * shrink + tl.sum(weights, 1)
        dtotal = dtotal * shrink + tl.sum(dweights, 1)
        weights, dweights = weights.to(value.dtype), dweights.to(value.dtype)
        mean = _add_product(mean * shrink[:, None], weights, value)
        dmean = _add_product(dmean * shrink[:, None], dweights, value)
        if dv is not None:
            dvalue = tl.load(_rows(dv, sample, head, start, step, width, unit), mask=there, other=0.0)
            dmean = _add_product(dmean, weights, dvalue)
    target = _rows(out, sample, head, first, block, width, unit)
    tangent = (dmean - (dtotal / total)[:, None] * mean) / total[:, None]
    tl.store(target, tangent.to(target.dtype.element_ty), mask=here)
