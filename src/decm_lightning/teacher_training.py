"""Train a class-conditional teacher by flow matching."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from decm_lightning import conditions, path
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.losses import LossTerm
from decm_lightning.networks import Network
from decm_lightning.networks.record import Record
from decm_lightning.samplers import flow_map_of
from decm_lightning.time_laws import TimeLaw, Uniform
from decm_lightning.training.flow_training import FlowTraining
from decm_lightning.training.schedule import WarmupCosine
from decm_lightning.types import Batch, Condition, FlowMapNetwork, Sample, Time


class TeacherTraining(FlowTraining):
    """Flow matching, L = |v(x_t, t, c) - (x_1 - x_0)|^2, with class dropout (arXiv 2210.02747, 2207.12598).

    Args:
        network: the network to train; it is evaluated on the diagonal s = t.
        optimizer: creates the optimizer from the parameters.
        lr_scheduler: creates a per-step schedule from the optimizer. The default adapts to the length of the run; with
            warmup 0 and floor 1 the rate is constant.
        class_dropout: fraction of labels replaced by the null class, in [0, 1), for classifier-free guidance.
        guidance: how the teacher is guided when it is sampled. It does not affect training.
        times: the distribution of t.
        ema_decay: largest decay of the average, in [0, 1); it covers about the last ninth of the run.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        compile: compile the network's blocks.

    Raises:
        ValueError: if class_dropout or ema_decay is outside its range.
    """

    def __init__(
        self,
        network: Network,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable = WarmupCosine,
        class_dropout: float = 0.1,
        guidance: Guidance = Guidance(),  # noqa: B008 - frozen
        times: TimeLaw = Uniform(),  # noqa: B008 - frozen
        ema_decay: float = 0.9999,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        # A network of `load` is in eval mode.
        super().__init__(network.train(), optimizer, lr_scheduler, ema_decay, gradient_checkpointing, compile)
        if not 0 <= class_dropout < 1:
            raise ValueError(f"class_dropout must be in [0, 1): got {class_dropout}")
        self.class_dropout = class_dropout
        self.guidance = guidance
        self.times = times

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the run, except its data."""
        return super().settings() | {"class_dropout": self.class_dropout, "times": self.times}

    def record(self) -> Record:
        """Return the origin and the use of the network."""
        objective = f"flow matching (class_dropout={self.class_dropout}, times={self.times})"
        return replace(super().record(), objective=objective)

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return the averaged network with guidance."""
        return {"teacher": flow_map_of(GuidedField(self._averaged_velocity, self.average.null, self.guidance))}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the flow-matching loss of one batch."""
        x_1, condition = batch
        generator = self.generator(batch_idx)
        x_0 = torch.randn(x_1.shape, generator=generator, device=x_1.device, dtype=x_1.dtype)
        t = self.times.draw(len(x_1), generator).to(path.time_dtype(x_1))
        x_t = path.interpolate(x_0, x_1, t)
        dropped = torch.rand(len(x_1), generator=generator, device=x_1.device) < self.class_dropout
        condition = conditions.where(dropped, self.network.null(condition), condition)
        loss = (self.network(x_t, t, t, condition) - path.velocity(x_0, x_1)).square().mean()
        self.terms = {"flow_matching": LossTerm(loss, loss.detach().sqrt())}
        self.log("loss/flow_matching", loss, prog_bar=True)
        return loss

    def _averaged_velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        return self.average(x_t, t, t, condition)
