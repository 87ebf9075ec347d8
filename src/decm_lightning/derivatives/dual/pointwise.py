"""Tangents of element-wise operations, with broadcasting."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decm_lightning.derivatives.dual.dispatch import COMPOSITES, Pair, forward_mode, rule
from decm_lightning.derivatives.dual.tangent_rows import TangentRows
from decm_lightning.derivatives.dual.value import Dual

aten = torch.ops.aten

# The Jacobian is diagonal, so the backward kernels, which multiply by f'(x), also compute tangents.
DERIVATIVES: dict[str, Callable[..., Tensor]] = {
    "silu": lambda dx, x, _, inplace=False: aten.silu_backward(dx, x),
    "gelu": lambda dx, x, _, approximate="none": aten.gelu_backward(dx, x, approximate=approximate),
    "softplus": lambda dx, x, _, beta=1, threshold=20: aten.softplus_backward(dx, x, beta, threshold),
    "sigmoid": lambda dx, _, value: aten.sigmoid_backward(dx, value),
    "tanh": lambda dx, _, value: aten.tanh_backward(dx, value),
    "exp": lambda dx, _, value: dx * value,
    "sin": lambda dx, x, _: dx * x.cos(),
    "cos": lambda dx, x, _: (dx * x.sin()).neg_(),
    "sqrt": lambda dx, _, value: dx / value / 2,
    "rsqrt": lambda dx, _, value: (dx * value**3).mul_(-0.5),
    "square": lambda dx, x, _: (dx * x).mul_(2),
    "neg": lambda dx, *_: -dx,
}
BY_FORWARD_MODE = {
    *("abs", "acos", "addcdiv", "addcmul", "asin", "atan", "atan2", "celu", "clamp", "clip", "cosh", "elu", "erf"),
    *("expm1", "fmod", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "lerp", "log", "log10", "log1p", "log2"),
    *("logaddexp", "logsigmoid", "masked_fill", "maximum", "minimum", "mish", "nan_to_num", "reciprocal"),
    *("relu", "relu6", "remainder", "selu", "sinc", "sinh", "softsign", "tan", "where", "xlogy", "__rpow__"),
}


def _shape(rows: TangentRows | None, value: Tensor) -> torch.Size:
    return value.shape if rows is None else rows.of(value).shape


@rule(*DERIVATIVES, broadcasts=True)
def of_one_element(
    rows: TangentRows | None, func: Callable, value: Tensor, /, x: Pair, *args: Any, **kwargs: Any
) -> Tensor:
    """Return f'(x) dx; by forward mode if x is complex, where backward kernels multiply by the conjugate of f'(x)."""
    if x.primal.is_complex():
        return forward_mode(func, x, *args, **kwargs)
    known = value if rows is None else rows.of(value)
    return DERIVATIVES[func.__name__](x.tangent, x.primal, known, *args, **kwargs)


@rule(*BY_FORWARD_MODE, broadcasts=True)
def of_several_elements(
    rows: TangentRows | None, func: Callable, value: Tensor, /, *args: Any, **kwargs: Any
) -> Tensor:
    """Return the tangent by forward mode, for the rows that have one."""
    return forward_mode(func, *args, **kwargs)


@rule("pow", broadcasts=True)
def power(rows: TangentRows | None, func: Callable, value: Tensor, /, x: Any, exponent: Any) -> Tensor:
    """Return n x^(n - 1) dx for a number n >= 1, as in diffusers' norms; otherwise use forward mode."""
    if isinstance(x, Pair) and isinstance(exponent, int | float) and exponent >= 1:
        return exponent * x.primal ** (exponent - 1) * x.tangent
    return forward_mode(func, x, exponent)


@rule("add", broadcasts=True)
def add(rows: TangentRows | None, func: Callable, value: Tensor, /, a: Any, b: Any, alpha: float = 1) -> Tensor:
    """Return da + alpha db."""
    if isinstance(a, Pair) and isinstance(b, Pair):
        return torch.add(a.tangent, b.tangent, alpha=alpha)
    tangent = a.tangent if isinstance(a, Pair) else alpha * b.tangent if alpha != 1 else b.tangent
    return tangent.expand(_shape(rows, value))


@rule("sub", broadcasts=True)
def sub(rows: TangentRows | None, func: Callable, value: Tensor, /, a: Any, b: Any, alpha: float = 1) -> Tensor:
    """Return da - alpha db."""
    return add(rows, func, value, a, b, alpha=-alpha)


@rule("rsub", "__rsub__", broadcasts=True)
def rsub(rows: TangentRows | None, func: Callable, value: Tensor, /, a: Any, b: Any, alpha: float = 1) -> Tensor:
    """Return db - alpha da."""
    return add(rows, func, value, b, a, alpha=-alpha)


@rule("mul", broadcasts=True)
def mul(rows: TangentRows | None, func: Callable, value: Tensor, /, a: Any, b: Any) -> Tensor:
    """Return da b + a db."""
    if isinstance(a, Pair) and isinstance(b, Pair):
        return torch.addcmul(a.tangent * b.primal, a.primal, b.tangent)
    return a.tangent * b if isinstance(a, Pair) else a * b.tangent


@rule("div", broadcasts=True)
def div(
    rows: TangentRows | None, func: Callable, value: Tensor, /, a: Any, b: Any, rounding_mode: str | None = None
) -> Tensor:
    """Return (da - (a / b) db) / b."""
    if rounding_mode is not None:
        return forward_mode(func, a, b, rounding_mode=rounding_mode)
    if not isinstance(b, Pair):
        return a.tangent / b
    quotient = value if rows is None else rows.of(value)
    return ((a.tangent if isinstance(a, Pair) else 0) - quotient * b.tangent) / b.primal


@rule("__rdiv__", "__rtruediv__", broadcasts=True)
def rdiv(rows: TangentRows | None, func: Callable, value: Tensor, /, b: Any, a: Any) -> Tensor:
    """Return the tangent of a / b; torch passes b first."""
    return div(rows, func, value, a, b)


def dropout(
    func: Callable, x: Dual, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool = True
) -> Dual:
    """Return x times the dropout of ones, so that value and tangent share one mask."""
    # x itself if nothing is dropped: checkpointing requires that autograd saves the same tensors as without duals.
    return x * func(torch.ones_like(x.primal), p, True) if p and training and train else x


COMPOSITES.update(dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), dropout))
