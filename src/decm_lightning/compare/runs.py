"""Read the runs of a comparison, check that they were measured alike, and find the settings in which they differ."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from decm_lightning.evaluation.pretrained import PretrainedModel
from decm_lightning.networks.record import CONFIG, QUALITY, Record
from decm_lightning.training.resuming import settings_of

OWN = ("checkpoint", "weights", "device", "processes", "versions")
"""Lines of a protocol that may differ: they name the tested network and the machine, and do not change any value."""
PARTIAL = ("times of ", "guidance", "data", "paired")
"""Lines that have to agree between the runs that have them."""
NO_EFFECT = ("ckpt_path", "verbose", "weights_only", "trainer.logger", "trainer.callbacks", "trainer.enable_")


@dataclass(eq=False, frozen=True)
class Run:
    """A tested run, or an exported folder with a record.

    Attributes:
        name: the parts of its path that distinguish it from the other runs.
        path: the tested checkpoint, or the exported folder.
        module: the averaged network.
        quality: the table, as in quality.json.
        config: the resolved config.
        trust: import classes from outside this package that the config names, which runs their code.
    """

    name: str
    path: Path
    module: PretrainedModel
    quality: Mapping[str, Any]
    config: Mapping[str, Any]
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

    def protocol(self) -> dict[str, Any]:
        """Return the protocol, with one line for the times of each spec and one for the class of the data."""
        lines = dict(self.quality["protocol"])
        times = [line.partition(": ") for line in str(lines.pop("times (t -> s)", "")).split("; ")]
        lines |= {f"times of {spec}": value for spec, _, value in times if value}
        if all(row["model"] != "teacher" for row in self.rows.values()):
            # Students do not use guidance.
            lines.pop("guidance", None)
        return lines | ({"data": self.config["data"].get("class_path")} if "data" in self.config else {})


def read_runs(folders: Sequence[str], device: str = "cpu", trust: bool = False) -> list[Run]:
    """Read at least two runs, and move their networks to a device.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if there are fewer different folders, or one is not a tested run.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) < max(2, len(paths)):
        raise ValueError(f"give at least two runs, all different: got {', '.join(folders)}")
    common = set.intersection(*(set(path.parts) for path in paths))
    names = ["/".join(part for part in path.parts if part not in common) or path.name for path in paths]
    names = names if len(set(names)) == len(names) else list(folders)
    return [_read(Path(folder), name, device, trust) for folder, name in zip(folders, names, strict=True)]


def compared(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the protocol of all runs, and the settings that differ, as rows of two tables.

    Raises:
        ValueError: naming the lines of the protocol in which the runs differ, except those of `OWN`.
    """
    shared, differing, refused = [], [], []
    for name, values in _by_name({run.name: run.protocol() for run in runs}).items():
        present = {run: value for run, value in values.items() if value is not None}
        if not _differ(present if name.startswith(PARTIAL) else values):
            shared.append({"setting": name, "value": next(iter(present.values()))})
        elif name.startswith(OWN):
            differing.append({"setting": name, **values})
        else:
            texts = {run: "not given" if value is None else value for run, value in values.items()}
            refused.append(f"{name}: " + ", ".join(f"{text} in {run}" for run, text in texts.items()))
    if refused:
        raise ValueError(f"the protocols differ ({'; '.join(refused)}): run decm test with equal settings")
    for name, values in _by_name({run.name: settings_of(run.config) for run in runs}).items():
        if _differ(values) and not name.startswith(NO_EFFECT):
            differing.append({"setting": re.sub(r"\.(init_args|class_path)\b", "", name), **values})
    return shared, differing


def _by_name(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings of runs by name and run, None where a run does not have a setting."""
    names = dict.fromkeys(name for each in settings.values() for name in each)
    return {name: {run: each.get(name) for run, each in settings.items()} for name in names}


def _differ(values: Mapping[str, Any]) -> bool:
    return len(set(map(repr, values.values()))) > 1


def _read(folder: Path, name: str, device: str, trust: bool) -> Run:
    settings, is_exported = folder / "config.yaml", (folder / CONFIG).is_file()
    if not is_exported and not settings.is_file():
        raise ValueError(f"{folder} is not a run or an exported student: it has no {settings.name} and no {CONFIG}")
    # A run may have tables of several checkpoints.
    tables = sorted(folder.glob(f"checkpoints/*.{QUALITY}"), key=lambda file: file.stat().st_mtime)
    table = folder / QUALITY if is_exported else (tables or [folder / "checkpoints" / f"last.{QUALITY}"])[-1]
    path = folder if is_exported else table.with_name(table.name.removesuffix(QUALITY) + "ckpt")
    has_table = table.is_file()
    quality = _checked(_content(table), table, path) if has_table else {}
    module = PretrainedModel(str(path), trust=trust).to(device)
    record = module.average.record or Record()
    quality = quality if has_table else _checked(record.quality or {}, folder, path)
    return Run(name, path, module, quality, _content(settings) if settings.is_file() else record.config or {}, trust)


def _checked(quality: dict[str, Any], place: Path, path: Path) -> dict[str, Any]:
    if not quality.get("protocol") or not quality.get("rows"):
        raise ValueError(f"{place} has no {QUALITY} with a protocol and rows: run decm test {path}")
    return quality


def _content(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        return dict(json.loads(text) if file.suffix == ".json" else yaml.safe_load(text))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
