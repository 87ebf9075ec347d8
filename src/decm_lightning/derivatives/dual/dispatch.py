"""How a function of torch acts on duals: its value as always, and its tangent by the rule of its name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from decm_lightning.derivatives.dual.cut import Cut
from decm_lightning.derivatives.dual.value import Dual, refuse

SPELLINGS = {
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "multiply": "mul",
    "permute_dims": "permute",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
}
SHAPE_ONLY = {
    *("detach", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex"),
    *("is_contiguous", "element_size", "get_device", "zeros_like", "ones_like", "empty_like", "full_like"),
    *("rand_like", "randn_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
}
LEAKS = {"item", "tolist", "numpy", "data_ptr", "backward", "batch_norm"}


@dataclass(frozen=True)
class Rule:
    """The derivative of one operation.

    Attributes:
        derivative: from (cut, func, value, *args, **kwargs), in which the duals' values are as short as their tangents,
            to the tangent of value, or to a sequence of one for each part of it.
        keeps: from the same, with whole values: whether the operation can be done on the cut tangents alone. If not,
            they are padded first, which is always right and costs the work on zeros.
        broadcasts: tensors among the arguments are aligned with the duals, and are cut as they are.
    """

    derivative: Callable[..., Any]
    keeps: Callable[..., bool]
    broadcasts: bool


RULES: dict[str, Rule] = {}
COMPOSITES: dict[str, Callable[..., Any]] = {}
"""Operations that are done by others on duals, in place of a rule."""


def always(*_: Any, **__: Any) -> bool:
    """The operation keeps the rows apart wherever they are."""
    return True


def rule(*names: str, keeps: Callable[..., bool] = always, broadcasts: bool = False) -> Callable[[Callable], Callable]:
    """Register the derivative of the operations of these names."""

    def register(derivative: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, Rule(derivative, keeps, broadcasts)))
        return derivative

    return register


def replace(values: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the tensors and duals among arguments, those in lists and tuples included."""
    if isinstance(values, Dual | Tensor):
        return function(values)
    if isinstance(values, tuple | list):
        return type(values)([replace(value, function) for value in values])
    if isinstance(values, dict):
        return {key: replace(value, function) for key, value in values.items()}
    return values


def forward_mode(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return the tangent of one operation, by torch.func.jvp over its duals.

    Raises:
        NotImplementedError: if the operation has no forward derivative.
    """
    duals = _duals((args, kwargs))

    def of(*values: Tensor) -> Any:
        given = dict(zip(map(id, duals), values, strict=True))
        every, named = replace((args, kwargs), lambda value: given.get(id(value), _primal(value)))
        return func(*every, **named)

    points = tuple(dual.primal.detach() for dual in duals)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(of, points, tuple(dual.padded() for dual in duals))[1]
    except (NotImplementedError, RuntimeError) as error:
        raise NotImplementedError(f"the dual engine has no tangent for torch's {_name(func)}: {error}") from error


def apply(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what the function gives, with a tangent where it depends on one.

    Raises:
        NotImplementedError: if the operation is in place, or its derivative is not known.
    """
    name = _name(func)
    if (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") or kwargs.get("out") is not None:
        refuse(name, "operations in place are not carried")
    if name in COMPOSITES:
        return COMPOSITES[name](func, *args, **kwargs)
    duals = _duals((args, kwargs))
    if duals and name in LEAKS:
        refuse(name, "no rule for this operation")
    fallback = bool(duals) and name not in RULES and name not in SHAPE_ONLY
    before = _random_state(duals[0]) if fallback else None
    value = func(*replace(args, _primal), **replace(kwargs, _primal))
    if before is not None and not torch.equal(before, _random_state(duals[0])):
        refuse(name, "it draws random numbers")
    if not duals or name in SHAPE_ONLY or not _is_differentiable(value):
        return value
    with torch.no_grad():
        if fallback:
            return _pair(value, forward_mode(func, *args, **kwargs), duals[0].family)
        return _pair(value, _derive(RULES[name], duals, func, value, args, kwargs), duals[0].family)


def _derive(rule: Rule, duals: list[Dual], func: Callable, value: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    cuts = {Cut.between(dual.primal, dual.tangent) for dual in duals if dual.tangent is not None}
    cut = cuts.pop() if len(cuts) == 1 else None
    if cut is not None and not rule.keeps(cut, func, value, *args, **kwargs):
        cut = None

    def shorten(given: Dual | Tensor) -> Dual | Tensor:
        if isinstance(given, Dual) and given.tangent is not None:
            tangent = given.padded() if cut is None else given.tangent
            return Dual(given.primal if cut is None else cut.of(given.primal), tangent, given.family)
        constant = _primal(given)
        return cut.of(constant) if cut is not None and rule.broadcasts else constant

    return rule.derivative(cut, func, value, *replace(args, shorten), **replace(kwargs, shorten))


def _pair(value: Any, tangent: Any, family: "WeakSet[Dual]") -> Any:
    if isinstance(value, tuple | list):
        return type(value)([_pair(part, along, family) for part, along in zip(value, tangent, strict=True)])
    if not _is_differentiable(value):
        return value
    Cut.between(value, tangent)
    return Dual(value, tangent.to(value.dtype), family)


def _is_differentiable(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_is_differentiable(part) for part in value)
    return isinstance(value, Tensor) and value.is_floating_point()


def _duals(values: Any) -> list[Dual]:
    found: dict[int, Dual] = {}

    def note(value: Any) -> None:
        if isinstance(value, Dual) and value.tangent is not None:
            found[id(value)] = value

    replace(values, note)
    return list(found.values())


def _primal(value: Any) -> Any:
    return value.primal if isinstance(value, Dual) else value


def _name(func: Callable) -> str:
    name = getattr(func, "__name__", str(func))
    return SPELLINGS.get(name, name)


def _random_state(dual: Dual) -> Tensor:
    device = dual.primal.device
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


Dual.apply = staticmethod(apply)
