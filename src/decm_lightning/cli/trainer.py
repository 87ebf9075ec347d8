"""decm fit | validate | test | predict: Lightning's own command line over this package's modules."""

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from decm_lightning import distiller, teacher_training  # noqa: F401 - known by name to the parser
from decm_lightning.training import FlowTraining

COMMANDS = ("fit", "validate", "test", "predict")


class TrainerCLI(LightningCLI):
    """Lightning's CLI with two differences.

    The config alone says what is built: a checkpoint's hyperparameters never override it. And `subcommands` are the
    four that this package answers.
    """

    def _parse_ckpt_path(self) -> None:
        # Lightning would let hyperparameters in the checkpoint override the command line, silently.
        pass


def run(argv: Sequence[str]) -> None:
    """Run one of the trainer's commands; argv[0] is its name."""
    # Without a usage line of its own, the parser prints hundreds of options above its error.
    parser_kwargs = {name: {"usage": f"decm {name} --config FILE [options]"} for name in COMMANDS}
    TrainerCLI(
        FlowTraining,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={"prog": "decm", "usage": "decm COMMAND --config FILE [options]", **parser_kwargs},
        args=list(argv),
    )
