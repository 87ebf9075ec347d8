"""decm test: measure a training checkpoint, an exported folder, a public model or a model of diffusers."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from decm_lightning.cli.early_checks import arguments, check_files
from decm_lightning.cli.trainer import TrainerCLI, prepare
from decm_lightning.evaluation import Evaluation
from decm_lightning.evaluation.pretrained import PretrainedModel
from decm_lightning.files import describe_unreadable
from decm_lightning.guidance import Guidance
from decm_lightning.networks.checkpoint_files import read_file
from decm_lightning.networks.hub import is_hub_name
from decm_lightning.networks.record import QUALITY, quality_file
from decm_lightning.networks.sharded import is_sharded, read_rest

RECORD = "record.json"
DEFAULT = {"student": ["student/mix/1", "student/mix/2", "student/mix/4"], "teacher": ["teacher/euler/50"]}
"""The specs of a model that the config does not sample."""
KNOWN = ("decm_lightning.", "lightning.", "torch.")
"""Packages whose classes a config in a checkpoint may name without being trusted."""
EVALUATION = "decm_lightning.evaluation.Evaluation"


class ModelCLI(TrainerCLI):
    """The trainer's command line for a trained model, which replaces the model of the config.

    A training checkpoint and an exported folder carry their config. Other models need --config for data and metrics.

    Args:
        argv: the model, the config and overrides. Without a model, everything is as in `TrainerCLI`.
        command: "test" or "validate".
        program: the name of the command in messages.
    """

    builds_module = True
    """Whether a training checkpoint is read into the module of its config, with the teacher, rather than alone."""

    def __init__(self, argv: Sequence[str], command: str, program: str) -> None:
        self.program = program
        options = dict(reversed(list(arguments(argv))))
        checkpoint = options.get("ckpt_path", "")
        # The same as MODEL. Lightning resolves other names, such as "last".
        self.path = options.get("", checkpoint if Path(checkpoint).exists() else "")
        self.content = _training_checkpoint(Path(self.path)) if self.path else None
        self.needs_checkpoint = not self.path or (self.builds_module and self.content is not None)
        super().__init__(argv, command)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the model and its options."""
        super().add_arguments_to_parser(parser)
        parser.usage = f"decm {self.program} MODEL [--config FILE] [options]"
        parser.add_argument(
            "path", nargs="?", metavar="MODEL",
            help="a training checkpoint; an exported folder; a public LightningDiT, SiT or DiT file; or a pipeline of "
            "diffusers, as a folder or hub name",
        )  # fmt: skip
        parser.add_argument(
            "--out", type=str | None, default=None, help="the folder to write to; by default next to the model"
        )
        parser.add_argument(
            "--guidance", type=Guidance | None, default=None,
            help="guidance of a teacher, such as '{scale: 1.5}'; by default that of the config",
        )  # fmt: skip
        parser.add_argument(
            "--trust", type=bool, default=False, help="import classes from outside this package, which runs their code"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line after the config that the model carries, unless a config is passed."""
        options = list(arguments(args))
        self.is_carried = bool(self.path) and not any(name in ("c", "config") for name, _ in options)
        if self.is_carried:
            if (config := self._carried_config()) is None:
                raise ValueError(f"{self.path} carries no config: give --config FILE, for its data and metrics")
            if ("trust", "true") in options:
                sys.path.append(os.getcwd())
            else:
                _refuse_code(config, self.path)
            args = ["--config", yaml.safe_dump(config), *args]
        if self.path and self.needs_checkpoint:
            args = [*args, "--ckpt_path", self.path]
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Direct all output to one folder, and refuse missing files."""
        super().before_instantiate_classes()
        if not self.path:
            return
        self.write_no_run(self.out)
        module = self.config.get("model.init_args", {})
        if self.config.guidance is not None:
            module["guidance"] = self.config.guidance
        if not self.needs_checkpoint:
            guidance = module.get("guidance")
            self.guidance = Guidance(**guidance.as_dict()) if guidance is not None else Guidance()
            # --ckpt_path may have named the model.
            self.config.model = self.config.ckpt_path = None
        check_files(self.config.as_dict())

    def instantiate_classes(self) -> None:
        """Build everything, with the trained model in place of the config's."""
        super().instantiate_classes()
        if not self.path:
            return
        if not self.needs_checkpoint:
            self.model = PretrainedModel(self.path, self.guidance, self.config.trust)
            if self.model.is_student and self.config.guidance is not None:
                raise ValueError(f"{self.path} is a student, which has learned the guided velocity: remove --guidance")
            if self.model.is_student and not self.is_carried:
                # The guidance of another module.
                self.model.guidance = Guidance()
            if self.model.is_student and self.program == "test":
                self.model.load_teacher()
        if self.command == "test" and any(isinstance(each, Evaluation) for each in self.trainer.callbacks):  # type: ignore
            is_elsewhere = self.config.out is not None or is_hub_name(self.path)
            self.evaluation.table_file = self.out / QUALITY if is_elsewhere else quality_file(self.path)
            self.evaluation.restrict(models := self.model.models(), DEFAULT[next(iter(models))])

    @property
    def out(self) -> Path:
        """The folder to write to."""
        if self.config.out is not None:
            return Path(self.config.out)
        path = Path(self.path)
        if is_hub_name(path):
            return Path(path.name)
        return path if path.is_dir() and not is_sharded(path) else path.parent

    @property
    def evaluation(self) -> Evaluation:
        """The callback that measures."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Evaluation):
                return callback
        raise ValueError(f"the config has no {EVALUATION}: add it to trainer.callbacks, with features and specs")

    def _carried_config(self) -> dict[str, Any] | None:
        """Return the config in a training checkpoint or an exported folder."""
        if self.content is not None:
            config = self.content.get("config")
            return yaml.safe_load(config) if isinstance(config, str) else None
        file = Path(self.path) / RECORD
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({describe_unreadable(file) or error}): export the model again"
            ) from error


def test(command: str, argv: Sequence[str]) -> None:
    """Measure a model and write the quality table."""
    prepare()
    ModelCLI(argv, command, command).run()


def _training_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the content of a training checkpoint, without the weights of a sharded one; None for other models."""
    if is_sharded(path):
        return read_rest(path)
    content = read_file(path) if path.is_file() and path.suffix != ".safetensors" else None
    return content if isinstance(content, dict) and isinstance(content.get("network"), dict) else None


def _refuse_code(tree: Any, path: str) -> None:
    """Refuse a config with classes of other packages: parsing it imports them, which runs their code."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if name == "class_path" and not str(value).startswith(KNOWN):
            raise ValueError(f"{path} carries a config with {value}: pass --trust true if you trust its code")
        _refuse_code(value, path)
