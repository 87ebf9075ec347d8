"""Generate sample number i of a seed, in the same way for every command and callback."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from decm_lightning.samplers.consistency import Generators
from decm_lightning.seeds import generator_of
from decm_lightning.types import Condition, FlowMapNetwork, Sample


@runtime_checkable
class Sampler(Protocol):
    """A function from noise to samples, such as `samplers.mix`. Further arguments are options with defaults."""

    def __call__(
        self,
        student: FlowMapNetwork,
        x_0: Sample,
        condition: Condition,
        /,
        steps: int,
        generator: Generators | None = None,
    ) -> Sample:
        """Return samples, shaped like x_0, by `steps` evaluations of the student; added noise is from `generator`."""


@torch.no_grad()
def generate(
    student: FlowMapNetwork,
    sampler: Sampler,
    condition: Condition,
    steps: int,
    *,
    shape: Sequence[int],
    rows: Sequence[int],
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Sample:
    """Generate the samples of a seed with the numbers `rows`, (len(rows), *shape).

    All noise of sample i, both x_0 and noise that the sampler adds, comes from `seeds.generator_of(seed, i)`. A sample
    depends on the seed, its number and its condition, but not on the batch, the device or the number of processes.

    Args:
        student: the network u(x_t, t, s).
        sampler: such as `samplers.mix`; its `generator` is a list with one generator per row.
        condition: one row per sample, on `device`; or None.
        steps: network evaluations per sample, at least 1.
        shape: the shape of one sample.
        rows: the numbers of the samples, at least one.
        seed: from 0 to 2**63 - 1.
        device: the student's device.
        dtype: dtype of the samples.
    """
    generators = [generator_of(seed, row) for row in rows]
    wide = torch.promote_types(dtype, torch.float32)
    x_0 = torch.stack([torch.randn(tuple(shape), generator=generator, dtype=wide) for generator in generators])
    return sampler(student, x_0.to(device, dtype), condition, steps, generator=generators)
