"""The flow-map sampler, which follows the flow map from time to time, in the interior of the triangle."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from decm_lightning.path import DATA, NOISE
from decm_lightning.samplers.consistency import Generators
from decm_lightning.samplers.euler import euler_times
from decm_lightning.samplers.steps import flow_map_step
from decm_lightning.types import Condition, FlowMapNetwork, Sample


@torch.no_grad()
def flow_map(
    student: FlowMapNetwork,
    x_0: Sample,
    condition: Condition,
    steps: int,
    generator: Generators | None = None,
    times: Sequence[float] | None = None,
    *,
    shift: float = 1.0,
) -> Sample:
    """Generate samples by jumps of the flow map from each time to the next.

        x_s = x_t + (s - t) u(x_t, t, s)

    MeanFlow (arXiv 2505.13447), shortcut models (arXiv 2410.12557) and AYF without added noise (arXiv 2506.14603)
    sample in this way. A student needs training on pairs (t, s) in the interior of the triangle, which DE-CM leaves
    out. The exact flow map gives exact samples at any number of steps:

    >>> from decm_lightning.flows import Gaussian
    >>> x_0 = torch.tensor([[-1.0], [0.0], [1.0]])
    >>> flow_map(Gaussian(mean=3.0, std=0.5), x_0, None, steps=3).flatten()  # exact: 3 + x_0 / 2
    tensor([2.5000, 3.0000, 3.5000])

    Args:
        student: the network u(x_t, t, s).
        x_0: noise, (b, *d).
        condition: class labels or captions, one per row, or None.
        steps: network evaluations, at least 1.
        generator: ignored, because no noise is added.
        times: the steps - 1 times between jumps, increasing in (0, 1); None for k / steps, changed by `shift`.
        shift: above 0; 1 keeps the default times, see `steps.shifted`.

    Raises:
        ValueError: if steps, times or shift is out of its range, or times and shift are both passed.
    """
    x = x_0
    for t, s in pairwise([NOISE, *euler_times(steps, times, shift=shift), DATA]):
        x = flow_map_step(student, x, t, s, condition)
    return x
