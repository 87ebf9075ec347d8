"""decm fit | validate | test | predict: Lightning's own command line over this package's modules."""

import logging
import signal
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from inspect import signature, unwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from decm_lightning import distiller, teacher_training  # noqa: F401 - known by name to the parser
from decm_lightning.files import atomic
from decm_lightning.losses import Objective, end_identity
from decm_lightning.networks import Network
from decm_lightning.networks.network import check_compiler
from decm_lightning.networks.pretrained import refuse_partial
from decm_lightning.networks.weightless import is_weightless, on_meta, without_weights
from decm_lightning.signals import end_at_sigterm
from decm_lightning.teachers import Teacher
from decm_lightning.training.flow_training import FlowTraining
from decm_lightning.training.resuming import differences, settings_of

log = logging.getLogger(__name__)
COMPARED = ("trainer", "data")
WITHOUT_EFFECT = (
    "trainer.logger",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "trainer.enable_",
    "trainer.log_every_n_steps",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
)
"""Settings that leave the weights of a run as they are."""
COMMANDS = ("fit", "validate", "test", "predict")
# Warnings of libraries about each other, in which a user's own would be lost.
NOISE = (
    "LightningCLI's args parameter",
    "'set_vital' is deprecated",
    ".*LeafSpec.* is deprecated",
    "The number of training batches .* is smaller than the logging interval",
    "The '.*_dataloader' does not have many workers",
    ".*does not have many workers which may be a bottleneck",
    # Batches of rows that the loader's own sampler knows.
    "Couldn't infer the batch indices",
    # Latents without their VAE, on purpose: they only train.
    "Total length of `list` across ranks is zero",
)


class ConfigSaver(SaveConfigCallback):
    """Saves the resolved config next to the checkpoints, and within each of them."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the config, as YAML that repeats the run."""
        checkpoint["config"] = self._dumped()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Name the settings of data and trainer that differ from the checkpoint's; the module names its own."""
        if trainer.state.fn != "fit" or "config" not in checkpoint:
            return
        saved, own = (
            settings_of({key: config.get(key) for key in COMPARED})
            for config in map(yaml.safe_load, (checkpoint["config"], self._dumped()))
        )
        differing = {n: v for n, v in differences(saved, own).items() if not n.startswith(WITHOUT_EFFECT)}
        if differing:
            log.warning("resuming with the config's settings: %s", ", ".join(f"{n} {v}" for n, v in differing.items()))

    def _dumped(self) -> str:
        return self.parser.dump(self.config, skip_none=False)


class TrainerCLI(LightningCLI):
    """Lightning's CLI, in which the config alone says what is built."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Keep the weights of networks that will be sharded in the first process of each machine alone."""
        parser.add_instantiator(_build_network, Network)
        parser.add_instantiator(_build_around_networks, Teacher)
        parser.add_instantiator(_build_around_networks, FlowTraining)

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything must be from 0 to 2**32 - 1: got {seed}")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuse to measure a network that nobody trained, to train for no step, and to compile with an old torch.

        Raises:
            ValueError: if validate, test or predict has no checkpoint, fit no steps, or torch is too old to compile.
        """
        command = self.subcommand
        if command == "fit" and self.config[command].get("model.init_args.compile"):
            check_compiler()
        for limit in ("max_steps", "max_epochs"):
            if command == "fit" and self.config[command].trainer[limit] == 0:
                raise ValueError(f"trainer.{limit} must be at least 1, or -1 for no limit: got 0")
        if command in ("validate", "test", "predict") and not self.config[command].ckpt_path:
            raise ValueError(f"{command} needs --ckpt_path: without a checkpoint the student is untrained")
        if command is not None:
            _spell_out(self.config[command])

    def instantiate_classes(self) -> None:
        """Build everything, and refuse a checkpoint that does not suit it before any process has begun to read it.

        Raises:
            ValueError: if it holds another network, not all that will be read, or is sharded and the strategy cannot
                read that; or if predict has nothing that says what to draw.
        """
        strategy = self.config[self.subcommand].trainer.strategy if self.subcommand else None
        # The first process sends each of the others its shard.
        is_filled = bool(getattr(rank_zero_only, "rank", 0)) and _shards(strategy)
        try:
            with without_weights() if is_filled else nullcontext():
                super().instantiate_classes()
        except RuntimeError as error:
            # Such as SLURM_NTASKS without SLURM_NTASKS_PER_NODE: a setting, not a bug.
            raise ValueError(f"the trainer cannot be built: {error}") from error
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.subcommand == "predict" and not any(isinstance(c, BasePredictionWriter) for c in callbacks):
            writer = "--trainer.callbacks+ decm_lightning.evaluation.SampleWriter --trainer.callbacks.folder FOLDER"
            raise ValueError(f"predict needs a SampleWriter, which says what to draw, and where to: add {writer}")
        path = self.config[self.subcommand].ckpt_path if self.subcommand else None
        if path:
            self._check_exists(path)
            self.model.check_checkpoint(path, self.trainer.strategy)
            if Path(path).is_file():
                refuse_partial(Path(path), self.model, self.subcommand == "fit")

    def _check_exists(self, path: str) -> None:
        """Refuse a checkpoint that is not there: Lightning continues without one if it is called "last"."""
        if "://" in path or path.startswith("registry:"):
            return
        if path == "best":
            raise ValueError("--ckpt_path best is known only to the process that trained: give the checkpoint's path")
        if path == "hpc":
            if self.trainer._checkpoint_connector._hpc_resume_path is None:
                raise ValueError(f"--ckpt_path hpc: there is no hpc_ckpt_N.ckpt in {self.trainer.default_root_dir}")
        elif path == "last":
            found = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            if not any(callback._find_last_checkpoints(self.trainer) for callback in found):
                raise ValueError(f"--ckpt_path last: {_newest(self.trainer)}")
        elif not Path(path).exists():
            raise FileNotFoundError(f"no checkpoint at {path}")

    def _run_subcommand(self, subcommand: str) -> None:
        # From now on there may be other processes, which would prepare data for hours after this one has ended.
        signal.signal(signal.SIGTERM, end_at_sigterm(self.trainer))
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            # An error in the middle of a run is one line on the terminal; where it came from must not be lost.
            if any(frame.name == "_run_stage" for frame in traceback.extract_tb(error.__traceback__)):
                # A disk that is full must not hide why.
                with suppress(OSError):
                    error.add_note(f"traceback in {_write_traceback(self.trainer)}")
            raise

    def after_validate(self) -> None:
        """Refuse to end in silence.

        Raises:
            ValueError: if nothing was measured.
        """
        if not self.trainer.callback_metrics:
            callback = "a callback that logs, such as decm_lightning.evaluation.Evaluation"
            raise ValueError(f"nothing was measured: {self.subcommand} needs {callback}")

    after_test = after_validate

    def _parse_ckpt_path(self) -> None:
        # Lightning would let hyperparameters in the checkpoint override the command line, silently.
        pass


def run(argv: Sequence[str]) -> None:
    """Run one of the trainer's commands; argv[0] is its name.

    Raises:
        ValueError: among others, if a config is no YAML of keys and values.
    """
    _check_configs(argv)
    # A usage line of its own, or the parser's would list hundreds of options; errors are shortened by the front.
    usage = {name: {"usage": f"decm {name} --config FILE [options]", "exit_on_error": False} for name in COMMANDS}
    _cli(argv, parser_kwargs={"prog": "decm", "exit_on_error": False} | usage)


def build(*argv: str) -> TrainerCLI:
    """Return what a config and its overrides name, without running it: `.trainer`, `.model` and `.datamodule`."""
    return _cli(argv, parser_kwargs={"exit_on_error": False}, run=False)


def _shards(strategy: Any) -> bool:
    module, _, name = str(getattr(strategy, "class_path", "")).rpartition(".")
    cls = getattr(import_module(module), name, None) if module else None
    return isinstance(cls, type) and issubclass(cls, ModelParallelStrategy)


def _build_network(cls: type[Network], *args: Any, **kwargs: Any) -> Network:
    return on_meta(cls, *args, **kwargs) if is_weightless() else cls(*args, **kwargs)


def _build_around_networks(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Build a teacher or a training, whose networks may come from a function or class of another package."""
    if is_weightless():
        for argument in (*args, *kwargs.values()):
            _drop_weights(argument)
    built = cls(*args, **kwargs)
    if is_weightless():
        _drop_weights(built)
    return built


def _drop_weights(built: Any) -> None:
    # Of a teacher only the networks that are sharded: nobody fills another model.
    networks = built.networks() if isinstance(built, Teacher) else [built] if isinstance(built, Network) else []
    for network in networks:
        network.to("meta")


def _write_traceback(trainer: L.Trainer) -> Path:
    # Not trainer.log_dir, for which all processes would have to agree.
    folder = getattr(trainer.logger, "log_dir", None) or getattr(trainer.logger, "save_dir", None)
    file = Path(folder or trainer.default_root_dir) / f"traceback-{trainer.global_rank}.txt"
    with atomic(file) as partial:
        partial.write_text(traceback.format_exc(), encoding="utf-8")
    return file


def _newest(trainer: L.Trainer) -> str:
    """Say that this run has no last checkpoint, and which is the newest of its experiment."""
    logger = trainer.logger
    folder = Path(trainer.default_root_dir if logger is None else logger.save_dir or ".")
    folder = folder / str(logger.name or "") if logger is not None else folder
    files = sorted(folder.glob("**/checkpoints/last*.ckpt"), key=lambda file: file.stat().st_mtime)
    newest = f"the newest in {folder} is {files[-1]}, give its path" if files else f"there is none in {folder}"
    return f"this run has no last checkpoint; {newest}"


def _spell_out(config: Namespace) -> None:
    """Write the default objective out, so that a saved config repeats the run when the default has changed."""
    arguments = config.get("model.init_args")
    if arguments is not None and "objective" in arguments and arguments.objective is None:
        defaults = {name: parameter.default for name, parameter in signature(end_identity).parameters.items()}
        name = f"{end_identity.__module__}.{end_identity.__qualname__}"
        arguments.objective = Namespace(class_path=name, init_args=Namespace(**defaults))


def _check_configs(argv: Sequence[str]) -> None:
    # The parser's own messages do not name the file.
    files = [after for flag, after in pairwise(argv) if flag in ("-c", "--config")]
    files += [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")]
    for file in map(Path, files):
        if not file.is_file():
            continue
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict):
            found = "nothing" if config is None else type(config).__name__
            raise ValueError(f"{file} must hold keys such as trainer, model and data: got {found}")


def _keep_whole_numbers() -> None:
    """Let the parser read 1 batch as 1, not as 1.0, which stands for all batches."""
    # typing caches Optional[Union[int, float]] in the order in which any library has written it first.
    annotations = unwrap(L.Trainer.__init__).__annotations__
    numbers = int | float | None
    annotations.update({name: numbers for name, kind in annotations.items() if kind == numbers})


def _cli(argv: Sequence[str], **options: Any) -> TrainerCLI:
    _keep_whole_numbers()
    # An objective may come from a function that returns one, such as losses.end_identity.
    set_parsing_settings(subclasses_enabled=[Objective])
    for noise in NOISE:
        warnings.filterwarnings("ignore", noise)
    log = logging.getLogger("decm_lightning")
    if getattr(rank_zero_only, "rank", 0) == 0 and not log.handlers:
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler())
    return TrainerCLI(
        FlowTraining,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        save_config_callback=ConfigSaver,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        args=list(argv),
        **options,
    )
