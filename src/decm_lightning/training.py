"""What training a teacher and distilling a student share: optimiser, average, randomness, and what may not be NaN."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from numpy.random import SeedSequence
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from decm_lightning import samplers
from decm_lightning.callbacks.cells import Cell
from decm_lightning.callbacks.ema import EMA, average_of, in_float32
from decm_lightning.callbacks.gradient_norms import total_norm
from decm_lightning.errors import NonFiniteError
from decm_lightning.losses import LossTerm
from decm_lightning.networks import Network, describe
from decm_lightning.networks.lora import LoRANetwork
from decm_lightning.networks.pretrained import description, refuse_another
from decm_lightning.networks.sharded import is_sharded
from decm_lightning.samplers import SamplerName
from decm_lightning.types import Batch, Condition, FlowMapNetwork, Sample


class FlowTraining(L.LightningModule):
    """A network in training and its exponential moving average, which is what is tested, sampled and exported.

    Args:
        network: what is trained.
        optimizer: makes the optimiser from the parameters.
        lr_scheduler: makes a per-step schedule from the optimiser; None for a constant rate.
        ema_decay: decay of the average per optimiser step, in [0, 1); it warms up as (1 + n) / (10 + n).
        gradient_checkpointing: keep only the inputs of each block for the backward pass: less memory, more time.
        compile: compile the blocks with torch.compile, without graph breaks: faster after a minute or more.

    Attributes:
        terms: this step's losses by name.
        phase: announces a part of the step, "teacher" or "derivative"; a callback that times them sets its own.

    Raises:
        ValueError: if ema_decay is outside its range.
    """

    def __init__(
        self,
        network: Network,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        ema_decay: float,
        gradient_checkpointing: bool,
        compile: bool,
    ) -> None:
        super().__init__()
        network.gradient_checkpointing = gradient_checkpointing
        self.compiles = compile
        self.network = network
        self.average = average_of(network)
        self.make_optimizer = optimizer
        self.make_schedule = lr_scheduler
        self.averaging = EMA(ema_decay)
        self.seed = torch.initial_seed()
        self.draws: Cell | None = None
        self.terms: dict[str, LossTerm] = {}
        self.phase: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return what can be sampled, by name."""
        raise NotImplementedError

    def compiled(self) -> list[Network]:
        """Return the networks that a training step runs, to be compiled."""
        return [self.network]

    def sharded(self) -> list[Network]:
        """Return the networks that are divided among devices under ModelParallelStrategy: all there are."""
        return [self.network, self.average]

    def configure_model(self) -> None:
        """Compile and shard, each once: Lightning asks for each run, before it makes the optimiser.

        Under ModelParallelStrategy (FSDP2) every block of every network is sharded by itself, then the rest of it.

        Raises:
            ValueError: if the strategy asks for tensor parallelism, as it does by default, or a network has LoRA.
        """
        if self.compiles and self.trainer.training:
            for network in self.compiled():
                network.compile_units()
            self.compiles = False
        if self.device_mesh is None:
            return
        if self.device_mesh["tensor_parallel"].size() > 1:
            sizes = f"data_parallel_size={self.trainer.world_size} and tensor_parallel_size=1"
            raise ValueError(f"networks are sharded over all processes: give ModelParallelStrategy {sizes}")
        if any(isinstance(network, LoRANetwork) for network in self.sharded()):
            raise ValueError("a student with LoRA shares its frozen weights, unsharded: give --trainer.strategy ddp")
        for network in self.sharded():
            for module in (*network.units(), network):
                if not isinstance(module, FSDPModule):
                    # Also the root, which would stay whole after a forward: the average is moved shard by shard.
                    fully_shard(module, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)

    def configure_optimizers(self) -> Any:
        """Return the optimiser over the trained network and its per-step schedule.

        Raises:
            ValueError: if OneCycleLR has so few steps that one of its phases has none.
        """
        optimizer = self.make_optimizer(self.network.parameters())
        if self.make_schedule is None:
            return optimizer
        try:
            schedule = self.make_schedule(optimizer)
        except ZeroDivisionError:
            raise ValueError("a phase of the lr_scheduler has no steps: change its total_steps or pct_start") from None
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the averaging: a student without it would be tested as it began."""
        return [self.averaging]

    def generator(self, batch_idx: int) -> torch.Generator:
        """Return this batch's own source of randomness.

        It depends on the run's seed, the rank, the step and the batch alone, so that a resumed run draws what an
        unbroken one would have drawn.
        """
        parts = (self.seed, self.global_rank, self.global_step, batch_idx)
        return torch.Generator(self.device).manual_seed(int(SeedSequence(parts).generate_state(1)[0]))

    @torch.no_grad()
    def sample(
        self,
        x_0: Sample,
        condition: Condition,
        model: str = "student",
        sampler: SamplerName = "mix",
        steps: int = 1,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """Return samples of one of `models()` from noise x_0.

        Raises:
            ValueError: if there is no such model or sampler, or steps is below 1.
        """
        models = self.models()
        if model not in models:
            raise ValueError(f"model must be one of {', '.join(models)}: got {model!r}")
        return samplers.sampler(sampler, generator)(models[model], x_0, condition, steps)

    def check_losses(self, batch_idx: int, origin: Callable[[], str] = str) -> None:
        """Stop if a loss is not finite.

        Args:
            batch_idx: the batch.
            origin: says where the first such number arose, "" if it is not known.

        Raises:
            NonFiniteError: naming the loss, the step, the batch and the origin.
        """
        values = {name: term.value for name, term in self.terms.items()}
        if torch.stack(list(values.values())).isfinite().all():
            return
        bad = ", ".join(f"loss/{name} = {value.item()}" for name, value in values.items() if not value.isfinite())
        raise NonFiniteError(self._stopped(bad, batch_idx) + origin())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop if the gradient is not finite, before the weights take it in.

        With a gradient scaler (16-mixed) that is routine while its scale is above 1: it skips the step and halves it.

        Raises:
            NonFiniteError: naming the parameters, the losses, the step and the batch.
        """
        gradients = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        if total_norm(gradients.values()).isfinite():
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            return
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        losses = ", ".join(f"loss/{name} = {term.value.item():.4g}" for name, term in self.terms.items())
        what = f"the gradient of {bad[0] if bad else 'all parameters together'}{more} (losses: {losses})"
        raise NonFiniteError(self._stopped(what, self.trainer.fit_loop.batch_idx))

    def setup(self, stage: str) -> None:
        """Refuse data with more classes than the network has: the first label too many would be its null class.

        Raises:
            ValueError: naming both numbers.
        """
        known, given = self.network.num_classes, getattr(self.trainer.datamodule, "num_classes", 0)  # type: ignore[attr-defined]
        if known and given > known:
            raise ValueError(f"the data have {given} classes and the network {known}: labels must be below num_classes")

    def on_train_start(self) -> None:
        """Refuse a schedule that ends before the run does, and warn of one that the run does not finish.

        Raises:
            ValueError: naming both numbers of steps.
        """
        # It would be too early where the schedule is made: a resumed one gets its checkpoint's steps, and to count the
        # run's Lightning would ask the data for their loader, which then begins with epoch 0.
        end = getattr(self.lr_schedulers(), "total_steps", None)
        if end is None:
            return
        steps = self.trainer.estimated_stepping_batches
        both = f"the lr_scheduler has {end} steps (if resumed, those of the checkpoint) and the run {steps}"
        if steps > end:
            raise ValueError(f"{both}: set its total_steps to {steps}, or trainer.max_steps to {end}")
        # -1 where the loader does not know its length.
        if 0 <= steps < end:
            rank_zero_warn(f"{both}, which stops in the middle of it: set its total_steps to {steps}")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Refuse samples that are not of the network's shape.

        Raises:
            ValueError: naming both shapes.
        """
        given, known = tuple(batch[0].shape[1:]), tuple(self.network.sample_shape)
        if given != known:
            remedy = "build the network for them (in_channels, input_size) or give other data"
            raise ValueError(f"the data's samples are {given} and the network's {known}: {remedy}")

    def _stopped(self, what: str, batch_idx: int) -> str:
        where = f"at step {self.global_step}, batch {batch_idx} of epoch {self.current_epoch}"
        return f"{what} is not finite {where}: lower the learning rate, clip gradients, or check the data"

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Return samples for the batch's labels; the `SampleWriter` callback says of which model and how.

        Raises:
            ValueError: if there is no such callback.
        """
        if self.draws is None:
            raise ValueError("predict needs the callback decm_lightning.callbacks.SampleWriter")
        generator = self.generator(batch_idx)
        x_0 = torch.randn(len(batch.x_1), *self.average.sample_shape, generator=generator, device=self.device)
        drawn = self.sample(x_0, batch.condition, self.draws.model, self.draws.sampler, self.draws.steps, generator)
        return Batch(drawn, batch.condition)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: the real images go to the evaluation callback."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: the real images go to the evaluation callback."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the seed, and what `load` needs to build the network again."""
        checkpoint["network"] = describe(self.network)
        checkpoint["seed"] = self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the seed of the run that is resumed.

        Raises:
            ValueError: if it trained another network.
        """
        refuse_another(checkpoint["network"], self.network, "the checkpoint")
        self.seed = checkpoint["seed"]

    def check_checkpoint(self, path: str, strategy: Strategy) -> None:
        """Refuse a checkpoint that cannot be gone on with, before any process has begun to read it.

        Raises:
            ValueError: if it holds another network, or is sharded and the strategy reads single files alone.
        """
        # Other names, such as "last", are Lightning's to find.
        if not Path(path).exists():
            return
        if is_sharded(Path(path)) and not isinstance(strategy, ModelParallelStrategy):
            remedy = f"decm consolidate {path} --to ckpt makes one file of it"
            raise ValueError(f"{path} is a sharded checkpoint, which only ModelParallelStrategy reads: {remedy}")
        refuse_another(description(path), self.network, path)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlowTraining":
        return super()._apply(in_float32(fn, self.average, self.network), recurse)
