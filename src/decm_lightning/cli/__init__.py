"""The command line, `decm`: a thin front that knows the subcommands and imports what one needs only when it runs."""

import os
import sys
from collections.abc import Callable, Sequence

HELP = """usage: decm COMMAND [options]

Fast image generators from slow diffusion and flow-matching teachers (Dual-End Consistency Models).

train and test, each with --config FILE and dotted overrides such as --trainer.max_steps 100:
  fit        train a teacher or distil a student, or go on with --ckpt_path
  validate   measure a checkpoint as during training
  test       measure a checkpoint and write the table of quality by sampler and steps
  predict    draw samples for the labels of the data module

use what was trained:
  sample     draw images from a checkpoint or folder: a grid, or one file each
  export     write a checkpoint's averaged weights as a folder (config.json, model.safetensors)

decm COMMAND --help lists a command's options. decm fit --print_config prints a config with every default.
Errors are one line with exit code 2; set DECM_TRACEBACK=1 for the traceback as well.
"""


def _train(argv: Sequence[str]) -> None:
    from decm_lightning.cli.trainer import run

    run(argv)


def _sample(argv: Sequence[str]) -> None:
    from decm_lightning.cli.sample import run

    run(argv)


def _export(argv: Sequence[str]) -> None:
    from decm_lightning.cli.export import run

    run(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "fit": _train,
    "validate": _train,
    "test": _train,
    "predict": _train,
    "sample": _sample,
    "export": _export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after one line on standard error that says what was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        return _refuse(f"no command {command!r}: expected one of {', '.join(COMMANDS)}")
    try:
        # The trainer's own parser reads the command, the others do not.
        COMMANDS[command](argv if COMMANDS[command] is _train else rest)
    except Exception as error:
        if os.environ.get("DECM_TRACEBACK") or not _is_for_the_user(error):
            raise
        return _refuse(str(error))
    return 0


def _is_for_the_user(error: Exception) -> bool:
    from decm_lightning.errors import NonFiniteError

    return isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, NonFiniteError))


def _refuse(message: str) -> int:
    print(f"decm: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
