"""decm tune-guidance: measure a teacher on a grid of guidance scale, limit and interval."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from decm_lightning.cli.test import ModelCLI
from decm_lightning.cli.trainer import prepare
from decm_lightning.evaluation.guidance_search import GuidanceSearch, grid
from decm_lightning.evaluation.pretrained import PretrainedModel


class TuneCLI(ModelCLI):
    """The command line of a search, which replaces the Evaluation of the config."""

    builds_module = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the grid, and the samples of each cell."""
        super().add_arguments_to_parser(parser)
        # Literal names, which the shell completion reads.
        parser.add_argument(
            "--scales", type=list[float], default=[1.0, 1.25, 1.5, 1.75, 2.0], help="guidance scales, at least 0"
        )
        limits = "bounds on the guidance (eta), above 0, or null for no bound"
        parser.add_argument("--limits", type=list[float | None], default=[None], help=limits)
        intervals = "first and last guided time, within 0 and 1"
        parser.add_argument("--intervals", type=list[tuple[float, float]], default=[(0.0, 1.0)], help=intervals)
        parser.add_argument("--samples", type=int, default=500, help="samples of each cell, at least 2")
        parser.add_argument("--steps", type=int, default=20, help="Euler steps of each sample, at least 1")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line.

        Raises:
            ValueError: if no model is passed.
        """
        super().parse_arguments(parser, args)
        if not self.path:
            raise ValueError("tune-guidance needs a teacher: decm tune-guidance TEACHER --config FILE")

    def instantiate_classes(self) -> None:
        """Build the search.

        Raises:
            ValueError: if the model is a student, or a value of the grid is out of its range.
        """
        config = self.config
        # The search runs as a validation, on the images of a test.
        config.trainer.limit_val_batches = config.trainer.limit_test_batches
        cells = grid(config.scales, config.limits, config.intervals)
        super().instantiate_classes()
        if isinstance(self.model, PretrainedModel) and self.model.is_student:
            raise ValueError(f"{self.path} is a student, which has learned the guided velocity: pass its teacher")
        search = GuidanceSearch(self.evaluation, cells, f"teacher/euler/{config.steps}", config.samples, self.out)
        # The search prints its own table.
        self.config_init["verbose"] = False
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[callbacks.index(self.evaluation)] = search


def tune_guidance(command: str, argv: Sequence[str]) -> None:
    """Measure the grid, and write its table and heat map."""
    prepare()
    TuneCLI(argv, "validate", command).run()
