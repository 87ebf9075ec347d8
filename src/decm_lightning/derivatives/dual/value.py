"""The dual value: a tensor with its derivative, which ordinary network code can use like a tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NoReturn
from weakref import WeakSet

import torch
from einops._backends import TorchBackend
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.derivatives.dual.tangent_rows import pad

METADATA = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_sparse", "is_nested"}


class NoTangentError(NotImplementedError):
    """Raised for an operation whose tangent is unknown or not finite; a silent zero would be a wrong derivative."""


class RuleSet(WeakSet):
    """All living duals of one pass that were created outside compiled regions.

    Attributes:
        recorded: whether autograd records the pass.
        check_finite: whether to raise at the first tangent that is not finite.
    """

    def __init__(self, check_finite: bool = False) -> None:
        super().__init__()
        self.recorded = torch.is_grad_enabled()
        self.check_finite = check_finite


@dataclass(eq=False)
class Dual:
    """A tensor and its derivative along a tangent; torch's functions and methods apply to it as to a tensor.

    A dual is a dataclass and a pytree node, because DDP, FSDP and gradient checkpointing look for tensors in these. It
    is not a subclass of Tensor: FSDP2 would silently drop its tangent.

    Attributes:
        primal: the value, with its autograd graph.
        tangent: the derivative, without a graph. It may be shorter than the value on one axis and is zero beyond. None
            after the pass.
        rule_set: all living duals of the pass.
    """

    primal: Tensor
    tangent: Tensor | None
    rule_set: RuleSet

    apply: ClassVar[Callable[[Callable, tuple, dict[str, Any]], Any]]
    """Apply a torch function to duals. Set by `dispatch`, whose rules need this class."""

    def __post_init__(self) -> None:
        # A compiled region that reads the set would be recompiled each time the set changes.
        if not torch.compiler.is_compiling():
            self.rule_set.add(self)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        """Apply a torch function to arguments, at least one of which is a dual."""
        return cls.apply(func, tuple(args), kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self.__dataclass_fields__:
            raise AttributeError(name)
        member = getattr(Tensor, name)
        if callable(member):
            return partial(_call, member, self)
        if name in METADATA:
            return getattr(self.primal, name)
        if name == "mT" or (name == "T" and self.ndim == 2):
            return self.transpose(-2, -1)
        return unsupported(name, "no rule for this attribute")

    def __len__(self) -> int:
        if not self.primal.ndim:
            # Called by torch.tensor(x), in code that handles x as a number because it is not a torch.Tensor.
            unsupported("tensor", "a number read from a tensor has no derivative")
        return len(self.primal)

    def __iter__(self) -> Iterator["Dual"]:
        return iter(self.unbind(0))

    def __bool__(self) -> NoReturn:
        unsupported("__bool__", "a branch on a tensor's value has no derivative")

    def __rmatmul__(self, other: Tensor) -> "Dual":
        return _call(torch.matmul, other, self)

    def padded(self) -> Tensor:
        """Return the tangent padded with zeros to the shape of the value."""
        assert self.tangent is not None
        return pad(self.tangent, self.primal)


def unsupported(name: str, reason: str) -> NoReturn:
    """Raise for an operation that has no tangent."""
    raise NoTangentError(f"the dual engine has no tangent for torch's {name}: {reason}")


def _call(func: Callable, *args: Any, **kwargs: Any) -> Any:
    return Dual.apply(func, args, kwargs)


def _operator(func: Callable) -> Callable:
    # Not a partial: it would not be bound to the instance as a method.
    return lambda *args: Dual.apply(func, args, {})


def _in_place(name: str) -> Callable:
    return lambda *_: unsupported(name, "in-place operations are not supported")


OPERATORS: dict[str, Any] = {
    "add": Tensor.add,
    "sub": Tensor.sub,
    "mul": Tensor.mul,
    "truediv": Tensor.div,
    "pow": Tensor.pow,
    "mod": Tensor.remainder,
    "matmul": Tensor.matmul,
    "neg": Tensor.neg,
    "abs": Tensor.abs,
    "radd": Tensor.add,
    "rmul": Tensor.mul,
    "rsub": Tensor.__rsub__,
    "rtruediv": Tensor.__rtruediv__,
    "rpow": Tensor.__rpow__,
    "getitem": Tensor.__getitem__,
    "eq": Tensor.eq,
    "ne": Tensor.ne,
    "lt": Tensor.lt,
    "le": Tensor.le,
    "gt": Tensor.gt,
    "ge": Tensor.ge,
}
for _name, _function in OPERATORS.items():
    setattr(Dual, f"__{_name}__", _operator(_function))
for _name in ("iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "setitem"):
    setattr(Dual, f"__{_name}__", _in_place(f"__{_name}__"))


class _DualBackend(TorchBackend):
    """Registers duals with einops, which searches the subclasses of its backends by the type of the tensor."""

    framework_name = __name__

    def is_appropriate_type(self, tensor: Any) -> bool:
        return isinstance(tensor, Dual)


_pytree.register_pytree_node(
    Dual,
    lambda value: ([value.primal, value.tangent], value.rule_set),
    lambda parts, rule_set: Dual(*parts, rule_set),  # type: ignore[call-arg, arg-type]
)
