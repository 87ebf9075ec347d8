"""Measure what the table of a run lacks: cost, gradient norms, samples, and the error on the triangle of times."""

import re
from argparse import ArgumentError
from io import BytesIO
from typing import Any

import torch
from einops import rearrange
from jsonargparse import ArgumentParser, set_parsing_settings
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree
from torchdiffeq import odeint

from decm_lightning import losses, samplers
from decm_lightning.compare.runs import Run
from decm_lightning.data.protocol import EvaluationData, evaluation_data
from decm_lightning.errors import NonFiniteError
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.image_writer import to_pil, to_uint8
from decm_lightning.networks.checkpoint_files import read_file
from decm_lightning.networks.sharded import read_rest
from decm_lightning.samplers.steps import at
from decm_lightning.seeds import generator_of
from decm_lightning.teachers import Teacher
from decm_lightning.types import Condition, Time

STEPS, COLUMNS, GRAY, GAP = (1, 2, 4), 10, 128, 16
"""Steps and samples of a grid, the color between its samples, and the width of a sample divided by that of a gap."""
TIMES, ROWS, STEP = 11, 32, 0.025
"""Times on each side of the triangle, the teacher's trajectories, and the step of their Runge-Kutta solver."""
POINTS = 200
"""The largest number of points in a curve."""
KNOWN = ("decm_lightning.", "lightning.", "torch.")
"""Packages whose classes a config may name without being trusted."""
NOT_MEASURED = (ArgumentError, ImportError, LookupError, NonFiniteError, OSError, TypeError, ValueError)
"""Errors for which a part of the report is replaced by the reason."""


def cost(run: Run) -> dict[str, float]:
    """Return the forward passes per sample and step (`losses.cost`), the steps of the run, and their product."""
    steps = run.steps or int((read_rest if run.path.is_dir() else read_file)(run.path)["global_step"])
    objective: losses.Objective = _built(run, losses.Objective, run.model.get("objective"))
    # Without a teacher the velocity is x_1 - x_0.
    teacher_passes = _guidance(run).passes if run.model.get("teacher") else 0.0
    passes = losses.cost(objective.for_run(steps), teacher_passes).total
    return {"passes per step": passes, "steps": steps, "product": passes * steps}


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


def samples(run: Run) -> bytes:
    """Return a PNG with a row of samples for each of STEPS. The noise and conditions of all runs are the same."""
    data, shape = _data(run), run.network.sample_shape
    rows = range(min(COLUMNS, data.num_classes or COLUMNS))
    method = samplers.sampler("mix" if run.network.reads_end_time else "euler")
    given: dict[str, Any] = {"shape": shape, "rows": rows, "device": run.device}
    grid = [samplers.generate(run.network, method, _condition(run, data, rows), n, **given) for n in STEPS]
    images = torch.stack([to_uint8(data.decode(x)).cpu() for x in grid])
    images = pad(images, [-(-images.shape[-1] // GAP)] * 4, value=GRAY)
    buffer = BytesIO()
    to_pil(rearrange(images, "steps n c h w -> c (steps h) (n w)")).save(buffer, "PNG")
    return buffer.getvalue()


@torch.no_grad()
def triangle_error(run: Run) -> dict[tuple[float, float], float]:
    """Return the error of a student by (t, s): the RMS of u(x_t, t, s) - (x_s - x_t) / (s - t).

    x_t and x_s are on trajectories of the guided teacher's ODE from the noise of seed 0. On the diagonal, s = t, u is
    compared with the teacher's velocity.

    Raises:
        ValueError: if the run has no teacher.
    """
    teacher: Teacher = _built(run, Teacher, run.model.get("teacher"))
    teacher.apply(lambda weight: weight.to(run.device))
    field, condition = GuidedField(teacher, teacher.null, _guidance(run)), _condition(run, _data(run), range(ROWS))
    noise = [torch.randn(run.network.sample_shape, generator=generator_of(0, row)) for row in range(ROWS)]
    x_0, times = torch.stack(noise).to(run.device), torch.linspace(0, 1, TIMES)

    def velocity(t: Time, x: Tensor) -> Tensor:
        return field(x, t.expand(len(x)), condition)

    states = odeint(velocity, x_0, times.to(x_0), method="rk4", options={"step_size": STEP})
    errors = {}
    for i, t in enumerate(times.tolist()[:-1]):
        for j, s in enumerate(times.tolist()[i:], i):
            start, end = at(t, x_0), at(s, x_0)
            truth = (states[j] - states[i]) / (s - t) if j > i else velocity(start, states[i])
            u = run.network(states[i], start, end, condition)
            errors[round(t, 4), round(s, 4)] = (u - truth).square().mean().sqrt().item()
    return errors


def _guidance(run: Run) -> Guidance:
    return Guidance(**run.model.get("guidance") or {})


def _data(run: Run) -> EvaluationData:
    """Return the conditions and the decoder of samples. Only captions and latents need the run's data module."""
    if run.network.num_classes and run.network.sample_shape[0] in (1, 3):
        return EvaluationData(run.network.num_classes)
    # The import takes seconds.
    from lightning import LightningDataModule

    data = _built(run, LightningDataModule, run.config.get("data"))
    data.prepare_data()
    data.setup("test")
    return evaluation_data(data)


def _condition(run: Run, data: EvaluationData, rows: range) -> Condition:
    found = data.condition(rows, 0) if data.condition else torch.tensor(rows) % data.num_classes
    return _pytree.tree_map_only(Tensor, lambda part: part.to(run.device), found)


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
    set_parsing_settings(subclasses_enabled=[losses.Objective])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--built", type=kind)
    return parser.instantiate(parser.parse_object({"built": config})).built
