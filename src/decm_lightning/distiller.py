"""Dual-End Consistency Models (arXiv 2602.10764): distill a many-step teacher into a few-step student."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree

from decm_lightning import derivatives, path
from decm_lightning.derivatives import Engine, EngineName, Jump, NoTangentError, dual, forward_with_jvp, functional
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.losses import Composition, Cost, FlowMapLoss, LossTerm, Objective, PresetName, cost, named, tangent
from decm_lightning.losses.learned_weight import LogWeight
from decm_lightning.losses.rows import PathSample
from decm_lightning.networks import Network
from decm_lightning.networks.record import Record, Reference
from decm_lightning.samplers import flow_map_of
from decm_lightning.seeds import on_cpu
from decm_lightning.teachers import NoTeacher, Teacher
from decm_lightning.training.flow_training import FlowTraining
from decm_lightning.training.schedule import WarmupCosine
from decm_lightning.types import Batch, FlowMapNetwork, Sample, Time


class Distiller(FlowTraining):
    """Trains a student u(x_t, t, s) on edges of the (t, s) triangle against a frozen teacher's guided velocity.

    Args:
        teacher: the frozen teacher. Checkpoints do not contain it, because the config builds it again. None to train on
            the velocity x_1 - x_0 of each row's path, as MeanFlow does; this needs a student.
        student: the flow map to train; None for a copy of the teacher with a zero-initialized end time.
        objective: the losses, or the name of a preset of `losses` (`losses.PresetName`) with its default settings.
        guidance: how the teacher is guided. The student learns the guided velocity and needs only one pass.
        derivative: the engine for jvp: "dual" (exact, one pass), "functional" (exact, torch.func.jvp; the reference),
            "central" (central difference), a function (`derivatives.Engine`), or "auto": the first of the three that
            can differentiate the student. A run begins with the reason.
        optimizer: creates the optimizer from the student's parameters.
        lr_scheduler: creates a per-step schedule from the optimizer. The default adapts to the length of the run; with
            warmup 0 and floor 1 the rate is constant.
        ema_decay: largest decay of the student's average, in [0, 1); it covers about the last ninth of the run.
        gradient_checkpointing: recompute the student's activations in the backward pass: less memory, more time.
        compile: compile the blocks of student and teacher.

    Raises:
        ValueError: if the engine is unknown, ema_decay is out of its range, the student is missing, or the objective or
            guidance needs a teacher and there is none.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        student: Network | None = None,
        objective: Objective | PresetName = "whole_triangle",
        guidance: Guidance = Guidance(),  # noqa: B008 - frozen
        derivative: EngineName | Literal["auto"] | Callable[..., Any] = "auto",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable = WarmupCosine,
        ema_decay: float = 0.9999,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        if not callable(derivative) and derivative not in ("auto", *derivatives.ENGINES):
            engines = ", ".join(derivatives.ENGINES)
            raise ValueError(f"derivative must be a function or one of auto, {engines}: got {derivative!r}")
        objective = named(objective) if isinstance(objective, str) else objective
        teacher = NoTeacher() if teacher is None else teacher
        if isinstance(teacher, NoTeacher):
            objective.check_without_teacher()
            if guidance.scale != 1:
                raise ValueError(f"guidance needs a teacher: got scale {guidance.scale} and teacher None")
        network = student or teacher.student()
        super().__init__(network, optimizer, lr_scheduler, ema_decay, gradient_checkpointing, compile)
        self.teacher: Teacher = teacher
        self.guidance = guidance
        self.velocity = GuidedField(teacher, teacher.null, guidance)
        self.requested_objective = self.objective = objective
        learned = [name for name, loss in objective.losses.items() if loss.learned_weight]
        self.log_weights = nn.ModuleDict({name: LogWeight() for name in learned})
        self.requested_derivative = derivative
        self.derivative: Engine = derivative if callable(derivative) else derivatives.ENGINES.get(derivative, dual)  # type: ignore[arg-type]
        self.teacher_identity, self.derivative_reason = "", "a function"
        self.jumps: list[Jump] = []

    @property
    def student(self) -> Network:
        """The trained network."""
        return self.network

    def setup(self, stage: str) -> None:
        """Select the engine for jvp.

        Raises:
            ValueError: if the requested engine cannot differentiate the student.
        """
        super().setup(stage)
        if stage != "fit":
            return
        # Before a strategy moves, casts and shards the teacher. Other processes may not have its weights.
        identity = self.teacher.identity() if self.trainer.is_global_zero else ""
        self.teacher_identity = self.trainer.strategy.broadcast(identity)
        self.example = self.student.example()
        if not callable(requested := self.requested_derivative):
            choice = derivatives.choose(self.student, self.example, None if requested == "auto" else requested)
            self.derivative = choice.engine
            self.derivative_reason = choice.reason.removeprefix("derivative ")

    def on_fit_start(self) -> None:
        """Check the fused kernel of the dual engine on the run's device and in its precision."""
        if self.derivative is not dual:
            return
        precision = self.trainer.precision_plugin
        # Only shapes matter, because the example may be on the meta device. It is cast like a batch, except its times.
        x_t, t, s, condition = _pytree.tree_map_only(
            Tensor, lambda value: torch.zeros_like(value, device=self.device), self.example
        )
        with precision.forward_context():
            inputs = (precision.convert_input(x_t), t, s, precision.convert_input(condition))
            derivatives.check_fused(self.student, inputs)

    def sharded(self) -> list[Network]:
        """Return the student, its average, and the teacher's networks that can be sharded."""
        return [*super().sharded(), *self.teacher.sharded()]

    def compiled(self) -> list[Network]:
        """Return the teacher's networks, and the student unless its engine is torch.func.jvp, which cannot compile."""
        student = [] if self.derivative is functional else [self.student]
        return [*student, *self.teacher.networks()]

    def set_length(self, steps: int | None) -> None:
        """Set the number of the run's steps in the schedule and the objective."""
        super().set_length(steps)
        self.objective = self.requested_objective.for_run(steps)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the run, except its data. A hash of its weights identifies the teacher."""
        own = {"objective": self.objective, "guidance": self.guidance, "derivative": self.derivative}
        return super().settings() | own | {"teacher": self.teacher_identity}

    def data_readers(self) -> list[str]:
        """Return the losses that read the data x_1. Without a teacher, all read the velocity x_1 - x_0."""
        alone = isinstance(self.teacher, NoTeacher)
        return [name for name, loss in self.objective.losses.items() if alone or loss.edge.reads_data]

    def record(self) -> Record:
        """Return the origin and the use of the student."""
        teacher, objective = Reference(self.teacher.name, self.teacher_identity), str(self.requested_objective)
        return replace(super().record(), teacher=teacher, guidance=asdict(self.guidance), objective=objective)

    def cost(self) -> Cost:
        """Return the cost of a step in forward passes per sample."""
        return cost(self.objective, self.guidance.passes)

    def summary(self) -> dict[str, str]:
        """Return what the run trains, one line for each heading."""
        teacher = f"{self.teacher.name or type(self.teacher).__name__}, guidance scale {self.guidance.scale:g}"
        own = {"teacher": teacher, "losses": ", ".join(self.objective.losses), "derivative": self.derivative_reason}
        return super().summary() | own

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return the averaged student, and the guided teacher as a flow map of Euler steps."""
        teacher = {} if isinstance(self.teacher, NoTeacher) else {"teacher": flow_map_of(self.velocity)}
        return {"student": self.average, **teacher}

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the student and of the learned weights."""
        return [*super().trained_parameters(), *self.log_weights.parameters()]

    def configure_model(self) -> None:
        """Compile and shard the networks, and let FSDP2 average the gradients of the learned weights."""
        super().configure_model()
        if self.device_mesh is not None:
            for log_weight in self.log_weights.values():
                fully_shard(log_weight, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Run one step of DE-CM's algorithm, and return the sum of the active losses."""
        x_1, condition = batch
        step, generator = self.global_step, self.generator(batch_idx)

        # Interpolate a point x_t on each row's path. The teacher's velocity there is shared by all losses.
        x_0 = torch.randn(x_1.shape, generator=generator, device=x_1.device, dtype=x_1.dtype)
        cpu_generator = on_cpu(generator)
        t = self.objective.draw_times(len(x_1), cpu_generator).to(path.time_dtype(x_1))
        samples = self.path_samples(PathSample(x_0, x_1, condition, t, path.interpolate(x_0, x_1, t)), step)

        # Sample the jumps (t, s) of each loss from its edge of the triangle, with the tangent for the derivative of u.
        losses = self.objective.active_losses(step)
        starts = {name: self.make_jumps(loss, samples[name], step, cpu_generator) for name, loss in losses.items()}

        # Compute the student's mean velocities u and their derivatives jvp in one pass over the rows of all losses.
        with self.part("derivative"):
            self.jumps = [jump for jump, _ in starts.values()]
            results = forward_with_jvp(self.derivative, self.student, self.jumps)

        # Compute the residual g of each jump and the loss that regresses u toward u - N(g).
        self.terms = {}
        for (name, loss), (jump, v_start), result in zip(losses.items(), starts.values(), results, strict=True):
            v_end = self.end_velocity(loss, jump, result.u.detach())
            composition = self.compose(loss, jump, v_start, step, cpu_generator)
            log_weight = self.log_weights[name](jump.t.to(self.device)) if name in self.log_weights else None
            self.terms[name] = self.objective.term(loss, jump, result, v_start, v_end, step, composition, log_weight)
        self.terms |= self.more_terms(batch, generator, cpu_generator)
        return self.total()

    def more_terms(
        self, batch: Batch, generator: torch.Generator, cpu_generator: torch.Generator
    ) -> dict[str, LossTerm]:
        """Return this step's losses of a subclass that are not on the triangle, by name; times are on the CPU."""
        return {}

    def path_samples(self, batch: PathSample, step: int) -> dict[str, PathSample]:
        """Return the rows of each active loss, with the teacher's velocity at x_t if the loss reads it.

        The teacher evaluates each row once, and only rows that a loss reads.
        """
        rows, teacher_rows = self.objective.rows(len(batch.t)), self.objective.teacher_rows(step, len(batch.t))
        v_t = self.teacher_velocity(batch.select(teacher_rows)) if teacher_rows else None
        samples = {}
        for name, loss in self.objective.active_losses(step).items():
            samples[name] = batch.select(rows[name])
            if v_t is not None and loss.velocities.batch:
                samples[name] = replace(samples[name], v_t=rows[name].within(teacher_rows).of(v_t))
        return samples

    def make_jumps(
        self, loss: FlowMapLoss, sample: PathSample, step: int, generator: torch.Generator
    ) -> tuple[Jump, Sample | None]:
        """Return a loss's jumps and the teacher's velocity at their start, None if the loss does not read it."""
        times = loss.edge.draw(sample.t, step, generator)
        if not loss.edge.starts_at_batch_times:
            # This edge has its own start times, on the same paths from noise to data.
            sample = replace(sample, t=times.t, x_t=path.interpolate(sample.x_0, sample.x_1, times.t))
        v_start = self.teacher_velocity(sample) if loss.velocities.start else sample.v_t
        jump_tangent = tangent(v_start, times.t, loss.start_weight, loss.end_weight) if loss.needs_derivative else None
        return Jump(sample.x_t, times.t, times.s, sample.condition, jump_tangent), v_start

    def end_velocity(self, loss: FlowMapLoss, jump: Jump, u: Sample) -> Sample | None:
        """Return the teacher's velocity at the end of the student's jump, None if the loss does not read it."""
        if not loss.velocities.end:
            return None
        with self.part("teacher"):
            return self.velocity(path.jump(jump.x_t, u, jump.t, jump.s), jump.s, jump.condition)

    @torch.no_grad()
    def compose(
        self, loss: FlowMapLoss, jump: Jump, v_start: Sample | None, step: int, generator: torch.Generator
    ) -> Composition | None:
        """Return the target that two shorter steps give, None if the loss does not use the middle identity."""
        if not loss.middle_weight:
            return None
        network = self.student if loss.middle.network == "student" else self.average

        def flow_map(x_t: Sample, t: Time, s: Time) -> Sample:
            return network(x_t, t.to(x_t.device), s.to(x_t.device), jump.condition)

        alpha = loss.middle.alpha.at(jump.t, jump.s, step, generator)
        first = v_start if loss.middle.first == "teacher" else None
        with self.part("target"):
            return loss.middle.compose(flow_map, jump.x_t, jump.t, jump.s, alpha, first)

    def teacher_velocity(self, sample: PathSample) -> Sample:
        """Return the guided teacher's velocity v(x_t, t); without a teacher, the path's own velocity x_1 - x_0."""
        if isinstance(self.teacher, NoTeacher):
            return path.velocity(sample.x_0, sample.x_1)
        with self.part("teacher"):
            return self.velocity(sample.x_t, sample.t, sample.condition)

    def total(self) -> Tensor:
        """Log this step's losses and return their sum."""
        total = torch.stack([term.value for term in self.terms.values()]).sum()
        values = {f"loss/{name}": term.value for name, term in self.terms.items()}
        self.log_dict(values | {f"residual/{name}": term.residual_rms for name, term in self.terms.items()})
        self.log("loss/total", total, prog_bar=True)
        return total

    def origin(self) -> str:
        """Return the operation and layer at which the first non-finite derivative arose, "" if unknown."""
        # With several processes, a forward pass of the student in one of them would wait forever.
        if self.derivative is not dual or self.trainer.world_size > 1:
            return ""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            try:
                forward_with_jvp(partial(dual, check_finite=True), self.student, self.jumps)
            except NoTangentError as error:
                return f"; {error}"
        return ""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        # The teacher is not registered as a submodule, but must follow every move and cast of this module.
        self.teacher.apply(fn, recurse)
        super()._apply(fn, recurse)
        return self
