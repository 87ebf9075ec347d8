"""Measure what the table of a run lacks: cost, gradient norms, samples, and the error on the triangle of times."""

import re
from argparse import ArgumentError
from functools import cache
from io import BytesIO
from itertools import combinations_with_replacement
from typing import Any, TypeAlias

import torch
from einops import rearrange
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning import LightningDataModule
from torch import Tensor
from torchdiffeq import odeint

from decm_lightning.compare.page import heat_map
from decm_lightning.compare.runs import Run
from decm_lightning.evaluation import SampleGenerator, SamplingSpec
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.image_writer import to_pil
from decm_lightning.losses import Objective
from decm_lightning.losses import cost as cost_of
from decm_lightning.samplers.steps import at
from decm_lightning.seeds import generator_of
from decm_lightning.teachers import Teacher

Result: TypeAlias = tuple[bytes, dict[str, float]]
"""A figure, or b"" for none, and values by name."""
STEPS, COLUMNS, GRAY, GAP = (1, 2, 4), 10, 128, 16
"""Steps and samples of a grid, the color between its samples, and the width of a sample divided by that of a gap."""
TIMES, ROWS, STEP = 11, 32, 0.025
"""Times on each side of the triangle, the teacher's trajectories, and the step of their Runge-Kutta solver."""
KNOWN = ("decm_lightning.", "lightning.", "torch.")
"""Packages whose classes a config may name without being trusted."""
NOT_MEASURED = (ArgumentError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""Errors for which a part of the report is replaced by the reason."""


def gradient_norms(run: Run) -> list[tuple[int, float]]:
    """Return (step, total gradient norm) from TensorBoard's files.

    Raises:
        ValueError: if they have none.
    """
    # The import takes a second.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path.parent.parent), size_guidance={"scalars": 0}).Reload()
    if "grad_norm/total" not in events.Tags()["scalars"]:
        raise ValueError(f"{run.path.parent.parent} has no grad_norm/total, which the callback GradientNorms logs")
    return sorted((each.step, each.value) for each in events.Scalars("grad_norm/total"))


def cost(run: Run) -> Result:
    """Return the forward passes per sample and step (`losses.cost`), the steps of the run, and their product."""
    record, objective = run.module.average.record, _built(run, Objective, run.model.get("objective"))
    steps = record.steps if record else run.config["trainer"]["max_steps"]
    # Without a teacher the velocity is x_1 - x_0.
    passes = cost_of(objective.for_run(steps), _guidance(run).passes if run.model.get("teacher") else 0.0).total
    return b"", {"passes per step": passes, "steps": steps, "product": passes * steps}


def samples(run: Run) -> Result:
    """Return a PNG with a row of samples for each of STEPS. The noise and conditions of all runs are the same."""
    generator, name = _generator(run), "student/mix" if run.module.is_student else "teacher/euler"
    images = generator.grid([SamplingSpec.parse(f"{name}/{steps}") for steps in STEPS], COLUMNS).cpu()
    images = torch.nn.functional.pad(images, [-(-images.shape[-1] // GAP)] * 4, value=GRAY)
    file = BytesIO()
    to_pil(rearrange(images, "steps n c h w -> c (steps h) (n w)")).save(file, "PNG")
    return file.getvalue(), {}


def error_on_the_triangle(run: Run) -> Result:
    """Return the heat map of `triangle_error`, and the RMS over its edges."""
    errors = triangle_error(run)
    regions = {"data edge": errors[:, -1], "noise edge": errors[0], "diagonal": errors.diagonal(), "all": errors}
    return heat_map(errors), {name: region.square().nanmean().sqrt().item() for name, region in regions.items()}


@torch.no_grad()
def triangle_error(run: Run) -> Tensor:
    """Return the error of a student by t and s, (TIMES, TIMES): the RMS of u(x_t, t, s) - (x_s - x_t) / (s - t).

    It is NaN for s < t and for t = 1. x_t and x_s are on trajectories of the guided teacher's ODE from the noise of
    seed 0. On the diagonal, s = t, u is compared with the teacher's velocity.

    Raises:
        ValueError: if the run has no teacher.
    """
    teacher: Teacher = _built(run, Teacher, run.model.get("teacher"))
    teacher.apply(lambda weight: weight.to(run.module.device))
    field, condition = GuidedField(teacher, teacher.null, _guidance(run)), _generator(run).condition(range(ROWS))
    network = run.module.average
    noise = [torch.randn(network.sample_shape, generator=generator_of(0, row)) for row in range(ROWS)]
    x_0, times = torch.stack(noise).to(run.module.device), torch.linspace(0, 1, TIMES)
    states = odeint(
        lambda t, x: field(x, t.expand(len(x)), condition),
        x_0,
        times.to(x_0),
        method="rk4",
        options={"step_size": STEP},
    )
    errors = torch.full((TIMES, TIMES), torch.nan)
    for i, j in combinations_with_replacement(range(TIMES), 2):
        start, end = at(times[i].item(), x_0), at(times[j].item(), x_0)
        if i < TIMES - 1:
            truth = (states[j] - states[i]) / (times[j] - times[i]) if i < j else field(states[i], start, condition)
            errors[i, j] = (network(states[i], start, end, condition) - truth).square().mean().sqrt()
    return errors


def _guidance(run: Run) -> Guidance:
    return Guidance(**run.model.get("guidance") or {})


@cache
def _generator(run: Run) -> SampleGenerator:
    """Return the generator of the run's samples, with the conditions and the decoder of its data."""
    data: LightningDataModule = _built(run, LightningDataModule, run.config.get("data"))
    data.prepare_data()
    data.setup("test")
    return SampleGenerator(run.module, data)


def _built(run: Run, kind: Any, config: Any) -> Any:
    """Build an object of the run's config.

    Raises:
        ValueError: if there is no config, or it names a class outside `KNOWN` and is not trusted.
    """
    if not config:
        raise ValueError(f"its config has no {kind.__name__}")
    foreign = [name for name in re.findall(r"'class_path': '(.*?)'", repr(config)) if not name.startswith(KNOWN)]
    if foreign and not run.trust:
        raise ValueError(f"its config names {foreign[0]}: pass --trust true if you trust it")
    set_parsing_settings(subclasses_enabled=[Objective])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--built", type=kind)
    return parser.instantiate(parser.parse_object({"built": config})).built
