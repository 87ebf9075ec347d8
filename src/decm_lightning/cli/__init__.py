"""The command line, `decm`: a thin front that knows the subcommands and imports what one needs only when it runs."""

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

HELP = """usage: decm COMMAND [options]

Fast image generators from slow diffusion and flow-matching teachers (Dual-End Consistency Models).

train and test, each with --config FILE and dotted overrides such as --trainer.max_steps 100:
  fit        train a teacher or distil a student, or go on with --ckpt_path
  validate   measure a checkpoint as during training
  test       measure a checkpoint and write the table of quality by sampler and steps
  predict    draw samples for the labels of the reference images, into a folder

use what was trained:
  sample     draw images of classes, or of a file of prompts, from a checkpoint or folder
  export     write a checkpoint's averaged weights as a folder (config.json, model.safetensors)
  consolidate  make one file, or such a folder, of a checkpoint that several processes have written in shards

make and look at what you will train on:
  encode         images into a folder of latents of a VAE, on all devices; started again, it resumes;
                 with --pairs, text-image pairs into the cache of a training (decm encode --pairs SOURCE --help)
  validate-data  read a whole folder of latents, and say what is in it or what is wrong with it

decm COMMAND --help lists a command's options. decm fit --config FILE --print_config shows the whole config.
Errors are one line with exit code 2; set DECM_TRACEBACK=1 for the traceback as well.
"""


# Lines of the parser's messages that say what it tried, not what is wrong.
LAYERS = (
    r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value|Problem with given|"
    r"Subclass types expect|a class path \(str\)|a dict with"
)
# Where the `run` of each command is.
COMMANDS = {
    "fit": "decm_lightning.cli.trainer",
    "validate": "decm_lightning.cli.trainer",
    "test": "decm_lightning.cli.trainer",
    "predict": "decm_lightning.cli.trainer",
    "sample": "decm_lightning.cli.sample",
    "export": "decm_lightning.cli.export",
    "consolidate": "decm_lightning.cli.consolidate",
    "encode": "decm_lightning.cli.encode",
    "validate-data": "decm_lightning.cli.validate_data",
}


def main() -> int:
    """Run the command that sys.argv names.

    Returns:
        0; 2 after one line on standard error that says what was wrong; 130 after Ctrl-C. A run that a signal stops
        raises SystemExit with 128 + the signal's number.
    """
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    command, *argv = sys.argv[1:]
    if command not in COMMANDS:
        return _refuse(f"no command {command!r}: expected one of {', '.join(COMMANDS)}")
    try:
        _run(command, argv)
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit code 1.
        if isinstance(error.__context__, KeyboardInterrupt):
            return _interrupted()
        raise
    # torch.distributed.checkpoint's is no Exception.
    except BaseException as error:
        if os.environ.get("DECM_TRACEBACK") or not _is_for_the_user(error):
            raise
        return _refuse("; ".join([_what(error), *getattr(error, "__notes__", ())]))
    return 0


def essence(message: str) -> str:
    """Return the parser's message on one line: the key and what is wrong with it, without the layers around it."""
    lines = [re.sub(r"^\s*- ", "", line).strip() for line in message.splitlines()]
    keys = [key for line in lines for key in re.findall(r'Parser key "([^"]+)"', line)]
    faults = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in lines if not re.match(LAYERS, line)]
    faults = [fault for fault in faults if fault]
    # Beside it stands what is wrong with the arguments of a class that is valid.
    for general in ("Not a valid subclass", "Expected a <class"):
        faults = [fault for fault in faults if not fault.startswith(general)] or faults
    what = "; ".join(dict.fromkeys(faults))
    # Where several types would do, what was given stands apart. A whole config would hide the rest.
    given = [line.removeprefix("Given value: ") for line in lines if re.match(r"Given value: .{1,60}$", line)]
    given = [re.sub(r"^NestedArg\(key='.*', val='?(.*?)'?\)$", r"\1", value) for value in given]
    what += "".join(f". Got value: {value}" for value in given[:1])
    what = re.sub(r"(arguments are required: (fit|validate|test|predict)\..*)", r"\1: give them in --config FILE", what)
    return f"{'.'.join(keys)}: {what}" if keys else what


def _run(command: str, argv: Sequence[str]) -> None:
    module = COMMANDS[command]
    if command == "encode" and any(arg.partition("=")[0] == "--pairs" for arg in argv):
        module = "decm_lightning.cli.encode_pairs"
    run = import_module(module).run
    if module == "decm_lightning.cli.trainer":
        run([command, *argv])
    else:
        run(argv)


def _is_for_the_user(error: BaseException) -> bool:
    from argparse import ArgumentError

    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    from decm_lightning.derivatives import NoTangentError
    from decm_lightning.errors import NonFiniteError

    ours = (ArgumentError, ValueError, OSError, ImportError, NonFiniteError, NoTangentError)
    return isinstance(error, (*ours, MisconfigurationException, SafetensorError, CheckpointException))


def _what(error: BaseException) -> str:
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):
        from decm_lightning.networks.sharded import cause

        return f"a sharded checkpoint cannot be read or written: {cause(error)}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return essence(str(error))


def _interrupted() -> int:
    print("decm: interrupted", file=sys.stderr)
    return 130


def _refuse(message: str) -> int:
    print(f"decm: error: {message}", file=sys.stderr)
    return 2
