"""Samplers: plain functions from (student, noise, condition, steps) to samples."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from decm_lightning.samplers.consistency import Generators, consistency
from decm_lightning.samplers.euler import euler, flow_map_of
from decm_lightning.samplers.generation import generate
from decm_lightning.samplers.mix import mix
from decm_lightning.types import Sample

SamplerName = Literal["euler", "consistency", "mix"]
SAMPLERS: dict[str, Callable[..., Sample]] = {"euler": euler, "consistency": consistency, "mix": mix}


def sampler(name: SamplerName, **options: object) -> Callable[..., Sample]:
    """Return the named sampler as a function of (student, x_0, condition, steps, generator=None).

    Args:
        name: "euler", "consistency" or "mix".
        options: the sampler's own, such as s1 or times.

    Raises:
        ValueError: if there is no such sampler.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}: got {name!r}")
    return partial(SAMPLERS[name], **options)


__all__ = ["Generators", "SamplerName", "consistency", "euler", "flow_map_of", "generate", "mix", "sampler"]
