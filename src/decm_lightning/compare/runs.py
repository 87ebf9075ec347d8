"""Read the runs of a comparison, check that they were measured alike, and find the settings in which they differ."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from decm_lightning.networks.network import CONFIG
from decm_lightning.networks.record import Record
from decm_lightning.training.resuming import settings_of

OWN = ("checkpoint", "weights", "weights sha256", "device", "processes", "versions")
"""Lines of a protocol that may differ: they name the tested network and the machine, and do not change any value."""
TIMES = "times (t -> s)"
PARTIAL = ("times of ", "guidance", "data")
"""Lines that only have to agree between the runs that have them."""
NAMES = ("model", "sampler", "steps", "options", "nfe")
"""Columns of a table that are not measured."""
WITHOUT_EFFECT = ("ckpt_path", "verbose", "weights_only", "trainer.logger", "trainer.callbacks", "trainer.enable_")


@dataclass(frozen=True)
class Run:
    """A tested run, or an exported folder with a record.

    Attributes:
        name: the part of its path that distinguishes it from the other runs.
        network: the tested checkpoint, or the exported folder.
        events: the folder with TensorBoard's files.
        quality: the table, as in quality.json.
        config: the resolved config; empty if an exported folder does not record it.
        steps: training steps that an exported folder records; 0 if the checkpoint stores them.
    """

    name: str
    network: Path
    events: Path
    quality: Mapping[str, Any]
    config: Mapping[str, Any]
    steps: int = 0

    @property
    def model(self) -> Mapping[str, Any]:
        """The arguments of the trained module."""
        return dict(self.config.get("model", {}).get("init_args", {}))

    @property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """The rows of the table by spec, such as "student/mix/2"."""
        rows = self.quality["rows"]
        return {f"{row['model']}/{row['sampler']}{row.get('options') or ''}/{row['steps']}": row for row in rows}


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read at least two runs.

    Raises:
        OSError: if a folder does not exist.
        ValueError: if there are fewer runs, one is passed twice, or a folder has no config or no table.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"give at least two runs to compare: got {len(paths)}")
    if len(set(paths)) < len(paths):
        raise ValueError(f"a run is given twice: {', '.join(folders)}")
    parts = [path.parts for path in paths]
    first = len(os.path.commonprefix(parts))
    last = len(os.path.commonprefix([each[first:][::-1] for each in parts]))
    names = ["/".join(each[first : len(each) - last]) for each in parts]
    # One of the folders may contain another one.
    names = [name or path.name for name, path in zip(names, paths, strict=True)]
    return [_read(Path(folder), name) for folder, name in zip(folders, names, strict=True)]


def shared_protocol(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the protocol of all runs.

    Raises:
        ValueError: naming the lines in which the runs differ, except those of `OWN`.
    """
    lines = [_lines(run) for run in runs]
    shared, differing = {}, []
    for name in dict.fromkeys(name for each in lines for name in each):
        values = {run.name: each.get(name, "not given") for run, each in zip(runs, lines, strict=True)}
        if name.startswith(PARTIAL):
            values = {run: value for run, value in values.items() if value != "not given"}
        shared[name] = next(iter(values.values()))
        if any(value != shared[name] for value in values.values()):
            differing.append(f"{name}: " + ", ".join(f"{value} in {run}" for run, value in values.items()))
    if differing:
        raise ValueError(f"the runs were measured with different protocols ({'; '.join(differing)}): test them alike")
    return shared


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings that differ, with the value of each run; None if a run does not have the setting."""
    settings = []
    for run in runs:
        config = {name.replace(".init_args", ""): value for name, value in settings_of(run.config).items()}
        own = {name: value for name, value in run.quality["protocol"].items() if name in (*OWN, "guidance")}
        settings.append(own | {name.removesuffix(".class_path"): value for name, value in config.items()})
    values = {name: [each.get(name) for each in settings] for each in settings for name in each}
    return {
        name: each
        for name, each in values.items()
        if not name.startswith(WITHOUT_EFFECT) and any(value != each[0] for value in each)
    }


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise FileNotFoundError(f"no run at {folder}")
    exported = (folder / CONFIG).is_file()
    if not exported and not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run or an exported student: it has neither config.yaml nor {CONFIG}")
    record = Record()
    if (folder / "record.json").is_file():
        record = Record.from_dict(_content(folder / "record.json"))
    config = record.config or {} if exported else _content(folder / "config.yaml")
    has_table = (folder / "quality.json").is_file()
    quality = _content(folder / "quality.json") if has_table else record.quality
    network = folder if exported else _checkpoint(folder, quality)
    if quality is None:
        command = f"decm test --config {folder / 'config.yaml'} --ckpt_path {network}"
        raise ValueError(f"{folder} has no quality.json: run {command}" if not exported else f"{folder} has no table")
    if not isinstance(quality.get("protocol"), dict) or not quality.get("rows"):
        raise ValueError(f"{folder / 'quality.json'} is not a table of decm test: it lacks a protocol or rows")
    return Run(name, network, folder if exported else network.parent.parent, quality, config, record.steps)


def _checkpoint(folder: Path, quality: Mapping[str, Any] | None) -> Path:
    """Return the tested checkpoint. A test may write its table to another folder than the training."""
    tested = Path(str(quality["protocol"]["checkpoint"]) if quality else "last.ckpt")
    own = folder / "checkpoints" / tested.name
    return own if own.exists() or not quality else tested


def _content(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = json.loads(text) if file.suffix == ".json" else yaml.load(text, loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a mapping: got {type(content).__name__}")
    return content


def _lines(run: Run) -> dict[str, Any]:
    """Return the lines of a protocol that determine the values, with one line for the times of each spec."""
    lines = {name: value for name, value in run.quality["protocol"].items() if name not in OWN}
    for each in str(lines.pop(TIMES, "")).split("; "):
        spec, _, times = each.partition(": ")
        lines |= {f"times of {spec}": times} if times else {}
    # Students do not use guidance.
    if not any(row["model"] == "teacher" for row in run.quality["rows"]):
        lines.pop("guidance", None)
    data = run.config.get("data", {}).get("class_path")
    return lines | ({"data": data} if data else {})
