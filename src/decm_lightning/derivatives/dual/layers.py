"""Tangents of products, convolutions, softmax and normalization."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from decm_lightning.derivatives.dual.dispatch import Pair, forward_mode, rule
from decm_lightning.derivatives.dual.structure import apart
from decm_lightning.derivatives.dual.tangent_rows import TangentRows
from decm_lightning.derivatives.dual.value import Dual, unsupported

BY_SAMPLE = {
    *("adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d", "conv_transpose1d", "conv_transpose2d"),
    *("interpolate", "pixel_shuffle", "pixel_unshuffle"),
}
"""Operations that mix all axes but the first, the batch."""


def _only_dual_is_first(*args: Any, **kwargs: Any) -> bool:
    return not any(isinstance(value, Dual | Pair) for value in (*args[1:], *kwargs.values()))


def _on_first_axis(rows: TangentRows, func: Callable, value: Any, /, x: Dual, *args: Any, **kwargs: Any) -> bool:
    return rows.axis == -x.ndim and _only_dual_is_first(x, *args, **kwargs)


def _not_on_last_axis(rows: TangentRows, func: Callable, value: Any, /, x: Any, *args: Any, **kwargs: Any) -> bool:
    return rows.axis != -1 and _only_dual_is_first(x, *args, **kwargs)


def _before_matrices(rows: TangentRows, func: Callable, value: Any, /, *factors: Any, **kwargs: Any) -> bool:
    return rows.axis < -2 and all(factor.ndim > 1 for factor in factors)


def _outside_norm(
    rows: TangentRows,
    func: Callable,
    value: Any,
    /,
    x: Any,
    normalized_shape: Sequence[int],
    *_: Any,
    **__: Any,
) -> bool:
    return rows.axis < -len(normalized_shape)


@rule("linear", is_rowwise=_not_on_last_axis)
def linear(rows: TangentRows | None, func: Callable, value: Tensor, /, x: Any, weight: Any, bias: Any = None) -> Tensor:
    """Return dx W^T; by forward mode if the weight depends on the input too."""
    if not _only_dual_is_first(x, weight, bias):
        return forward_mode(func, x, weight, bias)
    return func(x.tangent, weight)


@rule("conv1d", "conv2d", "conv3d", is_rowwise=_on_first_axis)
def convolution(
    rows: TangentRows | None,
    func: Callable,
    value: Tensor,
    /,
    x: Any,
    weight: Any,
    bias: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Return the convolution of dx without the bias; by forward mode if the weight depends on the input too."""
    if not _only_dual_is_first(x, weight, bias):
        return forward_mode(func, x, weight, bias, *args, **kwargs)
    return func(x.tangent, weight, None, *args, **kwargs)


@rule(*BY_SAMPLE, is_rowwise=_on_first_axis)
def of_a_sample(rows: TangentRows | None, func: Callable, value: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
    """Return the tangent by forward mode, for the samples that have one."""
    return forward_mode(func, *args, **kwargs)


@rule("instance_norm", is_rowwise=_on_first_axis)
def instance_norm(
    rows: TangentRows | None,
    func: Callable,
    value: Tensor,
    /,
    x: Any,
    running_mean: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Return the tangent by forward mode, for the samples that have one."""
    if running_mean is not None:
        unsupported("instance_norm", "with running statistics, which forward mode would update a second time")
    return forward_mode(func, x, None, *args, **kwargs)


@rule("matmul", "bmm", "mm", is_rowwise=_before_matrices, broadcasts=True)
def matmul(rows: TangentRows | None, func: Callable, value: Tensor, /, a: Any, b: Any) -> Tensor:
    """Return dA B + A dB."""
    left = func(a.tangent, b.primal if isinstance(b, Pair) else b) if isinstance(a, Pair) else None
    right = func(a.primal if isinstance(a, Pair) else a, b.tangent) if isinstance(b, Pair) else None
    terms = [term for term in (left, right) if term is not None]
    return sum(terms[1:], terms[0])


@rule("einsum", is_rowwise=lambda *_, **__: False)
def einsum(rows: TangentRows | None, func: Callable, value: Tensor, /, equation: str, *factors: Any) -> Tensor:
    """Return the sum over factors of the product with that factor replaced by its tangent."""
    points = [factor.primal if isinstance(factor, Pair) else factor for factor in factors]
    terms = [
        func(equation, *points[:i], factor.tangent, *points[i + 1 :])
        for i, factor in enumerate(factors)
        if isinstance(factor, Pair)
    ]
    return sum(terms[1:], terms[0])


@rule("softmax", is_rowwise=apart("softmax"))
def softmax(rows: TangentRows | None, func: Callable, value: Tensor, /, x: Pair, *args: Any, **kwargs: Any) -> Tensor:
    """Return P dx - P sum(P dx). The Jacobian is symmetric, so the gradient's kernel also computes the tangent."""
    dim = kwargs.get("dim", args[0] if args else None)
    if dim is None:
        return forward_mode(func, x, *args, **kwargs)
    known = value if rows is None else rows.of(value)
    return torch._softmax_backward_data(x.tangent.to(known.dtype), known, dim, known.dtype)


@rule("layer_norm", is_rowwise=_outside_norm)
def layer_norm(
    rows: TangentRows | None,
    func: Callable,
    value: Tensor,
    /,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    """Return w (dx - mean(dx) - n mean(n dx)) / std, with n the normalized x; symmetric as for softmax."""
    if not _only_dual_is_first(x, weight, bias):
        return forward_mode(func, x, normalized_shape, weight, bias, eps)
    dn = _normalized_tangent(x.primal, x.tangent, list(normalized_shape), eps)
    return dn if weight is None else dn * weight


@rule("group_norm", is_rowwise=_on_first_axis)
def group_norm(
    rows: TangentRows | None,
    func: Callable,
    value: Tensor,
    /,
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    """Return w (dx - mean(dx) - n mean(n dx)) / std within each group, with one w per channel."""
    if not _only_dual_is_first(x, weight, bias):
        return forward_mode(func, x, num_groups, weight, bias, eps)
    point, tangent = (part.reshape(len(part), num_groups, -1) for part in (x.primal, x.tangent))
    dn = _normalized_tangent(point, tangent, [point.shape[-1]], eps).reshape(x.primal.shape)
    return dn if weight is None else dn * weight.view(-1, *[1] * (dn.ndim - 2))


def _normalized_tangent(x: Tensor, dx: Tensor, shape: list[int], eps: float) -> Tensor:
    x = x.detach()
    _, mean, scale = torch.native_layer_norm(x, shape, None, None, eps)
    only_x = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(dx, x, shape, mean, scale, None, None, only_x)[0]


@rule("rms_norm", is_rowwise=_outside_norm)
def rms_norm(
    rows: TangentRows | None,
    func: Callable,
    value: Tensor,
    /,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
) -> Tensor:
    """Return w (dx - n mean(n dx)) / rms, with n the normalized x."""
    if not _only_dual_is_first(x, weight):
        return forward_mode(func, x, normalized_shape, weight, eps)
    axes = tuple(range(-len(normalized_shape), 0))
    smallest = torch.finfo(x.primal.dtype).eps if eps is None else eps
    scale = torch.rsqrt(x.primal.square().mean(axes, keepdim=True) + smallest)
    unit = x.primal * scale
    dn = scale * torch.addcmul(x.tangent, unit, (unit * x.tangent).mean(axes, keepdim=True), value=-1)
    return dn if weight is None else dn * weight
