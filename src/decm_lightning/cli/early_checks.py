"""Checks that take milliseconds, before anything is imported: the input files exist, and the configs are YAML."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Reads: TypeAlias = Mapping[str, str]
"""The name of an argument, and what it names."""
WEIGHTS = (".ckpt", ".pt", ".pth", ".safetensors")
# Lightning finds these itself.
CHECKPOINTS = ("best", "last", "hpc")
NETWORKS = ("decm_lightning.teachers.", "decm_lightning.networks.")


def check_inputs(argv: Sequence[str], reads: Reads, positional: Sequence[str]) -> list[str]:
    """Check all that can be checked of a command line and its configs without knowing any class.

    Args:
        argv: the command line after the command's name.
        reads: the arguments that name a file or folder which must exist.
        positional: the names of the arguments that are given without one.

    Returns:
        the config files.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: naming the file and line, if a config is not YAML of keys and values.
    """
    configs, unnamed = [], list(positional)
    tree: dict[str, Any] = {}
    for name, value in _arguments(argv):
        if name in ("c", "config"):
            if (content := _read(value)) is not None:
                configs.append(value)
                tree = _merged(tree, content)
        elif name:
            _set(tree, name.split("."), value)
        elif unnamed:
            tree[unnamed.pop(0)] = value
    if any(map(_only_prints, argv)):
        return configs
    for name, what in reads.items():
        if isinstance(path := tree.get(name), str) and _is_missing(path):
            raise FileNotFoundError(f"no {what} at {path}")
    for key, value in _files(tree, (), ""):
        if _is_missing(value):
            what = "folder" if key[-1] == "folder" else "file" if key[-1] == "vae" else "checkpoint or folder"
            raise FileNotFoundError(f"no {what} at {value} ({'.'.join(key)})")
    return configs


def _only_prints(argument: str) -> bool:
    return argument in ("-h", "--help") or argument.startswith("--print_config")


def _arguments(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each option, and "" and the value of each positional argument."""
    rest = iter(argv)
    for argument in rest:
        if _only_prints(argument):
            continue
        name, given, value = argument.partition("=")
        if argument.startswith("-"):
            yield name.lstrip("-"), value if given else next(rest, "")
        else:
            yield "", argument


def _read(file: str) -> dict[str, Any] | None:
    """Return a config, None where the parser must find out what it is, such as YAML instead of a file's name."""
    # Imported here: it takes as long as all else of the front.
    import yaml

    text = ""
    try:
        text = Path(file).read_text(encoding="utf-8")
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError as error:
        if re.search(r"[:{\n]", file):
            return None
        raise FileNotFoundError(f"no config file at {file}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark, start = error.problem_mark or error.context_mark, error.context_mark
        # The end of a file may be reported as a line of its own.
        place = f"{file}:{min(mark.line, text.count(chr(10))) + 1}" if mark else file
        where = f" ({error.context}, which begins in line {start.line + 1})" if error.context and start else ""
        raise ValueError(f"{place}: not YAML: {error.problem}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ValueError(f"{file} must hold keys such as trainer, model and data: got {found}")
    return content


def _merged(old: Any, new: Any) -> Any:
    """Return a config with a later one on top; the arguments of a class go when another class takes its place."""
    if not (isinstance(old, dict) and isinstance(new, dict)) or new.get("class_path", 0) not in (
        0,
        old.get("class_path"),
    ):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def _set(tree: dict[str, Any], key: Sequence[str], value: str) -> None:
    """Put an option of the command line in its place in the configs."""
    head, *rest = key
    if "class_path" in tree and head not in ("class_path", "init_args"):
        tree = tree.setdefault("init_args", {})
    if rest:
        child = tree.get(head)
        if not isinstance(child, dict):
            child = tree[head] = {"class_path": child} if isinstance(child, str) else {}
        _set(child, rest, value)
        return
    if head == "class_path" and tree.get(head) != value:
        tree.clear()
    tree[head] = value


def _files(tree: Mapping[str, Any], key: tuple[str, ...], cls: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the arguments of this package's classes that must be files; those of other classes may be anything."""
    cls = tree["class_path"] if isinstance(tree.get("class_path"), str) else cls
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _files(value, (*key, name), cls if name == "init_args" else "")
        elif isinstance(value, str) and (
            (name == "path" and cls.startswith(NETWORKS))
            or (name == "folder" and cls.startswith("decm_lightning.data."))
            or (name == "vae" and value.endswith(WEIGHTS) and cls.startswith("decm_lightning.data."))
        ):
            yield (*key, name), value


def _is_missing(value: str) -> bool:
    """Return whether a value can only be the path of a file that does not exist.

    Raises:
        OSError: naming the file, if it may not be looked at.
    """
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) and not value.endswith(WEIGHTS)
    if not value or value in ("null", *CHECKPOINTS) or is_hub_name or re.search(r"[:*?\[{]", value):
        return False
    try:
        # Unlike os.path.exists, which takes a missing permission for a missing file.
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False
