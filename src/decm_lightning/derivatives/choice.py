"""Which engine a network can have, found by trying each on shapes alone, with no data and no arithmetic."""

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
"""In the order of preference."""
MERITS: dict[EngineName, str] = {
    "dual": "exact, one pass, no memory beyond the layer at work",
    "functional": "exact, but a second pass, with attention on the math kernel",
    "central": "a difference in float32, off by 1e-4 to 1e-3, and two more passes",
}


@dataclass(frozen=True)
class Choice:
    """An engine and why it was taken.

    Attributes:
        name: the engine's name.
        engine: the engine.
        reason: one line for the log.
    """

    name: EngineName
    engine: Engine
    reason: str


def choose(network: nn.Module, example: tuple[Any, ...], wanted: EngineName | None = None) -> Choice:
    """Return the first engine that can pass through the network, or the wanted one if it can.

    Each is run on the meta device, where tensors have shapes and no numbers. A network whose code looks at numbers
    cannot be tried so; then the engine is taken on trust.

    Args:
        network: the student, on any device, not yet wrapped or sharded.
        example: x_t, t, s and condition as the network takes them; their values do not matter.
        wanted: the engine to use; None for the best.

    Raises:
        ValueError: if no engine, or not the wanted one, can be used: it names the operation, its layer, and an engine
            that can.
    """
    failures: dict[EngineName, str] = {}
    for name in (wanted, *ENGINES) if wanted else ENGINES:
        if name in failures:
            continue
        problem = attempt(name, network, example)
        if problem is None:
            if wanted and name != wanted:
                raise ValueError(f"derivative {wanted} cannot be used: {failures[wanted]}. {name} can: {MERITS[name]}")
            others = "".join(f"; not {other}: {why}" for other, why in failures.items())
            return Choice(name, _fitted(name, network), f"derivative {name}: {MERITS[name]}{others}")
        failures[name] = problem
    raise ValueError(f"no engine can be used: {'; '.join(f'{name}: {why}' for name, why in failures.items())}")


def attempt(name: EngineName, network: nn.Module, example: tuple[Any, ...]) -> str | None:
    """Return why an engine cannot pass through the network, or None."""
    if name == "central" and any(p.is_floating_point() and p.itemsize < 4 for p in network.parameters()):
        return "a difference needs weights of float32 or wider"
    try:
        on_meta(ENGINES[name], network, example)
    except NotImplementedError as error:
        return str(error).splitlines()[0]
    except RuntimeError as error:
        # Forward mode's own complaint; anything else is a network that cannot be run without numbers.
        return str(error).splitlines()[0] if "forward AD" in str(error) or "vmap" in str(error) else None
    except Exception as error:  # whatever the network's code says of a value that is no torch.Tensor
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _fitted(name: EngineName, network: nn.Module) -> Engine:
    # Asked here, since a wrapper would hide it.
    return partial(central, h=step_for(getattr(network, "time_scale", 1.0))) if name == "central" else ENGINES[name]


def on_meta(engine: Engine, network: nn.Module, example: tuple[Any, ...]) -> None:
    """Run an engine with everything on the meta device; the network itself is not touched."""
    state = {name: value.detach().to("meta") for name, value in network.named_parameters()}
    state |= {name: value.to("meta") for name, value in network.named_buffers()}
    x_t, t, s, condition = _pytree.tree_map_only(Tensor, lambda value: value.to("meta"), example)
    engine(_OnMeta(network, state), x_t, t, s, condition, Tangent(x_t, t, s))


class _OnMeta(nn.Module):
    """The network with other weights in place of its own, its layers under their own names."""

    def __init__(self, network: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        self.run = lambda *args: functional_call(network, state, args)

    def forward(self, *args: Any) -> Any:
        return self.run(*args)
