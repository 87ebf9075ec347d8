"""Generate the samples of a spec once, and pass them to everything that measures them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from decm_lightning.evaluation.baselines import Baselines
from decm_lightning.evaluation.cost import SamplingCost
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.metrics import FeatureMetrics
from decm_lightning.metrics.metric import Prompts
from decm_lightning.progress import Progress


@dataclass
class Measured:
    """The results of a spec: values by column, the cost of a sample, and the first samples."""

    values: dict[str, float]
    cost: SamplingCost
    first: UInt8[Tensor, "columns c h w"]


def measure(
    generator: SampleGenerator,
    qualities: Sequence[FeatureMetrics],
    baselines: Baselines,
    spec: SamplingSpec,
    parts: Sequence[range],
    columns: int,
    bar: Progress,
) -> Measured:
    """Return the results of a spec.

    `parts` are the numbers of the samples of this process, by batch. `columns` is the number of first samples to
    return, over all processes.
    """
    needs_prompts = any(quality.needs_prompts for quality in qualities)
    cost, first = SamplingCost(len(parts[0]) or 1), torch.empty(0)
    for quality in qualities:
        quality.reset_generated()
    for rows in parts:
        with ExitStack() as recording:
            if rows is parts[0]:
                recording.enter_context(cost.record(generator.source))
            x = generator.samples(spec, rows or range(1))
        images = generator.images(x)[: len(rows)]
        if rows is parts[0]:
            # Each process fills in its own samples, and the sum over processes has all of them.
            first = images.new_zeros(columns, *images.shape[1:])
        first[rows.start : rows.stop] = images[: max(columns - rows.start, 0)]
        prompts = generator.prompts(rows) if needs_prompts else Prompts()
        views = {quality: quality.update(images, real=False, prompts=prompts) for quality in qualities}
        baselines.add(spec, rows, x, views)
        bar.update(len(rows))
    values = {name: value for quality in qualities for name, value in quality.compute().items()}
    return Measured(values | baselines.columns(), cost, first)
