"""Read the runs of a comparison, check that they were measured alike, and find the settings in which they differ."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from decm_lightning.networks import Network, load
from decm_lightning.networks.network import CONFIG
from decm_lightning.networks.record import Record
from decm_lightning.training.resuming import settings_of

OWN = ("checkpoint", "weights", "weights sha256", "device", "processes", "versions")
"""Lines of a protocol that may differ: they name the tested network and the machine, and do not change any value."""
PARTIAL = ("times of ", "guidance", "data")
"""Lines that have to agree between the runs that have them. Students do not use guidance."""
WITHOUT_EFFECT = ("ckpt_path", "verbose", "weights_only", "trainer.logger", "trainer.callbacks", "trainer.enable_")


@dataclass(frozen=True)
class Run:
    """A tested run, or an exported folder with a record.

    Attributes:
        name: the parts of its path that distinguish it from the other runs.
        path: the tested checkpoint, or the exported folder.
        quality: the table, as in quality.json.
        config: the resolved config; empty if an exported folder does not record it.
        steps: training steps that an exported folder records; 0 if the checkpoint stores them.
        device: the device of its networks.
        trust: import classes from outside this package, which runs their code.
    """

    name: str
    path: Path
    quality: Mapping[str, Any]
    config: Mapping[str, Any]
    steps: int
    device: str
    trust: bool

    @property
    def model(self) -> Mapping[str, Any]:
        """The arguments of the trained module."""
        return dict(self.config.get("model", {}).get("init_args", {}))

    @property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """The rows of the table by spec, such as "student/mix/2"."""
        rows = self.quality["rows"]
        return {f"{row['model']}/{row['sampler']}/{row['steps']}{row.get('options', '')}": row for row in rows}

    @cached_property
    def network(self) -> Network:
        """The averaged network in eval mode."""
        return load(self.path, self.device, self.trust)


def read_runs(folders: Sequence[str], device: str = "cpu", trust: bool = False) -> list[Run]:
    """Read at least two runs; see `Run` for the arguments.

    Raises:
        OSError: if a folder or a file does not exist.
        ValueError: if there are fewer different folders, or one is not a tested run.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) < max(2, len(paths)):
        raise ValueError(f"give at least two runs, all different: got {', '.join(folders)}")
    common = set.intersection(*(set(path.parts) for path in paths))
    names = ["/".join(part for part in path.parts if part not in common) or path.name for path in paths]
    names = names if len(set(names)) == len(names) else list(folders)
    return [_read(Path(folder), name, device, trust) for folder, name in zip(folders, names, strict=True)]


def shared_protocol(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the protocol of all runs.

    Raises:
        ValueError: naming the lines in which the runs differ, except those of `OWN`.
    """
    lines = {run.name: _lines(run) for run in runs}
    shared, differing = {}, []
    for name in dict.fromkeys(name for each in lines.values() for name in each):
        owners = {run: each for run, each in lines.items() if name in each or not name.startswith(PARTIAL)}
        values = {run: each.get(name, "not given") for run, each in owners.items()}
        shared[name] = next(iter(values.values()))
        if any(value != shared[name] for value in values.values()):
            differing.append(f"{name}: " + ", ".join(f"{value} in {run}" for run, value in values.items()))
    if differing:
        raise ValueError(f"the protocols differ ({'; '.join(differing)}): run decm test with equal settings")
    return shared


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the settings that differ, as rows of a table. A run may not have a setting."""
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        own = {name: value for name, value in run.quality["protocol"].items() if name in (*OWN, "guidance")}
        for name, value in {**own, **settings_of(run.config)}.items():
            name = name.replace(".init_args", "").removesuffix(".class_path")
            settings.setdefault(name, dict.fromkeys([each.name for each in runs]))[run.name] = value
    names = [name for name, values in settings.items() if len(set(map(repr, values.values()))) > 1]
    return [{"setting": name, **settings[name]} for name in names if not name.startswith(WITHOUT_EFFECT)]


def _read(folder: Path, name: str, device: str, trust: bool) -> Run:
    if not folder.is_dir():
        raise FileNotFoundError(f"no run at {folder}")
    settings, table, is_exported = folder / "config.yaml", folder / "quality.json", (folder / CONFIG).is_file()
    if not is_exported and not settings.is_file():
        raise ValueError(f"{folder} is not a run or an exported student: it has neither {settings.name} nor {CONFIG}")
    record = Record.from_dict(_content(folder / "record.json")) if is_exported else Record(config=_content(settings))
    if not table.is_file() and record.quality is None:
        tested = folder if is_exported else f"--config {settings} --ckpt_path {folder / 'checkpoints/last.ckpt'}"
        raise ValueError(f"{folder} has no {table.name}: run decm test {tested}")
    quality = _content(table) if table.is_file() else record.quality or {}
    if not isinstance(quality.get("protocol"), dict) or not quality.get("rows"):
        raise ValueError(f"{table} is not a table of decm test: it lacks a protocol or rows")
    # decm test may write its table to another folder than the training's, which has the checkpoint.
    tested = Path(str(quality["protocol"].get("checkpoint")))
    moved = folder / "checkpoints" / tested.name
    path = folder if is_exported else moved if moved.exists() else tested
    return Run(name, path, quality, record.config or {}, record.steps, device, trust)


def _content(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        return dict(json.loads(text) if file.suffix == ".json" else yaml.safe_load(text))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _lines(run: Run) -> dict[str, Any]:
    """Return the lines of a protocol that determine the values, with one line for the times of each spec."""
    lines = {name: value for name, value in run.quality["protocol"].items() if name not in OWN}
    times = [line.partition(": ") for line in str(lines.pop("times (t -> s)", "")).split("; ")]
    lines |= {f"times of {spec}": value for spec, _, value in times if value}
    if not any(row["model"] == "teacher" for row in run.quality["rows"]):
        lines.pop("guidance", None)
    return lines | ({"data": run.config["data"].get("class_path")} if "data" in run.config else {})
