"""The command line `decm`. A command's modules are imported only when it runs."""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from typing import NamedTuple

from decm_lightning.cli.early_checks import Reads, check_inputs
from decm_lightning.cli.messages import describe, did_you_mean, is_for_the_user
from decm_lightning.cli.output import Output
from decm_lightning.cli.shipped_configs import with_shipped_configs
from decm_lightning.signals import end

OWN, TRAINING, INFERENCE, PREPARATION = "Your own images", "Training", "Inference and export", "Data preparation"
SETUP = "Setup"
MODEL, IMAGES = "checkpoint or folder", "folder or file"
HEAD = """usage: decm COMMAND [options]

Distill slow diffusion and flow-matching teachers into few-step students (Dual-End Consistency Models).
"""
TAIL = """
decm COMMAND --help lists a command's options. decm fit --config FILE --print_config shows the whole config.
Errors are one line with exit code 2; set DECM_TRACEBACK=1 to see the traceback as well.
decm --version prints the version.
"""


class Command(NamedTuple):
    """A command: a function with typed arguments, which become its options.

    Args:
        function: "module:name" in this package. Functions of `TRAINING` take the command's name and its arguments.
        help: one line.
        group: the heading under which `decm --help` lists it.
        positional: names of the positional arguments.
        reads: arguments that name an existing file or folder, and what error messages call it.
    """

    function: str
    help: str
    group: str
    positional: tuple[str, ...] = ()
    reads: Reads = {}  # noqa: RUF012 - never changed


_CHECKPOINT = {"ckpt_path": "checkpoint"}
_SAMPLED = {"model": MODEL, "latents": "folder of latents"}
_PROMPTED = _SAMPLED | {"prompts": "file of prompts"}
COMMANDS = {
    "new": Command(
        "new:new", "write the configs of a teacher and its student for your images", OWN,
        ("folder",), {"folder": IMAGES},
    ),
    "fit": Command("trainer:run", "train a teacher or a student; resume with --ckpt_path", TRAINING, (), _CHECKPOINT),
    "validate": Command("trainer:run", "evaluate a checkpoint with the metrics of training", TRAINING, (), _CHECKPOINT),
    "test": Command(
        "test:test", "evaluate a checkpoint, or any student or teacher, and write the quality table",
        TRAINING, ("model",), _CHECKPOINT | {"model": MODEL},
    ),
    "tune-guidance": Command(
        "tune_guidance:tune_guidance", "measure a teacher on a grid of guidance scale, limit and interval",
        TRAINING, ("model",), {"model": MODEL},
    ),
    "predict": Command("trainer:run", "generate images on all devices into a folder", TRAINING, (), _CHECKPOINT),
    "sample": Command("sample:sample", "generate images of chosen classes", INFERENCE, ("model",), _SAMPLED),
    "sample-prompts": Command(
        "sample_prompts:sample_prompts", "generate images from a file of prompts", INFERENCE, ("model",), _PROMPTED
    ),
    "app": Command("app:app", "open a page that generates images in the browser", INFERENCE, ("model",), _SAMPLED),
    "export": Command(
        "export:export", "write a student for other programs: a folder, one file, diffusers, LoRA, the hub",
        INFERENCE, ("checkpoint", "out"), {"checkpoint": MODEL},
    ),
    "compare": Command(
        "compare:compare", "compare runs in one report: quality, gradients, samples, settings", INFERENCE, ("runs",)
    ),
    "consolidate": Command(
        "consolidate:consolidate", "merge a sharded checkpoint into one file, to resume on one device",
        INFERENCE, ("checkpoint",), {"checkpoint": "checkpoint"},
    ),
    "score": Command(
        "score:score", "measure images that were generated elsewhere: FID, KID, precision and recall, ...",
        INFERENCE, (), {"samples": IMAGES, "reference": IMAGES},
    ),
    "encode": Command("encode:encode", "encode images into a folder of latents", PREPARATION, (), {"images": IMAGES}),
    "encode-pairs": Command(
        "encode_pairs:encode_pairs", "encode text-image pairs into a cache for training",
        PREPARATION, ("pairs",), {"pairs": IMAGES},
    ),
    "validate-data": Command(
        "validate_data:validate_data", "check a folder of latents and print its statistics and errors",
        PREPARATION, ("folder",), {"folder": "folder"},
    ),
    "configs": Command("shipped_configs:configs", "list the configs of the package, or copy some", SETUP, ("names",)),
    "completion": Command("completion:completion", "print completion for bash, zsh or fish", SETUP, ("shell",)),
}  # fmt: skip


def main() -> int:
    """Run the command that sys.argv names.

    Returns:
        0 on success; 2 after an error, which is printed as one line on standard error; 130 after Ctrl-C. A run that is
        stopped by a signal raises SystemExit with 128 + the signal's number.
    """
    # The streams are None in a process without a console.
    with redirect_stdout(sys.stdout and Output(sys.stdout)), redirect_stderr(sys.stderr and Output(sys.stderr)):
        try:
            return _main(sys.argv[1:])
        finally:
            print(end="", flush=True)


def _main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("decm-lightning"))
        return 0
    try:
        _run(argv[0], argv[1:])
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit code 1.
        if isinstance(error.__context__, KeyboardInterrupt):
            return _interrupted()
        raise
    # torch.distributed.checkpoint's exception does not derive from Exception.
    except BaseException as error:
        if end.received or os.environ.get("DECM_TRACEBACK") or not is_for_the_user(error):
            raise
        print(f"decm: error: {describe(error)}", file=sys.stderr)
        return 2
    return 0


def _run(name: str, argv: Sequence[str]) -> None:
    if name not in COMMANDS:
        raise ValueError("; ".join([f"unknown command {name!r}: see decm --help", *did_you_mean(name, COMMANDS)]))
    command = COMMANDS[name]
    if command.group == TRAINING and not argv:
        needed = f"a {MODEL}, or --config FILE" if command.positional else "--config FILE"
        raise ValueError(f"{name} needs {needed}")
    # It is relative where PATH is, as in PATH=.venv/bin:$PATH. Libraries start it from other folders.
    sys.executable = os.path.abspath(sys.executable)
    argv = with_shipped_configs(argv)
    configs = check_inputs(argv, command.reads, command.positional)
    # Appended, so that a file next to a config cannot shadow an installed package.
    folders = dict.fromkeys(os.path.abspath(folder) for folder in (*map(os.path.dirname, configs), "."))
    sys.path += [folder for folder in folders if folder not in sys.path]
    module, _, function = command.function.partition(":")
    run = getattr(import_module(f"{__name__}.{module}"), function)
    if command.group == TRAINING:
        run(name, argv)
    else:
        from decm_lightning.cli.parsing import call

        call(run, f"decm {name}", command.positional, argv)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = []
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items() if c.group == group]
    return "\n".join([HEAD.rstrip(), *lines, TAIL])


def _interrupted() -> int:
    print("decm: interrupted", file=sys.stderr)
    return 130
