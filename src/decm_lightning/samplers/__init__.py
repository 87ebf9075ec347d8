"""Samplers: plain functions from (student, noise, condition, steps) to samples."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from decm_lightning.samplers.consistency import Generators, consistency
from decm_lightning.samplers.euler import euler, flow_map_of
from decm_lightning.samplers.mix import mix, mix_renoised
from decm_lightning.types import Sample

SamplerName = Literal["euler", "consistency", "mix", "mix_renoised"]
NOISELESS: dict[str, Callable[..., Sample]] = {"euler": euler, "mix": mix}
RENOISING: dict[str, Callable[..., Sample]] = {"consistency": consistency, "mix_renoised": mix_renoised}


def sampler(name: SamplerName, generator: Generators | None = None, **options: object) -> Callable[..., Sample]:
    """Return the named sampler as a function of (student, x_0, condition, steps).

    Args:
        name: "euler", "consistency", "mix" or "mix_renoised".
        generator: the source of noise for the samplers that put noise back: one, or one for each row of a batch.
        options: the sampler's own, such as s1 or times.

    Raises:
        ValueError: if there is no such sampler.
    """
    if name in NOISELESS:
        return partial(NOISELESS[name], **options)
    if name in RENOISING:
        return partial(RENOISING[name], generator=generator, **options)
    raise ValueError(f"sampler must be one of {', '.join(NOISELESS | RENOISING)}: got {name!r}")


__all__ = ["SamplerName", "consistency", "euler", "flow_map_of", "mix", "mix_renoised", "sampler"]
