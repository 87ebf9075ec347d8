"""The dual value: a tensor with its derivative, which a network's ordinary code takes for a tensor."""

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
    """An operation whose tangent is not known, or not finite: a silent zero would be a wrong derivative."""


class RuleSet(WeakSet):
    """All living duals of one pass, made outside compiled regions.

    Attributes:
        recorded: whether autograd records the pass.
        watched: stop at the first tangent that is not finite where its value is.
    """

    def __init__(self, watched: bool = False) -> None:
        super().__init__()
        self.recorded = torch.is_grad_enabled()
        self.watched = watched


@dataclass(eq=False)
class Dual:
    """A tensor and its derivative along a tangent; torch's functions and methods apply to it as to a tensor.

    No subclass of Tensor, whose tangent FSDP2 would lose silently, but a dataclass and a pytree: the containers in
    which DDP, FSDP and gradient checkpointing look for tensors.

    Attributes:
        primal: the value, with its autograd graph.
        tangent: the derivative, without a graph; on at most one axis shorter than the value, and zero beyond. None once
            the pass is over.
        rule_set: all living duals of the pass.
    """

    primal: Tensor
    tangent: Tensor | None
    rule_set: RuleSet

    apply: ClassVar[Callable[[Callable, tuple, dict[str, Any]], Any]]
    """How functions of torch act on duals: set by `dispatch`, whose rules need this class."""

    def __post_init__(self) -> None:
        # A compiled region that read the set would be compiled anew for each of its states.
        if not torch.compiler.is_compiling():
            self.rule_set.add(self)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        """Apply a function of torch to arguments of which at least one is dual."""
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
            # torch.tensor counts a list in a list: code that took the value for a number, as it is no torch.Tensor.
            unsupported("tensor", "a number taken out of a value has no derivative")
        return len(self.primal)

    def __iter__(self) -> Iterator["Dual"]:
        return iter(self.unbind(0))

    def __bool__(self) -> NoReturn:
        unsupported("__bool__", "a branch on a value has no derivative")

    def __rmatmul__(self, other: Tensor) -> "Dual":
        return _call(torch.matmul, other, self)

    def padded(self) -> Tensor:
        """Return the tangent in the shape of the value."""
        assert self.tangent is not None
        return pad(self.tangent, self.primal)


def unsupported(name: str, reason: str) -> NoReturn:
    """Raise for an operation that has no tangent."""
    raise NoTangentError(f"the dual engine has no tangent for torch's {name}: {reason}")


def _call(func: Callable, *args: Any, **kwargs: Any) -> Any:
    return Dual.apply(func, args, kwargs)


def _operator(func: Callable) -> Callable:
    # A partial is no method: it would not be bound to the instance.
    return lambda *args: Dual.apply(func, args, {})


def _in_place(name: str) -> Callable:
    return lambda *_: unsupported(name, "operations in place are not carried")


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
    """Makes einops take duals: it finds a backend among the subclasses of its own, by the type of the tensor."""

    framework_name = __name__

    def is_appropriate_type(self, tensor: Any) -> bool:
        return isinstance(tensor, Dual)


_pytree.register_pytree_node(
    Dual,
    lambda value: ([value.primal, value.tangent], value.rule_set),
    lambda parts, rule_set: Dual(*parts, rule_set),  # type: ignore[call-arg, arg-type]
)
