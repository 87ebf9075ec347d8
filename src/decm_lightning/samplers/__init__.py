"""Samplers: functions (student, x_0, condition, steps, generator=None, times=None, ...) that generate samples."""

import inspect
from functools import partial
from typing import Any

from decm_lightning.class_path import imported
from decm_lightning.samplers.consistency import Generators, consistency
from decm_lightning.samplers.euler import euler, flow_map_of
from decm_lightning.samplers.flow_map import flow_map
from decm_lightning.samplers.generation import Sampler, generate
from decm_lightning.samplers.mix import mix
from decm_lightning.samplers.options import read_options

SAMPLERS: dict[str, Sampler] = {"euler": euler, "consistency": consistency, "flow_map": flow_map, "mix": mix}
ARGUMENTS = 4
"""A sampler's first arguments: student, x_0, condition and steps."""


def sampler(name: str | Sampler, **options: Any) -> Sampler:
    """Return a sampler with its options as a function (student, x_0, condition, steps, generator=None).

    Args:
        name: "euler", "consistency", "flow_map" or "mix"; the path of a function, such as "my_module.heun"; the path of
            a class whose instances are samplers and whose arguments are the options; or a function. A name may include
            options, as in "mix?s1=0.6". The module of a path may be in the working directory.
        options: options of the sampler, such as times, shift or s1.

    Raises:
        ImportError: if the module does not exist.
        ValueError: if the sampler is unknown, takes no generator, or does not have an option.
    """
    if isinstance(name, str):
        name, _, query = name.partition("?")
        options = read_options(query, f"{name}?{query}") | options
    function: Any = _resolve(name) if isinstance(name, str) else name
    label = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
    if isinstance(function, type):
        _check_options(label, list(inspect.signature(function).parameters.values()), options)
        function = function(**options)
        _check_generator(label, function)
        return function
    _check_generator(label, function)
    _check_options(label, list(inspect.signature(function).parameters.values())[ARGUMENTS:], options)
    return partial(function, **options)


def _resolve(name: str) -> Any:
    if name in SAMPLERS:
        return SAMPLERS[name]
    if "." not in name:
        raise ValueError(
            f"sampler must be one of {', '.join(SAMPLERS)}, or a path such as my_module.heun: got {name!r}"
        )
    function = imported(name)
    if not callable(function):
        raise ValueError(f"sampler {name} must be a function or a class: got {function!r}")
    return function


def _check_generator(name: str, function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    if not any(p.name == "generator" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"sampler {name} must accept (student, x_0, condition, steps, generator=None): it has no argument generator"
        )


def _check_options(name: str, parameters: list[inspect.Parameter], options: dict[str, Any]) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.name != "generator"]
    for option in options:
        if option not in known:
            raise ValueError(f"sampler {name} has no option {option!r}: its options are {', '.join(known) or 'none'}")


__all__ = ["Generators", "Sampler", "consistency", "euler", "flow_map_of", "generate", "mix", "sampler"]
