"""The consistency sampler: jump to data, add noise, jump again, on the data edge of the triangle."""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from decm_lightning.path import DATA, NOISE, interpolate
from decm_lightning.samplers.steps import at, check_shift, check_steps, check_times, flow_map_step, shifted
from decm_lightning.types import Condition, FlowMapNetwork, Sample

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]
"""The source of noise for a batch: one generator for all rows, or one per row to make rows independent."""


@torch.no_grad()
def consistency(
    student: FlowMapNetwork,
    x_0: Sample,
    condition: Condition,
    steps: int,
    generator: Generators | None = None,
    times: Sequence[float] | None = None,
    *,
    shift: float = 1.0,
) -> Sample:
    """Generate samples by multistep consistency sampling (arXiv 2303.01469, Algorithm 1) on the straight path.

        x_hat = f(x_t, t, 1),  x_t' = (1 - t') noise + t' x_hat,  t = 0 first, then each t' in `times`

    The default times are late: 0.7 + 0.3 (k - 1) / (steps - 1) for k = 1 .. steps - 1. With a uniform grid over [0, 1]
    samples get worse with more steps.

    >>> from decm_lightning.flows import Gaussian
    >>> generator = torch.Generator().manual_seed(0)
    >>> x_0 = torch.randn(10_000, 1, generator=generator)
    >>> x_1 = consistency(Gaussian(mean=3.0, std=0.5), x_0, None, steps=4, generator=generator)
    >>> print(f"mean {x_1.mean():.1f}, standard deviation {x_1.std():.1f}")
    mean 3.0, standard deviation 0.5

    Args:
        student: the network u(x_t, t, s).
        x_0: noise, (b, *d).
        condition: class labels or captions, one per row, or None.
        steps: network evaluations, at least 1.
        generator: the source of added noise, one for all rows or one per row; None for torch's global generator.
        times: the steps - 1 times at which jumps after the first start, increasing in (0, 1); None for the default
            times, changed by `shift`.
        shift: above 0; 1 keeps the default times, see `steps.shifted`.

    Raises:
        ValueError: if steps, times or shift is out of its range, or times and shift are both passed.
    """
    times = consistency_times(steps, times, shift=shift)
    x_hat = flow_map_step(student, x_0, NOISE, DATA, condition)
    for time in times:
        x_hat = flow_map_step(student, renoise(x_hat, time, generator), time, DATA, condition)
    return x_hat


def consistency_times(steps: int, times: Sequence[float] | None = None, *, shift: float = 1.0) -> list[float]:
    """Return the steps - 1 start times of `consistency` after the first; it documents the arguments and errors."""
    check_steps(steps)
    check_shift(shift)
    if times is None:
        return [shifted(0.7 + 0.3 * k / (steps - 1), shift) for k in range(steps - 1)]
    return check_times(times, steps, shift=shift == 1)


def renoise(x_hat: Sample, time: float, generator: Generators | None) -> Sample:
    """Return (1 - t) noise + t x_hat with fresh noise."""
    if isinstance(generator, Sequence):
        rows = zip(x_hat, generator, strict=True)
        noise = torch.stack([torch.randn(x.shape, generator=g, dtype=x.dtype, device=g.device) for x, g in rows])
    else:
        noise = torch.randn(x_hat.shape, generator=generator, dtype=x_hat.dtype, device=x_hat.device)
    noise = noise.to(x_hat.device)
    return interpolate(noise, x_hat, at(time, x_hat))
