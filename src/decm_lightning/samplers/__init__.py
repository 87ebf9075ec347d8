"""Samplers: functions (student, x_0, condition, steps, generator=None, times=None, ...) that return samples."""

import inspect
from functools import partial
from typing import Any

from decm_lightning.class_path import imported
from decm_lightning.samplers.consistency import Generators, consistency
from decm_lightning.samplers.euler import euler, flow_map_of
from decm_lightning.samplers.generation import Sampler, generate
from decm_lightning.samplers.mix import mix
from decm_lightning.samplers.options import read_options

SAMPLERS: dict[str, Sampler] = {"euler": euler, "consistency": consistency, "mix": mix}
ARGUMENTS = 4
"""A sampler's first arguments: student, x_0, condition and steps."""


def sampler(name: str | Sampler, **options: Any) -> Sampler:
    """Return a sampler with options as a function of (student, x_0, condition, steps, generator=None).

    Args:
        name: "euler", "consistency" or "mix"; the path of a function such as "my_module.heun", or of a class whose
            instances are samplers and whose arguments are the options; or the function itself. Options may follow a
            name as text, as in "mix?s1=0.6". The module of a path may be in the working directory.
        options: the sampler's own, such as times, shift or s1.

    Raises:
        ImportError: if there is no such module.
        ValueError: if there is no such sampler, it takes no generator, or has no such option.
    """
    if isinstance(name, str):
        name, _, query = name.partition("?")
        options = read_options(query, f"{name}?{query}") | options
    found: Any = _found(name) if isinstance(name, str) else name
    label = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
    if isinstance(found, type):
        _check_options(label, list(inspect.signature(found).parameters.values()), options)
        found = found(**options)
        _check_generator(label, found)
        return found
    _check_generator(label, found)
    _check_options(label, list(inspect.signature(found).parameters.values())[ARGUMENTS:], options)
    return partial(found, **options)


def _found(name: str) -> Any:
    if name in SAMPLERS:
        return SAMPLERS[name]
    if "." not in name:
        raise ValueError(
            f"sampler must be one of {', '.join(SAMPLERS)}, or a path such as my_module.heun: got {name!r}"
        )
    found = imported(name)
    if not callable(found):
        raise ValueError(f"sampler {name} must be a function or a class: got {found!r}")
    return found


def _check_generator(name: str, function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    if not any(p.name == "generator" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"sampler {name} must take (student, x_0, condition, steps, generator=None): it has no generator"
        )


def _check_options(name: str, parameters: list[inspect.Parameter], options: dict[str, Any]) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.name != "generator"]
    for option in options:
        if option not in known:
            raise ValueError(f"sampler {name} has no option {option!r}: its options are {', '.join(known) or 'none'}")


__all__ = ["Generators", "Sampler", "consistency", "euler", "flow_map_of", "generate", "mix", "sampler"]
