"""Measure what the table of a run lacks: cost, gradient norms, samples, and the error on the triangle of times."""

from argparse import ArgumentError
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import torch
from einops import rearrange
from jsonargparse import ArgumentParser, set_parsing_settings
from torch import Tensor
from torch.utils import _pytree
from torchdiffeq import odeint

from decm_lightning import samplers
from decm_lightning.compare.runs import Run
from decm_lightning.data.protocol import EvaluationData, evaluation_data
from decm_lightning.errors import NonFiniteError
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.image_writer import to_pil, to_uint8
from decm_lightning.losses import Objective, cost
from decm_lightning.networks import Network, load
from decm_lightning.networks.checkpoint_files import read_file
from decm_lightning.networks.sharded import read_rest
from decm_lightning.samplers.steps import at
from decm_lightning.seeds import generator_of
from decm_lightning.teachers import Teacher
from decm_lightning.types import Condition, Time

STEPS, COLUMNS = (1, 2, 4), 10
"""Steps and samples of a grid."""
TIMES = 11
"""Times on each side of the triangle: 0, 0.1, ..., 1."""
ROWS, STEP = 32, 0.02
"""Trajectories of the teacher over which an error is averaged, and the step of their Runge-Kutta solver."""
POINTS = 200
"""The largest number of points in a curve."""
KNOWN = ("decm_lightning.", "lightning.", "torch.")
"""Packages whose classes a config may name without being trusted."""
NOT_MEASURED = (ArgumentError, ImportError, LookupError, NonFiniteError, OSError, TypeError, ValueError)
"""Errors for which a part of the report is replaced by the reason."""


@dataclass
class Student:
    """The trained network of a run, with what the run's config builds.

    Args:
        run: the run.
        device: the device of the network and of its teacher.
        trust: import classes from outside `KNOWN`, which runs their code.
    """

    run: Run
    device: str = "cpu"
    trust: bool = False

    @cached_property
    def network(self) -> Network:
        """The averaged network in eval mode."""
        return load(self.run.network, self.device, self.trust)

    @cached_property
    def data(self) -> EvaluationData:
        """The conditions and the decoder of the samples. Only captions and latents need the run's data module."""
        if self.network.num_classes and self.network.sample_shape[0] in (1, 3):
            return EvaluationData(self.network.num_classes)
        # The import takes seconds.
        from lightning import LightningDataModule

        data = self.built(LightningDataModule, self.run.config.get("data"))
        data.prepare_data()
        data.setup("test")
        return evaluation_data(data)

    @property
    def guidance(self) -> Guidance:
        """The guidance of the teacher."""
        given = self.run.model.get("guidance") or {}
        return Guidance(**given | {"interval": tuple(given.get("interval", Guidance.interval))})

    def condition(self, rows: range) -> Condition:
        """Return the conditions of samples `rows`, as in `decm test`."""
        found = self.data.condition(rows, 0) if self.data.condition else torch.tensor(rows) % self.data.num_classes
        return _pytree.tree_map_only(Tensor, lambda part: part.to(self.device), found)

    def built(self, kind: Any, config: Any) -> Any:
        """Build an object of the run's config.

        Raises:
            ValueError: if there is no config, or it names a class outside `KNOWN` and is not trusted.
        """
        if not config:
            raise ValueError(f"its config has no {kind.__name__}")
        foreign = [name for name in _classes(config) if not name.startswith(KNOWN)]
        if foreign and not self.trust:
            raise ValueError(f"its config names {foreign[0]}: pass --trust true if you trust it")
        set_parsing_settings(subclasses_enabled=[Objective])
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--built", type=kind)
        return parser.instantiate(parser.parse_object({"built": config})).built


def steps_of(run: Run) -> int:
    """Return the training steps of the tested weights."""
    return run.steps or int((read_rest if run.network.is_dir() else read_file)(run.network)["global_step"])


def cost_of(student: Student) -> float:
    """Return the forward passes per sample and step of a run's objective, see `losses.cost`."""
    objective = student.built(Objective, student.run.model.get("objective")).for_run(steps_of(student.run))
    # Without a teacher the velocity is x_1 - x_0.
    return cost(objective, student.guidance.passes if student.run.model.get("teacher") else 0.0).total


def gradient_norms(run: Run) -> list[tuple[float, float]]:
    """Return (step, total gradient norm) from TensorBoard's files; of many steps, the largest of each of 200 parts.

    Raises:
        ValueError: if they have none.
    """
    # The import takes a second.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.events), size_guidance={"scalars": 0}).Reload()
    if "grad_norm/total" not in events.Tags()["scalars"]:
        raise ValueError(f"{run.events} has no grad_norm/total, which the callback GradientNorms logs")
    points = sorted((float(each.step), float(each.value)) for each in events.Scalars("grad_norm/total"))
    size = -(-len(points) // POINTS)
    return [max(points[first : first + size], key=lambda p: p[1]) for first in range(0, len(points), size)]


def samples(student: Student) -> bytes:
    """Return a PNG with a row of samples for each of STEPS. The noise and conditions of all runs are the same."""
    network = student.network
    rows = range(min(COLUMNS, student.data.num_classes or COLUMNS))
    method = samplers.sampler("mix" if network.reads_end_time else "euler")
    condition, shape, device = student.condition(rows), network.sample_shape, student.device
    grid = [samplers.generate(network, method, condition, n, shape=shape, rows=rows, device=device) for n in STEPS]
    images = torch.stack([to_uint8(student.data.decode(x)).cpu() for x in grid])
    buffer = BytesIO()
    to_pil(rearrange(images, "steps n c h w -> c (steps h) (n w)")).save(buffer, "PNG")
    return buffer.getvalue()


@torch.no_grad()
def triangle_error(student: Student) -> dict[tuple[float, float], float]:
    """Return the error of a student by (t, s): the RMS of u(x_t, t, s) - (x_s - x_t) / (s - t).

    x_t and x_s are on trajectories of the guided teacher's ODE from the noise of seed 0. On the diagonal, s = t, u is
    compared with the teacher's velocity.

    Raises:
        ValueError: if the run has no teacher.
    """
    teacher: Teacher = student.built(Teacher, student.run.model.get("teacher"))
    teacher.apply(lambda weight: weight.to(student.device))
    field, condition = GuidedField(teacher, teacher.null, student.guidance), student.condition(range(ROWS))
    shape, times = student.network.sample_shape, torch.linspace(0, 1, TIMES)
    x_0 = torch.stack([torch.randn(shape, generator=generator_of(0, row)) for row in range(ROWS)]).to(student.device)

    def velocity(t: Time, x: Tensor) -> Tensor:
        return field(x, t.expand(len(x)), condition)

    states = odeint(velocity, x_0, times.to(x_0), method="rk4", options={"step_size": STEP})
    errors = {}
    for i, t in enumerate(times.tolist()[:-1]):
        for j, s in enumerate(times.tolist()[i:], i):
            x_t = states[i]
            truth = (states[j] - x_t) / (s - t) if j > i else velocity(at(t, x_t), x_t)
            u = student.network(x_t, at(t, x_t), at(s, x_t), condition)
            errors[round(t, 4), round(s, 4)] = (u - truth).square().mean().sqrt().item()
    return errors


def _classes(config: Any) -> Iterator[str]:
    """Yield the classes and functions that a config names."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, dict):
        yield from [config["class_path"]] if "class_path" in config else []
        for value in config.values():
            yield from _classes(value) if isinstance(value, dict | list) else ()
    elif isinstance(config, list):
        for value in config:
            yield from _classes(value) if isinstance(value, dict | list) else ()
