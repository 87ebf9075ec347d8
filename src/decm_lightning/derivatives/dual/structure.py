"""Tangents of operations that move elements: shapes, pieces, casts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from decm_lightning.derivatives.dual.dispatch import COMPOSITES, Pair, replace, rule
from decm_lightning.derivatives.dual.tangent_rows import TangentRows
from decm_lightning.derivatives.dual.value import Dual, unsupported

RESHAPES = ("reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel")
ALONG_DIM = {
    "chunk": (2, 0),
    "split": (2, 0),
    "split_with_sizes": (2, 0),
    "unbind": (1, 0),
    "select": (1, 0),
    "narrow": (1, 0),
    "sum": (1, None),
    "mean": (1, None),
    "softmax": (1, None),
    "cat": (1, 0),
}
"""The position of `dim` among the operation's arguments, and its default; None means all axes."""


def apart(name: str) -> Callable[..., bool]:
    """Return a check of whether the operation's `dim` differs from the axis of the rows."""
    position, default = ALONG_DIM[name]

    def is_rowwise(rows: TangentRows, func: Callable, value: Any, /, *args: Any, **kwargs: Any) -> bool:
        dims = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else default))
        first = args[0] if args else kwargs["input"]
        ndim = first[0].ndim if isinstance(first, tuple | list) else first.ndim
        every = (dims,) if isinstance(dims, int) else dims or range(ndim)
        return rows.axis not in [dim if dim < 0 else dim - ndim for dim in every]

    return is_rowwise


def _same(rows: TangentRows | None, func: Callable, value: Any, /, x: Pair, *args: Any, **kwargs: Any) -> Any:
    """Apply the operation itself to the tangent, since it is linear."""
    return func(x.tangent, *args, **kwargs)


rule("permute", "transpose", "movedim", "moveaxis", "t", "adjoint", "contiguous", "clone", "view_as_real")(_same)
for _name in ("chunk", "split", "split_with_sizes", "unbind", "select", "narrow", "sum", "mean"):
    rule(_name, is_rowwise=apart(_name))(_same)


def _before_last(rows: TangentRows, *_: Any, **__: Any) -> bool:
    return rows.axis < -1


@rule("view_as_complex", is_rowwise=_before_last)
def view_as_complex(rows: TangentRows | None, func: Callable, value: Tensor, /, x: Pair) -> Tensor:
    """Return the tangent as complex numbers; its memory layout may differ from the value's."""
    return func(x.tangent.contiguous())


@rule("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda")
def cast(rows: TangentRows | None, func: Callable, value: Tensor, /, x: Pair, *args: Any, **kwargs: Any) -> Tensor:
    """Cast the tangent to the dtype and device of the value."""
    return x.tangent.to(value)


def _keeps_reshape(rows: TangentRows, func: Callable, value: Tensor, /, x: Dual, *_: Any, **__: Any) -> bool:
    return rows.after_reshape(x.primal.shape, value.shape) is not None


@rule(*RESHAPES, is_rowwise=_keeps_reshape)
def reshape(rows: TangentRows | None, func: Callable, value: Tensor, /, x: Pair, *args: Any, **kwargs: Any) -> Tensor:
    """Reshape the tangent by the value's new shape, since the arguments may contain the value's number of rows."""
    if value.dtype != x.primal.dtype:
        unsupported(func.__name__, "a view in another dtype is not a linear map")
    if rows is None:
        return x.tangent.reshape(value.shape)
    whole = list(x.primal.shape)
    whole[rows.axis] = rows.total
    shape = rows.after_reshape(whole, value.shape)
    assert shape is not None
    return x.tangent.reshape(shape)


def _not_on_padded(
    rows: TangentRows, func: Callable, value: Tensor, /, x: Dual, pad: Sequence[int], *_: Any, **__: Any
) -> bool:
    return rows.axis < -(len(pad) // 2)


@rule("pad", is_rowwise=_not_on_padded)
def pad(
    rows: TangentRows | None,
    func: Callable,
    value: Tensor,
    /,
    x: Pair,
    pad: Sequence[int],
    mode: str = "constant",
    **_: Any,
) -> Tensor:
    """Pad the tangent in the same mode; in constant mode with zeros."""
    return func(x.tangent, pad, mode)


@rule("expand", "expand_as", "broadcast_to")
def expand(rows: TangentRows | None, func: Callable, value: Tensor, /, x: Pair, *args: Any, **kwargs: Any) -> Tensor:
    """Expand the tangent along the same axes."""
    return x.tangent.expand((value if rows is None else rows.of(value)).shape)


@rule("cat", is_rowwise=apart("cat"), broadcasts=True)
def cat(rows: TangentRows | None, func: Callable, value: Tensor, /, tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Concatenate the tangents, with zeros for tensors without one."""
    return func(replace(tensors, _tangent), *args, **kwargs)


@rule("stack", broadcasts=True)
def stack(
    rows: TangentRows | None, func: Callable, value: Tensor, /, tensors: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """Stack the tangents, with zeros for tensors without one."""
    return func(replace(tensors, _tangent), *args, **kwargs)


def _keeps_index(rows: TangentRows, func: Callable, value: Tensor, /, x: Dual, index: Any) -> bool:
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is Ellipsis or type(item) in (int, slice) for item in items):
        return False
    indexed = sum(item is not None and item is not Ellipsis for item in items)
    rest = [slice(None)] * (x.ndim - indexed)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    axes = [item for item in items[:at] + rest + items[at + 1 :] if item is not None]
    return axes[rows.axis] == slice(None)


@rule("__getitem__", is_rowwise=_keeps_index)
def getitem(rows: TangentRows | None, func: Callable, value: Tensor, /, x: Pair, index: Any) -> Tensor:
    """Return the same elements of the tangent."""
    if not isinstance(x, Pair):
        unsupported("__getitem__", "an index has no derivative")
    return x.tangent[index]


def _tangent(value: Pair | Tensor) -> Tensor:
    return value.tangent if isinstance(value, Pair) else torch.zeros_like(value)


def checkpoint(func: Callable, body: Callable, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint `body` inside a compiled region, where inputs and outputs must be plain tensors.

    Outside compiled regions checkpointing is ordinary code and not a torch operation.
    """
    rule_set = next(value.rule_set for value in args if isinstance(value, Dual))
    parts = [part for value in args if isinstance(value, Dual) for part in (value.primal, value.tangent)]

    def on_tensors(*parts: Any) -> Any:
        pairs = iter(zip(parts[::2], parts[1::2], strict=True))
        end = body(*(Dual(*next(pairs), rule_set) if isinstance(value, Dual) else value for value in args))
        return end.primal, end.tangent

    primal, tangent = func(on_tensors, *parts, **kwargs)
    return Dual(primal, tangent, rule_set)


COMPOSITES["tag_activation_checkpoint"] = checkpoint
