"""Apply torch functions to duals: the value as usual, and the tangent by the rule for the function's name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from decm_lightning.derivatives.dual.tangent_rows import TangentRows
from decm_lightning.derivatives.dual.value import Dual, NoTangentError, RuleSet, unsupported

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
LEADING = ("input", "tensors", "other", "query", "key")
"""Arguments that rules take by position; callers may also pass them to torch by name."""
LIKE = {"expand_as", "reshape_as", "to", "type_as", "view_as"}
"""Operations that use only the shape or the dtype of their second argument."""
CASTS = {"to", "type", "type_as", "byte", "char", "short", "int", "long"}
LEAKS = {"item", "tolist", "numpy", "data_ptr", "backward", "batch_norm"}


@dataclass(frozen=True)
class Pair:
    """A dual as a rule sees it: the tangent, and the value in the tangent's rows."""

    primal: Tensor
    tangent: Tensor


@dataclass(frozen=True)
class Rule:
    """The derivative of one operation.

    Attributes:
        derivative: called as derivative(rows, func, value, *args, **kwargs), with pairs among the arguments; returns
            the tangent of value, or a sequence with one tangent for each part of value.
        is_rowwise: called with the same arguments, but with duals instead of pairs; returns whether the tangent's rows
            are enough. If not, tangents are padded with zeros first, which is always correct but computes more rows.
        broadcasts: tensors among the arguments are broadcast with the duals, so they are cut to the tangent's rows too.
    """

    derivative: Callable[..., Any]
    is_rowwise: Callable[..., bool]
    broadcasts: bool


RULES: dict[str, Rule] = {}
COMPOSITES: dict[str, Callable[..., Any]] = {}
"""Operations that are replaced by other operations on duals, instead of having a rule."""


def always(*_: Any, **__: Any) -> bool:
    """Return True: the operation does not mix rows, whichever axis they are on."""
    return True


def rule(
    *names: str, is_rowwise: Callable[..., bool] = always, broadcasts: bool = False
) -> Callable[[Callable], Callable]:
    """Register a derivative for the operations with these names."""

    def register(derivative: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, Rule(derivative, is_rowwise, broadcasts)))
        return derivative

    return register


def replace(values: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to all tensors, duals and pairs among arguments, including those in lists, tuples and dicts."""
    if isinstance(values, Tensor | Dual | Pair):
        return function(values)
    if isinstance(values, tuple | list):
        return type(values)([replace(value, function) for value in values])
    if isinstance(values, dict):
        return {key: replace(value, function) for key, value in values.items()}
    return values


def forward_mode(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return the tangent of one operation by torch's forward mode.

    Raises:
        NoTangentError: if the operation has no forward derivative.
    """
    if torch.compiler.is_compiling():
        unsupported(_name(func), "it has no rule, and forward mode cannot be compiled")

    def to_forward(part: Any) -> Any:
        return forward_ad.make_dual(part.primal.detach(), part.tangent) if isinstance(part, Pair) else part

    def to_tangent(result: Tensor) -> Tensor:
        if not _is_differentiable(result):
            return result
        tangent = forward_ad.unpack_dual(result).tangent
        # Operations registered without a derivative drop the tangent instead of raising.
        return unsupported(_name(func), "forward mode returned no tangent") if tangent is None else tangent

    with forward_ad.dual_level():
        try:
            with sdpa_kernel(SDPBackend.MATH):
                result = func(*replace(args, to_forward), **replace(kwargs, to_forward))
        except (NotImplementedError, RuntimeError) as error:
            raise NoTangentError(f"the dual engine has no tangent for torch's {_name(func)}: {error}") from error
        return replace(result, to_tangent)


FALLBACK = Rule(
    lambda rows, func, value, /, *args, **kwargs: forward_mode(func, *args, **kwargs),
    is_rowwise=lambda *_, **__: False,
    broadcasts=False,
)
"""The rule for every operation without its own rule; it assumes that rows are mixed."""


def apply(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the function's value, with a tangent if it depends on one.

    Raises:
        NoTangentError: if the operation is in place, has no known derivative, or has a tangent that is not finite and
            the pass has check_finite.
    """
    name = _name(func)
    if _in_place(name) or kwargs.get("inplace") or kwargs.get("out") is not None:
        unsupported(name, "in-place operations are not supported")
    leading = LEADING if name != "scaled_dot_product_attention" else (*LEADING, "value")
    args = (*args, *(kwargs[key] for key in leading if key in kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key not in leading}
    if name in COMPOSITES:
        return COMPOSITES[name](func, *args, **kwargs)
    duals = _duals((args, kwargs))
    if duals and name in LEAKS:
        unsupported(name, "no rule for this operation")
    if duals and duals[0].rule_set.recorded and not torch.is_grad_enabled():
        unsupported(name, "under no_grad, reentrant checkpointing or an autograd.Function u would lose its graph")
    if name in SHAPE_ONLY and _duals((args[1:], kwargs)):
        unsupported(name, "a number read from a tensor has no derivative")
    fallback = bool(duals) and name not in RULES and name not in SHAPE_ONLY
    before = _random_state(duals) if fallback else None
    value = func(*replace(args, _primal), **replace(kwargs, _primal))
    if before is not None and before != _random_state(duals):
        unsupported(name, "it uses random numbers")
    if duals and name in CASTS and _is_integer(value):
        unsupported(name, f"{value.dtype} has no derivative")
    if not duals or name in SHAPE_ONLY or not _is_differentiable(value):
        return value
    if name in LIKE and not _duals(args[0]):
        return value
    with torch.no_grad():
        tangent = _derive(FALLBACK if fallback else RULES[name], duals, func, value, args, kwargs)
        pair = _pair(value, tangent, duals[0].rule_set)
        if duals[0].rule_set.check_finite:
            replace(pair, partial(_refuse_nonfinite, name))
        return pair


def _derive(rule: Rule, duals: list[Dual], func: Callable, value: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    candidates = {TangentRows.between(dual.primal, dual.tangent) for dual in duals if dual.tangent is not None}
    rows = candidates.pop() if len(candidates) == 1 else None
    if rows is not None and not rule.is_rowwise(rows, func, value, *args, **kwargs):
        rows = None

    def shorten(part: Dual | Tensor) -> Pair | Tensor:
        if isinstance(part, Dual) and part.tangent is not None:
            return Pair(part.primal, part.padded()) if rows is None else Pair(rows.of(part.primal), part.tangent)
        constant = _primal(part)
        return rows.of(constant) if rows is not None and rule.broadcasts else constant

    return rule.derivative(rows, func, value, *replace(args, shorten), **replace(kwargs, shorten))


def _pair(value: Any, tangent: Any, rule_set: RuleSet) -> Any:
    if isinstance(value, tuple | list):
        return type(value)([_pair(part, dpart, rule_set) for part, dpart in zip(value, tangent, strict=True)])
    if not _is_differentiable(value):
        return value
    TangentRows.between(value, tangent)
    return Dual(value, tangent.to(value.dtype), rule_set)


def _refuse_nonfinite(name: str, pair: Dual | Tensor) -> None:
    if isinstance(pair, Dual) and pair.tangent is not None and not pair.tangent.isfinite().all():
        finite = "is finite" if pair.primal.isfinite().all() else "is not finite either"
        raise NoTangentError(f"the tangent of torch's {name} is not finite (its value {finite})")


def _is_differentiable(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_is_differentiable(part) for part in value)
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not _is_differentiable(value) and value.dtype != torch.bool


def _duals(values: Any) -> list[Dual]:
    duals: list[Dual] = []

    def collect(value: Any) -> None:
        if isinstance(value, Dual) and value.tangent is not None:
            duals.append(value)

    replace(values, collect)
    return duals


def _primal(value: Any) -> Any:
    return value.primal if isinstance(value, Dual) else value


# Names never change, so a compiled region can treat them as constants.
@torch.compiler.assume_constant_result
def _name(func: Callable) -> str:
    # A custom operation may share its name with one of torch's, so its name includes the namespace.
    own = isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    name = str(func) if own else getattr(func, "__name__", str(func))
    return SPELLINGS.get(name, name)


@torch.compiler.assume_constant_result
def _in_place(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _random_state(duals: list[Dual]) -> bytes | None:
    device = duals[0].primal.device
    # The meta device has no random state.
    if torch.compiler.is_compiling() or device.type == "meta":
        return None
    state = torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return state.numpy().tobytes()


Dual.apply = staticmethod(apply)
