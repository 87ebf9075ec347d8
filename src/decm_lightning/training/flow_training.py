"""The LightningModule shared by teacher training and distillation: averaging, optimization, checkpoints, resuming."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from numpy.random import SeedSequence
from torch import Tensor, nn

from decm_lightning.data.protocol import HasRecord
from decm_lightning.gradients import clip_by_norm
from decm_lightning.guidance import Guidance
from decm_lightning.losses import Cost, LossTerm
from decm_lightning.networks import Network, describe
from decm_lightning.networks.pretrained import description, refuse_another
from decm_lightning.networks.record import Record
from decm_lightning.networks.sharded import is_sharded
from decm_lightning.seeds import seed_of_run
from decm_lightning.teachers import Teacher
from decm_lightning.training.averaging import EMA, average_of, in_float32
from decm_lightning.training.checkpoint_io import AtomicCheckpointIO
from decm_lightning.training.checks import TrainingChecks
from decm_lightning.training.last_step import LastStep
from decm_lightning.training.recipe import Recipe
from decm_lightning.training.resuming import (
    differences,
    normalize_progress,
    refuse_fixed,
    settings_of,
    start_first_epoch,
)
from decm_lightning.training.schedule import run_length
from decm_lightning.training.sharding import shard_all
from decm_lightning.types import FlowMapNetwork

log = logging.getLogger(__name__)
FROM_FOLDER = "give a .ckpt file, or start a new run with decm_lightning.networks.load of this folder as the network"


class FlowTraining(L.LightningModule):
    """Trains a network and averages its weights. The average is tested, sampled and exported.

    Args:
        network: the network to train.
        optimizer: creates the optimizer from the parameters.
        lr_scheduler: creates a per-step schedule from the optimizer.
        ema_decay: largest decay of the average, in [0, 1). After n steps it is at most (1 + n) / (10 + n), so that the
            average covers about the last ninth of the steps so far.
        gradient_checkpointing: recompute the activations of each block in the backward pass: less memory, more time.
        compile: compile the blocks with torch.compile, without graph breaks: faster after a minute or more.

    Attributes:
        seed: seed of the noise of training, to be set before `fit`; None for the seed of `L.seed_everything` when `fit`
            starts. A resumed run uses its checkpoint's. New weights depend on the seed when the network is built.
        run_seed: the seed of the current run.
        terms: this step's losses by name.
        gradient_norm: this step's norm of all gradients before clipping, on the device.
        teacher: the frozen teacher of a distillation, otherwise None.
        guidance: how the teacher, or the network that will become one, is guided.

    Raises:
        ValueError: if ema_decay is outside its range.
    """

    teacher: Teacher | None = None
    guidance: Guidance

    def __init__(
        self,
        network: Network,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        ema_decay: float,
        gradient_checkpointing: bool,
        compile: bool,
    ) -> None:
        super().__init__()
        network.gradient_checkpointing = gradient_checkpointing
        self.compiles = compile
        self.network = network
        self.average = average_of(network)
        self.recipe = Recipe(optimizer, lr_scheduler)
        self.averaging = EMA(ema_decay)
        self.checks = TrainingChecks()
        self.seed: int | None = None
        self.run_seed = torch.initial_seed()
        self.saved_settings: dict[str, Any] | None = None
        self.terms: dict[str, LossTerm] = {}
        self.gradient_norm = torch.zeros(())

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return the flow maps that can be sampled, by name."""
        raise NotImplementedError

    def data_readers(self) -> list[str]:
        """Return the losses that read the data x_1. If there are any, data of conditions alone are refused."""
        return ["flow_matching"]

    @property
    def ema_decay(self) -> float:
        """The decay of the average."""
        return self.averaging.decay

    def compiled(self) -> list[Network]:
        """Return the networks to compile: those that a training step runs."""
        return [self.network]

    def sharded(self) -> list[Network]:
        """Return the networks that ModelParallelStrategy shards."""
        return [self.network, self.average]

    def configure_model(self) -> None:
        """Compile and shard the networks once. Lightning calls this in each run, before it creates the optimizer."""
        if self.compiles and self.trainer.training:
            for network in self.compiled():
                network.compile_units()
            self.compiles = False
        if self.device_mesh is not None:
            shard_all(self.sharded(), self.device_mesh)

    def configure_optimizers(self) -> Any:
        """Return the optimizer over the trained network and its per-step schedule."""
        return self.recipe.make(self.trained_parameters())

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        return list(self.network.parameters())

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the run, except its data. A resumed run compares them."""
        return self.recipe.settings | {"ema_decay": self.averaging.decay}

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callbacks of every run: averaging, checks, and saving the last step."""
        return [self.averaging, self.checks, LastStep()]

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Return a context that the trainer's profiler reports under this name, such as "teacher"."""
        return nullcontext() if self._trainer is None else self._trainer.profiler.profile(name)  # type: ignore[attr-defined]

    def generator(self, batch_idx: int) -> torch.Generator:
        """Return the random generator of a batch.

        It depends only on the run's seed, the rank, the step and the batch, so a resumed run uses the same random
        numbers as an uninterrupted one.
        """
        parts = (self.run_seed, self.global_rank, self.global_step, batch_idx)
        return torch.Generator(self.device).manual_seed(int(SeedSequence(parts).generate_state(1)[0]))

    def cost(self) -> Cost:
        """Return the cost of a step in forward passes per sample: by default one, and its backward pass."""
        return Cost(teacher=0.0, student=1.0, derivative=0.0)

    def summary(self) -> dict[str, str]:
        """Return what a run trains, one line for each heading."""
        count, trained = (
            sum(p.numel() for p in parameters)
            for parameters in (self.network.parameters(), (p for p in self.network.parameters() if p.requires_grad))
        )
        parameters = f"{count:,} parameters" if trained == count else f"{count:,} parameters, {trained:,} trained"
        return {"network": f"{type(self.network).__name__}, {parameters}"}

    def origin(self) -> str:
        """Return where the first NaN or infinity of this step arose, "" if unknown."""
        return ""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients by the trainer's settings, with the norm that the checks computed."""
        # A fused optimizer unscales the gradients in its step, so Lightning refuses to clip them before.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        unscales = scaled and getattr(optimizer, "_step_supports_amp_scaling", False)
        if not gradient_clip_val or unscales or gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        clip_by_norm(
            (p.grad for p in self.network.parameters() if p.grad is not None), gradient_clip_val, self.gradient_norm
        )

    def setup(self, stage: str) -> None:
        """Fix the run's seed, write checkpoints next to their final path, and run the averaging and checks first."""
        if stage == "fit":
            self.run_seed = self.trainer.strategy.broadcast(seed_of_run(self.seed, self.run_seed))
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        # Other callbacks may save the average in a checkpoint, or differentiate a loss that is NaN.
        first = (self.averaging, self.checks)
        self.trainer.callbacks.sort(key=lambda callback: callback not in first)  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        """Adapt the schedule to the run's length, and apply the config to a resumed run.

        Raises:
            ValueError: if the checkpoint was saved with another teacher or optimizer class, or the schedule ends before
                the run.
        """
        start_first_epoch(self.trainer)
        self.set_length(run_length(self.trainer))
        if self.saved_settings is not None:
            self._apply_settings(self.saved_settings)
        self.checks.check_schedule(self.trainer)

    def set_length(self, steps: int | None) -> None:
        """Set the number of the run's steps, None if unknown, in everything that depends on it."""
        self.recipe.set_length(self.trainer, steps)

    def _apply_settings(self, saved: dict[str, Any]) -> None:
        """Apply the config's settings. Only the state comes from the checkpoint."""
        differing = differences(saved, settings_of(self.settings()))
        refuse_fixed(differing, bool(self.recipe.settings))
        if not differing:
            return
        log.warning("resuming with the config's settings: %s", ", ".join(f"{n} {v}" for n, v in differing.items()))
        if any(name.startswith(("optimizer.", "lr_scheduler.")) for name in differing):
            self.recipe.apply(self.trainer)

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Return the batch's number. A callback such as SampleWriter generates the samples."""
        return batch_idx

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing, because the evaluation callback reads the real images."""

    test_step = validation_step

    def record(self) -> Record:
        """Return the origin and the use of the network. The config is stored separately, by the command line."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        own = data.record() if isinstance(data, HasRecord) else Record()
        return replace(own, steps=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the seed, the settings, the description from which `load` rebuilds the network, and its record."""
        checkpoint["network"] = describe(self.network)
        checkpoint["record"] = self.record().as_dict()
        checkpoint["seed"] = self.run_seed
        checkpoint["settings"] = settings_of(self.settings())
        normalize_progress(self.trainer, checkpoint["loops"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seed of the run that is resumed."""
        refuse_another(checkpoint["network"], self.network, "the checkpoint")
        if self._trainer is not None:
            # Lightning converts the module after loading, which would round the weights of 64-true to float32.
            self._trainer.precision_plugin.convert_module(self)
        fits = self._trainer is not None and self._trainer.state.fn == "fit"
        if fits and self.run_seed != checkpoint["seed"]:
            log.warning("resuming with seed %d of the checkpoint, not %d", checkpoint["seed"], self.run_seed)
        self.run_seed = checkpoint["seed"]
        self.saved_settings = checkpoint.get("settings")
        if self.saved_settings is not None and fits:
            refuse_fixed(differences(self.saved_settings, settings_of(self.settings())), bool(self.recipe.settings))

    def check_checkpoint(self, path: str, strategy: Strategy) -> None:
        """Refuse a checkpoint that cannot be resumed, before any process reads it.

        Raises:
            ValueError: if it is an exported folder, has another network, or is sharded but the strategy only reads
                files.
        """
        # Lightning resolves other names, such as "last".
        if not Path(path).exists():
            return
        if (Path(path) / "config.json").is_file():
            raise ValueError(f"{path} is an exported folder without the state of a run: {FROM_FOLDER}")
        if is_sharded(Path(path)) and not isinstance(strategy, ModelParallelStrategy):
            remedy = f"merge it into one file with decm consolidate {path}"
            raise ValueError(f"{path} is a sharded checkpoint, which only ModelParallelStrategy reads: {remedy}")
        refuse_another(description(path), self.network, path)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlowTraining":
        return super()._apply(in_float32(fn, self.average, self.network), recurse)
