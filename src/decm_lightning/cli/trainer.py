"""decm fit, validate, test and predict: Lightning's command line for the modules of this package."""

import logging
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from decm_lightning import distiller, teacher_training  # noqa: F401 - the parser finds their classes by name
from decm_lightning.cli.next_command import print_end, print_next
from decm_lightning.cli.noise import hide_noise
from decm_lightning.cli.parsing import Parser, keep_whole_numbers
from decm_lightning.evaluation import Evaluation, SampleWriter
from decm_lightning.files import atomic
from decm_lightning.losses import Objective
from decm_lightning.networks import Network
from decm_lightning.networks.network import check_compiler
from decm_lightning.networks.pretrained import refuse_partial
from decm_lightning.networks.weightless import is_weightless, on_meta, without_weights
from decm_lightning.signals import end_at_signals
from decm_lightning.teachers import Teacher
from decm_lightning.training.flow_training import FlowTraining
from decm_lightning.training.resuming import differences, settings_of
from decm_lightning.training.run_progress import RunProgress

log = logging.getLogger(__name__)
WITHOUT_EFFECT = (
    "trainer.logger",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "trainer.enable_",
    "trainer.log_every_n_steps",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
)
"""Settings that do not change the weights of a run."""


class TrainerParser(Parser, LightningArgumentParser):
    """Lightning's parser, with this package's errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an ArgumentError."""
        where = ": give them in --config FILE" if "arguments are required" in message else ""
        super().error(message + where, ex)


class ConfigSaver(SaveConfigCallback):
    """Saves the resolved config next to the checkpoints and inside each of them."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the config as YAML, from which the run can be repeated."""
        checkpoint["config"] = self._dumped()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Log the data and trainer settings that differ from the checkpoint's; the module logs its own settings."""
        if trainer.state.fn != "fit" or "config" not in checkpoint:
            return
        saved, own = (
            settings_of({key: config.get(key) for key in ("trainer", "data")})
            for config in map(yaml.safe_load, (checkpoint["config"], self._dumped()))
        )
        differing = {n: v for n, v in differences(saved, own).items() if not n.startswith(WITHOUT_EFFECT)}
        if differing:
            log.warning("resuming with the config's settings: %s", ", ".join(f"{n} {v}" for n, v in differing.items()))

    def _dumped(self) -> str:
        return self.parser.dump(self.config, skip_none=False)


class TrainerCLI(LightningCLI):
    """Lightning's CLI for one method of the trainer.

    It does not use Lightning's subcommands, which would build a parser for each of the four methods. A checkpoint does
    not change which classes are built: the config decides.

    Args:
        argv: the config and its overrides.
        command: "fit", "validate", "test" or "predict"; None to build everything and run nothing.
    """

    needs_checkpoint = True  # The weights to evaluate come from --ckpt_path.

    def __init__(self, argv: Sequence[str], command: str | None = None) -> None:
        self.command = command
        self.options: list[str] = []
        # The parser's usage line would list hundreds of options.
        usage = {"prog": f"decm {command}", "usage": f"decm {command} --config FILE [options]"} if command else {}
        super().__init__(
            FlowTraining,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=ConfigSaver,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=TrainerParser,
            parser_kwargs=usage,
            args=list(argv),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the command's options, and build networks without weights where the first process sends them."""
        if self.command is not None:
            skip = set(self.subcommands()[self.command])
            self.options = parser.add_method_arguments(L.Trainer, self.command, skip=skip)
        parser.add_instantiator(_build_network, Network)
        parser.add_instantiator(_build_around_networks, Teacher)
        parser.add_instantiator(_build_around_networks, FlowTraining)

    def _set_seed(self) -> None:
        seed = self.config["seed_everything"]
        if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything must be from 0 to 2**32 - 1: got {seed}")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuse an untrained network, a run of zero steps, and compilation with an old torch."""
        if self.command == "fit" and self.config.get("model.init_args.compile"):
            check_compiler()
        for limit in ("max_steps", "max_epochs"):
            if self.command == "fit" and self.config.trainer[limit] == 0:
                raise ValueError(f"trainer.{limit} must be at least 1, or -1 for no limit: got 0")
        if self.command in ("validate", "test", "predict") and self.needs_checkpoint and not self.config.ckpt_path:
            raise ValueError(f"{self.command} needs --ckpt_path: without a checkpoint the student is untrained")
        if self.command in ("validate", "predict") and (path := self.config.ckpt_path) and Path(path).exists():
            self.write_no_run(Path(path).parent)

    def write_no_run(self, folder: Path) -> None:
        """Write no logs, checkpoints and config of a training run. A traceback belongs into `folder`."""
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
        self.save_config_callback = None
        trainer = self.config.trainer
        trainer.logger = trainer.enable_checkpointing = False
        trainer.callbacks = [c for c in trainer.callbacks or [] if not c.class_path.endswith("ModelCheckpoint")]
        trainer.default_root_dir = str(folder)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer, with this package's progress bar and summary unless the config has others."""
        config = self.config_init["trainer"]
        callbacks = config["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config["logger"] is False:
            # Without a logger it raises an error at the first step.
            callbacks = [each for each in callbacks if not isinstance(each, LearningRateMonitor)]
        kwargs["callbacks"] = callbacks
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs |= {"callbacks": [*callbacks, RunProgress()], "enable_model_summary": False}
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Build all classes, and refuse a checkpoint that does not fit before any process reads it."""
        # The first process sends its shard to each of the other processes.
        is_filled = bool(self.command and getattr(rank_zero_only, "rank", 0)) and _shards(self.config.trainer.strategy)
        try:
            with without_weights() if is_filled else nullcontext():
                super().instantiate_classes()
        except RuntimeError as error:
            # For example, SLURM_NTASKS is set without SLURM_NTASKS_PER_NODE.
            raise ValueError(f"the trainer cannot be built: {error}") from error
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.command == "predict" and not any(isinstance(c, SampleWriter) for c in callbacks):
            writer = "--trainer.callbacks+ decm_lightning.evaluation.SampleWriter"
            options = "--trainer.callbacks.folder FOLDER --trainer.callbacks.samples 50000"
            raise ValueError(f"predict needs a SampleWriter callback: add {writer} {options}")
        if self.command and (path := self.config.ckpt_path):
            self._check_found(path)
            self.model.check_checkpoint(path, self.trainer.strategy)
            if Path(path).is_file():
                refuse_partial(Path(path), self.model, self.command == "fit")

    def _check_found(self, path: str) -> None:
        """Refuse a checkpoint that does not exist. For "last", Lightning would start without a checkpoint."""
        if path == "best":
            raise ValueError("--ckpt_path best is known only to the process that trained: give the checkpoint's path")
        if path == "hpc" and self.trainer._checkpoint_connector._hpc_resume_path is None:
            raise ValueError(f"--ckpt_path hpc: found no hpc_ckpt_N.ckpt in {self.trainer.default_root_dir}")
        if path == "last":
            callbacks = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            if not any(callback._find_last_checkpoints(self.trainer) for callback in callbacks):
                raise ValueError(f"--ckpt_path last: {_newest(self.trainer)}")

    def run(self) -> None:
        """Run the command."""
        end_at_signals(self.trainer)
        options = {name: self.config_init[name] for name in self.options}
        # Evaluation prints a table, so Lightning's would be a second one.
        if self.command == "test" and any(isinstance(each, Evaluation) for each in self.trainer.callbacks):  # type: ignore
            options["verbose"] = False
        try:
            getattr(self.trainer, str(self.command))(self.model, datamodule=self.datamodule, **options)
        except Exception as error:
            # The terminal shows one line, so the traceback of a run is saved in a file.
            if any(frame.name == "_run_stage" for frame in traceback.extract_tb(error.__traceback__)):
                # A full disk must not hide the error.
                with suppress(OSError):
                    error.add_note(f"traceback in {_write_traceback(self.trainer)}")
            raise
        if self.command in ("validate", "test") and not self.trainer.callback_metrics:
            callback = "a callback that logs, such as decm_lightning.evaluation.Evaluation"
            raise ValueError(f"nothing was measured: {self.command} needs {callback}")
        if self.command == "fit":
            print_end(self.trainer, self.model.network)
        elif self.command == "test" and self.trainer.is_global_zero and self.config.ckpt_path:
            print_next(self.config.ckpt_path, self.model.network)


def run(command: str, argv: Sequence[str]) -> None:
    """Run one of the trainer's methods with a config and its overrides."""
    prepare()
    TrainerCLI(argv, command).run()


def build(*argv: str) -> TrainerCLI:
    """Build the `trainer`, `model` and `datamodule` of a config and its overrides, without running them."""
    prepare()
    return TrainerCLI(argv)


def prepare() -> None:
    """Set up the parser, the warnings and the log of this process."""
    keep_whole_numbers(L.Trainer.__init__)
    # A config may name a function that returns an objective, such as losses.end_identity.
    set_parsing_settings(subclasses_enabled=[Objective])
    hide_noise()


def _shards(strategy: Any) -> bool:
    module, _, name = str(getattr(strategy, "class_path", "")).rpartition(".")
    cls = getattr(import_module(module), name, None) if module else None
    return isinstance(cls, type) and issubclass(cls, ModelParallelStrategy)


def _build_network(cls: type[Network], *args: Any, **kwargs: Any) -> Network:
    return on_meta(cls, *args, **kwargs) if is_weightless() else cls(*args, **kwargs)


def _build_around_networks(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Build a teacher or training module, whose networks may come from another package."""
    if is_weightless():
        for argument in (*args, *kwargs.values()):
            _drop_weights(argument)
    built = cls(*args, **kwargs)
    if is_weightless():
        _drop_weights(built)
    return built


def _drop_weights(built: Any) -> None:
    # Only the sharded networks of a teacher: the weights of its other models are not sent.
    networks = built.sharded() if isinstance(built, Teacher) else [built] if isinstance(built, Network) else []
    for network in networks:
        network.to("meta")


def _write_traceback(trainer: L.Trainer) -> Path:
    # trainer.log_dir is a collective operation, which other processes would not join.
    folder = getattr(trainer.logger, "log_dir", None) or getattr(trainer.logger, "save_dir", None)
    file = Path(folder or trainer.default_root_dir) / f"traceback-{trainer.global_rank}.txt"
    with atomic(file) as partial:
        partial.write_text(traceback.format_exc(), encoding="utf-8")
    return file


def _newest(trainer: L.Trainer) -> str:
    """Return a message that this run has no last checkpoint, with the newest one of its experiment."""
    logger = trainer.logger
    folder = Path(trainer.default_root_dir) if logger is None else Path(logger.save_dir or ".", str(logger.name or ""))
    files = sorted(folder.glob("**/checkpoints/last*.ckpt"), key=lambda file: file.stat().st_mtime)
    newest = f"use the newest in {folder}: {files[-1]}" if files else f"found none in {folder}"
    return f"this run has no last checkpoint; {newest}"
