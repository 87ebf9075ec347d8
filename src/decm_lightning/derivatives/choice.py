"""Select a derivative engine by running each candidate on meta tensors."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree

from decm_lightning.derivatives.central import central, step_for
from decm_lightning.derivatives.dual import dual
from decm_lightning.derivatives.forward import Engine, Tangent
from decm_lightning.derivatives.functional import functional

EngineName = Literal["dual", "functional", "central"]

ENGINES: dict[EngineName, Engine] = {"dual": dual, "functional": functional, "central": central}
"""In order of preference."""
MERITS: dict[EngineName, str] = {
    "dual": "exact, in one pass, with extra memory for one layer only",
    "functional": "exact, but needs a second pass, with attention on the math kernel",
    "central": "a finite difference in float32 with an error of 1e-4 to 1e-3, needs two more passes",
}


@dataclass(frozen=True)
class Choice:
    """An engine and why it was selected.

    Attributes:
        name: the engine's name.
        engine: the engine.
        reason: one line for the log.
    """

    name: EngineName
    engine: Engine
    reason: str


def choose(network: nn.Module, example: tuple[Any, ...], requested: EngineName | None = None) -> Choice:
    """Return the first engine that supports the network, or the requested engine if it does.

    Each engine runs on the meta device, where tensors have shapes but no values. A network whose code reads values
    cannot run there; its engine is selected without a check.

    Args:
        network: the student, on any device, not yet wrapped or sharded.
        example: x_t, t, s and condition as passed to the network; their values are ignored.
        requested: the engine to use; None for the first that works.

    Raises:
        ValueError: if no engine, or not the requested one, can be used. The message names the operation, its layer, and
            an engine that works.
    """
    failures: dict[EngineName, str] = {}
    for name in (requested, *ENGINES) if requested else ENGINES:
        if name in failures:
            continue
        problem = attempt(name, network, example)
        if problem is None:
            if requested and name != requested:
                raise ValueError(
                    f"derivative {requested} cannot be used: {failures[requested]}. Use {name}: {MERITS[name]}"
                )
            others = "".join(f"; not {other}: {why}" for other, why in failures.items())
            return Choice(name, _with_step(name, network), f"derivative {name}: {MERITS[name]}{others}")
        failures[name] = problem
    raise ValueError(f"no engine can be used: {'; '.join(f'{name}: {why}' for name, why in failures.items())}")


def attempt(name: EngineName, network: nn.Module, example: tuple[Any, ...]) -> str | None:
    """Return why an engine does not support the network, or None if it does."""
    if name == "central" and any(p.is_floating_point() and p.itemsize < 4 for p in network.parameters()):
        return "a finite difference needs weights in float32 or wider"
    try:
        on_meta(ENGINES[name], network, example)
    except NotImplementedError as error:
        return str(error).splitlines()[0]
    except RuntimeError as error:
        # Raised by forward mode. Any other RuntimeError means that the network needs values and cannot run on meta.
        return str(error).splitlines()[0] if "forward AD" in str(error) or "vmap" in str(error) else None
    except Exception as error:  # network code may raise anything for a value that is not a torch.Tensor
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _with_step(name: EngineName, network: nn.Module) -> Engine:
    # Read before the network is wrapped: a wrapper hides the attribute.
    return partial(central, h=step_for(getattr(network, "time_scale", 1.0))) if name == "central" else ENGINES[name]


def on_meta(engine: Engine, network: nn.Module, example: tuple[Any, ...]) -> None:
    """Run an engine on the meta device, on copies of the weights without values."""
    state = {name: value.detach().to("meta") for name, value in network.named_parameters()}
    state |= {name: value.to("meta") for name, value in network.named_buffers()}
    x_t, t, s, condition = _pytree.tree_map_only(Tensor, lambda value: value.to("meta"), example)
    engine(_OnMeta(network, state), x_t, t, s, condition, Tangent(x_t, t, s))


class _OnMeta(nn.Module):
    """The network with other weights; its layers keep their names, which errors report."""

    def __init__(self, network: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        self.run = lambda *args: functional_call(network, state, args)

    def forward(self, *args: Any) -> Any:
        return self.run(*args)
