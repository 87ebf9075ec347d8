"""Fast checks before the slow imports: input files exist, and configs are valid YAML."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from decm_lightning.cli.shipped_configs import where_weights_are

Reads: TypeAlias = Mapping[str, str]
"""Maps the name of an argument to a description of its file or folder."""
WEIGHTS = (".ckpt", ".pt", ".pth", ".safetensors")
# Lightning resolves these values of ckpt_path.
CHECKPOINTS = ("best", "last", "hpc")
NETWORKS = ("decm_lightning.teachers.", "decm_lightning.networks.")


def check_inputs(argv: Sequence[str], reads: Reads, positional: Sequence[str]) -> list[str]:
    """Check a command line and its configs without importing any class.

    Args:
        argv: the command line after the command's name.
        reads: the arguments that name an existing file or folder.
        positional: the names of the positional arguments.

    Returns:
        the config files.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: naming the file and line, if a config is not a YAML mapping; or if a model is the folder of a run.
    """
    configs, unnamed, named = [], list(positional), {}
    tree: dict[str, Any] = {}
    for name, value in arguments(argv):
        if name in ("c", "config"):
            if (content := _read(value)) is not None:
                configs.append(value)
                tree = _merged(tree, content)
        elif name:
            _set(tree, name.split("."), value)
        elif unnamed:
            named[unnamed.pop(0)] = value
    # The model on the command line replaces the model of a config, whose files are then not needed.
    tree |= named
    if any(map(_only_prints, argv)):
        return configs
    for name, what in reads.items():
        if isinstance(path := tree.get(name), str) and _is_missing(path):
            raise FileNotFoundError(f"no {what} at {path}")
        if isinstance(path, str) and "checkpoint" in what:
            _refuse_run(path)
    check_files(tree)
    return configs


def check_files(tree: Mapping[str, Any]) -> None:
    """Check that the files and folders that a config names exist, and that no network is the folder of a run."""
    for key, value in _files(tree, (), ""):
        if _is_missing(value):
            what = "folder" if key[-1] == "folder" else "file" if key[-1] == "vae" else "checkpoint or folder"
            name = ".".join(key)
            raise FileNotFoundError(f"no {what} at {value} ({name}){where_weights_are(value, name)}")
        if key[-1] == "path":
            _refuse_run(value)


def _refuse_run(path: str) -> None:
    """Raise a ValueError that names the newest checkpoint, if a path is the folder of a run, or a folder of runs."""
    folder = Path(path)
    places = ("last.ckpt", "checkpoints/last.ckpt", "*/checkpoints/last.ckpt")
    found = [file for place in places for file in folder.glob(place)]
    if found and not (folder / "config.json").exists():
        raise ValueError(f"{path} is the folder of a run: use {max(found, key=os.path.getmtime)}")


def _only_prints(argument: str) -> bool:
    return argument in ("-h", "--help") or argument.startswith("--print_config")


def arguments(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each option, and "" and the value of each positional argument."""
    rest = iter(argv)
    for argument in rest:
        if _only_prints(argument):
            continue
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            yield name.lstrip("-"), value if equals else next(rest, "")
        else:
            yield "", argument


def _read(file: str) -> dict[str, Any] | None:
    """Read a config file. Return None if the value is inline YAML instead of a file name."""
    # Importing yaml takes as long as all other checks together.
    import yaml

    text = ""
    try:
        text = Path(file).read_text(encoding="utf-8")
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError as error:
        if re.search(r"[:{\n]", file):
            return None
        raise FileNotFoundError(f"no config file at {file}; decm configs lists those of the package") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark, start = error.problem_mark or error.context_mark, error.context_mark
        # PyYAML may report the end of the file as one line after the last.
        place = f"{file}:{min(mark.line, text.count(chr(10))) + 1}" if mark else file
        where = f" ({error.context}, which begins on line {start.line + 1})" if error.context and start else ""
        raise ValueError(f"{place}: not YAML: {error.problem}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ValueError(f"{file} must be a mapping with keys such as trainer, model and data: got {found}")
    return content


def _merged(old: Any, new: Any) -> Any:
    """Merge a later config into an earlier one. If the class changes, the arguments of the old class are dropped."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if "class_path" in new and new["class_path"] != old.get("class_path"):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def _set(tree: dict[str, Any], key: Sequence[str], value: str) -> None:
    """Set a dotted option of the command line in the merged config."""
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
    """Yield the arguments of this package's classes that must be paths; other classes are not checked."""
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
    """Return whether a value is certainly a path, and nothing exists at it."""
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) and not value.endswith(WEIGHTS)
    if not value or value in ("null", *CHECKPOINTS) or is_hub_name or re.search(r"[:*?\[{]", value):
        return False
    try:
        # os.path.exists would report a permission error as a missing file.
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False
