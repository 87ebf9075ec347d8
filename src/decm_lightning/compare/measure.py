"""Measure what the table of a run lacks: cost, gradient norms, samples, and the error on the triangle of times."""

import re
from argparse import ArgumentError
from functools import cache
from io import BytesIO
from statistics import fmean
from typing import Any, TypeAlias

import torch
from einops import rearrange
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning import LightningDataModule
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
POINTS = 200
"""The largest number of points in a curve."""
KNOWN = ("decm_lightning.", "lightning.", "torch.")
"""Packages whose classes a config may name without being trusted."""
NOT_MEASURED = (ArgumentError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""Errors for which a part of the report is replaced by the reason."""


def gradient_norms(run: Run) -> list[tuple[int, float]]:
    """Return (step, total gradient norm) from TensorBoard's files; of many steps, the largest of each of 200 parts.

    Raises:
        ValueError: if they have none.
    """
    # The import takes a second.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path.parent.parent), size_guidance={"scalars": 0}).Reload()
    if "grad_norm/total" not in events.Tags()["scalars"]:
        raise ValueError(f"{run.path.parent.parent} has no grad_norm/total, which the callback GradientNorms logs")
    points = sorted((each.step, each.value) for each in events.Scalars("grad_norm/total"))
    size = -(-len(points) // POINTS)
    return [max(points[first : first + size], key=lambda p: p[1]) for first in range(0, len(points), size)]


def cost(run: Run) -> Result:
    """Return the forward passes per sample and step (`losses.cost`), the steps of the run, and their product."""
    objective: Objective = _built(run, Objective, run.model.get("objective"))
    # Without a teacher the velocity is x_1 - x_0.
    teacher_passes = _guidance(run).passes if run.model.get("teacher") else 0.0
    passes = cost_of(objective.for_run(run.steps), teacher_passes).total
    return b"", {"passes per step": passes, "steps": run.steps, "product": passes * run.steps}


def samples(run: Run) -> Result:
    """Return a PNG with a row of samples for each of STEPS. The noise and conditions of all runs are the same."""
    generator, name = _generator(run), "student/mix" if run.module.is_student else "teacher/euler"
    images = generator.grid([SamplingSpec.parse(f"{name}/{steps}") for steps in STEPS], COLUMNS).cpu()
    images = torch.nn.functional.pad(images, [-(-images.shape[-1] // GAP)] * 4, value=GRAY)
    file = BytesIO()
    to_pil(rearrange(images, "steps n c h w -> c (steps h) (n w)")).save(file, "PNG")
    return file.getvalue(), {}


def triangle(run: Run) -> Result:
    """Return the heat map of `triangle_error`, and the RMS over its edges."""
    errors = triangle_error(run)
    regions = {
        "data edge": [error for (_, s), error in errors.items() if s == 1],
        "noise edge": [error for (t, _), error in errors.items() if t == 0],
        "diagonal": [error for (t, s), error in errors.items() if s == t],
        "all": list(errors.values()),
    }
    return heat_map(errors), {name: fmean(e * e for e in region) ** 0.5 for name, region in regions.items()}


@torch.no_grad()
def triangle_error(run: Run) -> dict[tuple[float, float], float]:
    """Return the error of a student by (t, s): the RMS of u(x_t, t, s) - (x_s - x_t) / (s - t).

    x_t and x_s are on trajectories of the guided teacher's ODE from the noise of seed 0. On the diagonal, s = t, u is
    compared with the teacher's velocity.

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
    errors = {}
    for i, t in enumerate(times.tolist()[:-1]):
        for j, s in enumerate(times.tolist()[i:], i):
            start, end = at(t, x_0), at(s, x_0)
            truth = (states[j] - states[i]) / (s - t) if j > i else field(states[i], start, condition)
            error = network(states[i], start, end, condition) - truth
            errors[round(t, 4), round(s, 4)] = error.square().mean().sqrt().item()
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
