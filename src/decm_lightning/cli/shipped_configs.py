"""The configs that come with the package: found by name in --config, and listed and copied by `decm configs`."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from decm_lightning.cli.messages import did_you_mean

FOLDER = Path(__file__).parents[1] / "configs"
"""In a checkout a link to configs/, in an installed package a copy of it."""
CHECKOUT_ONLY = ("compare", "rehearsal")
"""They need benchmarks/, which only a checkout has."""


def configs(names: list[str] = [], out: str = ".") -> None:  # noqa: B006 - never changed
    """List the configs of the package, or copy some of them.

    `decm fit --config NAME` accepts each of these names. A file of the working directory with the same name goes first.

    Args:
        names: configs to copy, such as digits/decm.yaml; without any, all are listed.
        out: the folder to copy them into. A config keeps its name, including the folder.
    """
    copies = {_found(name): Path(out) / _short(name) for name in names}
    for copy in copies.values():
        if copy.exists():
            raise FileExistsError(f"{copy} exists already: nothing was copied")
    for shipped, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shipped, copy)
        print(f"wrote {copy}")
    if not names:
        width = max(map(len, shipped_names()))
        for name in shipped_names():
            print(f"{name:<{width}}  {_description(FOLDER / name)}".rstrip())


def shipped_names() -> list[str]:
    """Return the names of all configs, such as digits/decm.yaml, folder by folder."""
    files = (path.relative_to(FOLDER) for pattern in ("*.*", "*/*.*") for path in sorted(FOLDER.glob(pattern)))
    return [file.as_posix() for file in files if file.parts[0] not in CHECKOUT_ONLY]


def with_shipped_configs(argv: Sequence[str]) -> list[str]:
    """Replace the names of shipped configs by their paths: --config digits/decm.yaml or configs/digits/decm.yaml."""
    resolved = []
    for previous, argument in zip(["", *argv], argv, strict=False):
        option, equals, value = argument.partition("=")
        if previous in ("-c", "--config"):
            argument = _path(argument)
        elif equals and option in ("-c", "--config"):
            argument = f"{option}={_path(value)}"
        resolved.append(argument)
    return resolved


def where_weights_are(path: str, key: str) -> str:
    """Return the remedy for missing weights that a shipped config names, "" for other paths."""
    top, _, name = path.partition("/")
    name = f"{name.partition('/')[0]}/teacher.yaml"
    if top != "weights" or name not in shipped_names():
        return ""
    train = f"decm fit --config {name}, and give its checkpoint with --{key}"
    return f". Only a checkout of the repository has the folder weights: run there, or run {train}"


def _path(value: str) -> str:
    is_shipped = _short(value) in shipped_names() and not Path(value).exists()
    return str(FOLDER / _short(value)) if is_shipped else value


def _short(name: str) -> str:
    return name.removeprefix("configs/")


def _found(name: str) -> Path:
    if _short(name) not in (known := shipped_names()):
        raise ValueError("; ".join([f"no config is named {name!r}: see decm configs", *did_you_mean(name, known)]))
    return FOLDER / _short(name)


def _description(file: Path) -> str:
    """Return the first sentence of the comment at the head of a config."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:3] if line.startswith("#"))
    return comment.partition(". ")[0].rstrip(".")
