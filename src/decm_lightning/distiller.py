"""Dual-End Consistency Models (arXiv 2602.10764): a fast student from a slow teacher."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils import _pytree

from decm_lightning import path
from decm_lightning.derivatives import (
    ENGINES,
    Engine,
    EngineName,
    Jump,
    NoTangentError,
    check_fused,
    choose,
    dual,
    forward_with_jvp,
    functional,
)
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.losses import DualEndLoss, Objective, cost, end_identity, tangent
from decm_lightning.losses.rows import Rows
from decm_lightning.networks import Network
from decm_lightning.samplers import flow_map_of
from decm_lightning.teachers import Teacher
from decm_lightning.training.flow_training import FlowTraining
from decm_lightning.types import Batch, Condition, FlowMapNetwork, Sample, Time


@dataclass(frozen=True)
class PathSample:
    """Where a batch's jumps may start: noise x_0, data x_1, and the point x_t between them at time t.

    v_t is the teacher's velocity v(x_t, t), None if no loss needs it. Times are on the CPU: which of them are
    guided, and how many, is known there without waiting for the device.
    """

    x_0: Sample
    x_1: Sample
    condition: Condition
    t: Time
    x_t: Sample
    v_t: Sample | None = None

    def select(self, rows: Rows) -> "PathSample":
        """Return some of the rows, without a velocity."""
        return PathSample(
            rows.of(self.x_0),
            rows.of(self.x_1),
            rows.of_condition(self.condition),
            rows.of(self.t),
            rows.of(self.x_t),
        )


class Distiller(FlowTraining):
    """Trains a student u(x_t, t, s) on edges of the (t, s) triangle against a frozen teacher's guided velocity.

    Args:
        teacher: the frozen teacher. It is no part of the checkpoint: it is made again from the config.
        student: the flow map to train; None for a copy of the teacher with a zero-initialized end time.
        objective: the losses: `losses.paper`, `losses.end_identity`, a rival of `losses.presets`, or your own; None for
            `losses.end_identity()`.
        guidance: how the teacher is guided; the student learns the guided velocity and needs no second pass.
        derivative: the engine for jvp: "dual" (exact, one pass), "functional" (exact, torch.func.jvp; the reference),
            "central" (a difference), or "auto": the first of them that can pass through the student; the log says why.
        optimizer: makes the optimizer from the student's parameters.
        lr_scheduler: makes a per-step schedule from the optimizer; None for a constant rate.
        ema_decay: decay of the student's average, in [0, 1).
        gradient_checkpointing: compute the student's activations again in the backward pass: less memory, more time.
        compile: compile the blocks of student and teacher.

    Raises:
        ValueError: if there is no such engine, ema_decay is out of its range, or there is no student.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Network | None = None,
        objective: Objective | None = None,
        guidance: Guidance = Guidance(),  # noqa: B008 - frozen
        derivative: EngineName | Literal["auto"] = "auto",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_decay: float = 0.999,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        if derivative not in ("auto", *ENGINES):
            raise ValueError(f"derivative must be one of auto, {', '.join(ENGINES)}: got {derivative!r}")
        network = teacher.student() if student is None else student
        super().__init__(network, optimizer, lr_scheduler, ema_decay, gradient_checkpointing, compile)
        self.teacher: Teacher = teacher
        self.guidance = guidance
        self.velocity = GuidedField(teacher, teacher.null, guidance)
        self.objective = end_identity() if objective is None else objective
        self.teacher_identity = ""
        self.jumps: list[Jump] = []
        self.wanted: EngineName | None = None if derivative == "auto" else derivative
        self.derivative: Engine = ENGINES[self.wanted or "dual"]

    @property
    def student(self) -> Network:
        """The network that is trained."""
        return self.network

    def setup(self, stage: str) -> None:
        """Choose the engine for jvp, and say what a step will cost.

        Raises:
            ValueError: if the requested engine cannot differentiate the student.
        """
        super().setup(stage)
        if stage == "fit":
            # Now, before a strategy moves, casts and shards it; the other processes may not have its weights.
            identity = self.teacher.identity() if self.trainer.is_global_zero else ""
            self.teacher_identity = self.trainer.strategy.broadcast(identity)
            self.example = self.student.example()
            choice = choose(self.student, self.example, self.wanted)
            self.derivative = choice.engine
            rank_zero_info(choice.reason)
            rank_zero_info(str(cost(self.objective, self.guidance.passes)))

    def on_fit_start(self) -> None:
        """Check the fused kernel of the dual engine, where the run computes and in its precision."""
        if self.derivative is not dual:
            return
        precision = self.trainer.precision_plugin
        # Only shapes matter: the example may be on the meta device. It is cast as a batch is, but for the times.
        x_t, t, s, condition = _pytree.tree_map_only(
            Tensor, lambda value: torch.zeros_like(value, device=self.device), self.example
        )
        example = (precision.convert_input(x_t), t, s, precision.convert_input(condition))
        with precision.forward_context():
            check_fused(self.student, example)

    def sharded(self) -> list[Network]:
        """Return student, average, and of the teacher what it lets be sharded."""
        return [*super().sharded(), *self.teacher.sharded()]

    def compiled(self) -> list[Network]:
        """Return the teacher's networks, and the student if its engine passes through compiled blocks."""
        # torch.func.jvp does not.
        student = [] if self.derivative is functional else [self.student]
        return [*student, *self.teacher.networks()]

    def settings(self) -> dict[str, Any]:
        """Return what decides the run apart from its data, by name; the teacher by the hash of its weights."""
        own = {"objective": self.objective, "guidance": self.guidance, "teacher": self.teacher_identity}
        return super().settings() | own

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return the averaged student, and the guided teacher as its own Euler sampler."""
        return {"student": self.average, "teacher": flow_map_of(self.velocity)}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the active losses: DE-CM's algorithm."""
        x_1, condition = batch
        step, generator = self.global_step, self.generator(batch_idx)

        # A point x_t of the path for each row, and there the teacher's velocity, once for all losses that start there.
        x_0 = torch.randn(x_1.shape, generator=generator, device=x_1.device, dtype=x_1.dtype)
        clock = _on_cpu(generator)
        t = self.objective.draw_times(len(x_1), clock).to(path.time_dtype(x_1))
        paths = self.path_samples(PathSample(x_0, x_1, condition, t, path.interpolate(x_0, x_1, t)), step)

        # Each loss draws its jumps from its edge of the triangle, with the direction its residual differentiates in.
        losses = self.objective.active_losses(step)
        starts = {name: self.make_jumps(loss, paths[name], step, clock) for name, loss in losses.items()}

        # One pass of the student over all rows: its mean velocities u, and their derivatives jvp in those directions.
        with self.phase("derivative"):
            self.jumps = [jump for jump, _ in starts.values()]
            results = forward_with_jvp(self.derivative, self.student, self.jumps)

        # The residual of every jump, and the pull of the student toward its root.
        self.terms = {}
        for (name, loss), (jump, v_start), result in zip(losses.items(), starts.values(), results, strict=True):
            v_end = self.end_velocity(loss, jump, result.u.detach())
            self.terms[name] = self.objective.term(loss, jump, result, v_start, v_end, step)
        return self.total()

    def path_samples(self, batch: PathSample, step: int) -> dict[str, PathSample]:
        """Return the rows of each active loss, with the teacher's velocity if the loss reads it at x_t.

        The teacher sees each row once, and none that no loss reads it in.
        """
        count = len(batch.t)
        rows, teacher_rows = self.objective.rows(count), self.objective.teacher_rows(step, count)
        v_t = None
        if teacher_rows:
            seen = batch.select(teacher_rows)
            with self.phase("teacher"):
                v_t = self.velocity(seen.x_t, seen.t, seen.condition)
        paths = {}
        for name, loss in self.objective.active_losses(step).items():
            paths[name] = batch.select(rows[name])
            if v_t is not None and loss.reads_batch_velocity:
                paths[name] = replace(paths[name], v_t=rows[name].within(teacher_rows).of(v_t))
        return paths

    def make_jumps(
        self, loss: DualEndLoss, sample: PathSample, step: int, generator: torch.Generator
    ) -> tuple[Jump, Sample | None]:
        """Return a loss's jumps, and the teacher's velocity where they start (None if it has no weight there)."""
        times = loss.edge.draw(sample.t, step, generator)
        if loss.edge.starts_at_batch_times:
            x_t, v_start = sample.x_t, sample.v_t
        else:
            # The noise edge starts at points of its own, on the same lines from noise to data.
            x_t, v_start = path.interpolate(sample.x_0, sample.x_1, times.t), None
            if loss.start_weight:
                with self.phase("teacher"):
                    v_start = self.velocity(x_t, times.t, sample.condition)
        along = tangent(v_start, times.t, loss.start_weight, loss.end_weight) if loss.edge.has_length else None
        return Jump(x_t, times.t, times.s, sample.condition, along), v_start

    def end_velocity(self, loss: DualEndLoss, jump: Jump, u: Sample) -> Sample | None:
        """Return the teacher's velocity where the student lands; None if it has no weight."""
        if not loss.end_weight:
            return None
        with self.phase("teacher"):
            return self.velocity(path.jump(jump.x_t, u, jump.t, jump.s), jump.s, jump.condition)

    def total(self) -> Tensor:
        """Return the sum of this step's losses, logged one by one."""
        total = torch.stack([term.value for term in self.terms.values()]).sum()
        self.log_dict({f"loss/{name}": term.value for name, term in self.terms.items()})
        self.log_dict({f"residual/{name}": term.residual_rms for name, term in self.terms.items()})
        self.log("loss/total", total, prog_bar=True)
        return total

    def origin(self) -> str:
        """Return the operation and layer at which the first derivative that is not finite arose, "" if not known."""
        # One process that runs the student by itself would wait for the others forever.
        if self.derivative is not dual or self.trainer.world_size > 1:
            return ""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            try:
                forward_with_jvp(partial(dual, watched=True), self.student, self.jumps)
            except NoTangentError as error:
                return f"; {error}"
        return ""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        # The teacher is outside the module registry, yet must follow every move and cast of this module.
        self.teacher.apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


def _on_cpu(generator: torch.Generator) -> torch.Generator:
    """Return the generator, or one of the same seed on the CPU."""
    return generator if generator.device.type == "cpu" else torch.Generator().manual_seed(generator.initial_seed())
