"""What a trained network needs in order to be sampled, evaluated and published without its config."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from decm_lightning.files import write_json
from decm_lightning.networks.sharded import is_sharded
from decm_lightning.samplers import SAMPLERS, Sampler
from decm_lightning.samplers.options import read_options, write_options
from decm_lightning.samplers.steps import check_steps

CONFIG, RECORD, QUALITY = "config.json", "record.json", "quality.json"
"""The files in a network folder with its description, its record, and the table of a later `decm test`."""
WEIGHTS_HASH = "weights sha256"
"""The line of a table's protocol with the hash of the tested network, `Network.identity`."""
FLOW_MAP_SAMPLING = {1: "mix", 2: "mix", 4: "consistency", 8: "consistency", 50: "euler"}
"""The sampler by number of steps for flow maps without measurements. With 1 step, mix equals consistency."""
VELOCITY_SAMPLING = {50: "euler"}
"""The same for networks that ignore the end time. Large steps of any sampler lead to class means."""
DISTANCES = ("fid", "fd")
"""The columns of a table by which samplers are compared: the smallest value is the best."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """A pretrained network that a record refers to, such as a teacher, a text encoder or a VAE; or the training data.

    Attributes:
        name: the path or name from which it was loaded; "" if unknown.
        identity: a hash of its content.
        license: its license as an SPDX identifier or a name of the Hugging Face hub; "" if unknown.
    """

    name: str
    identity: str
    license: str = ""

    def __str__(self) -> str:
        """Return the name and the beginning of the hash, for messages."""
        return " ".join(part for part in (self.name, f"({shortened(self.identity)})") if part)


@dataclass(frozen=True)
class Record:
    """The origin and the use of a trained network. Checkpoints store it, and exported folders have it as record.json.

    Attributes:
        teacher: the teacher that the network was distilled from; None for a teacher.
        guidance: the teacher's guidance: scale, limit and interval; None without a teacher.
        objective: the losses with their settings, as text.
        steps: training steps.
        class_names: names of the classes by label; empty if unknown.
        text_encoder: the encoder of its captions; None for a network without captions.
        vae: the VAE of its latents; None if its samples are images, or the VAE is unknown.
        latents: mean, std and multiplier of the latents' normalization, see `LatentNormalization.as_json`; None if its
            samples are images.
        sampling: the recommended sampler with its options by number of steps, such as {2: "mix?s1=0.6"}; empty for the
            defaults of `recommended`.
        quality: the table that `decm test` measured, as in quality.json.
        data: the data it was trained on: name, identity, license.
        config: the resolved config of the run, from which `decm test` builds data and metrics.
    """

    teacher: Reference | None = None
    guidance: dict[str, Any] | None = None
    objective: str = ""
    steps: int = 0
    class_names: tuple[str, ...] = ()
    text_encoder: Reference | None = None
    vae: Reference | None = None
    latents: dict[str, Any] | None = None
    sampling: dict[int, str] = field(default_factory=dict)
    quality: dict[str, Any] | None = None
    data: Reference | None = None
    config: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain values, as JSON stores them."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Record":
        """Return the record of plain values, as `as_dict` returns them. Missing values have their defaults.

        Raises:
            ValueError: if a recommended sampler is not one of this package: a file must not decide which code runs.
            TypeError: if a name is unknown.
        """
        read = dict(values)
        for name in ("teacher", "text_encoder", "vae", "data"):
            if read.get(name) is not None:
                read[name] = Reference(**read[name])
        read["class_names"] = tuple(read.get("class_names", ()))
        read["sampling"] = {int(steps): name for steps, name in read.get("sampling", {}).items()}
        for steps, name in read["sampling"].items():
            if steps < 1:
                raise ValueError(f"sampling must have numbers of steps from 1: got {steps}")
            if name.partition("?")[0] not in SAMPLERS:
                raise ValueError(f"a recommended sampler must be one of {', '.join(SAMPLERS)}: got {name!r}")
        return cls(**read)


def choose(
    record: Record | None, reads_end_time: bool, sampler: str | Sampler | None, steps: int | None
) -> tuple[str | Sampler, int]:
    """Return the requested sampler and steps, or the recommended ones instead of None.

    Without a requested number, it is the recommended number of steps nearest to 2, or to 50 for a network that ignores
    the end time. For a requested sampler it is 50 for euler, and otherwise 2.

    Raises:
        ValueError: if steps is below 1.
    """
    sampling = (record.sampling if record else None) or default_sampling(reads_end_time)
    if steps is None and sampler is None:
        steps = nearest(sampling, 2 if reads_end_time else 50)
    elif steps is None:
        steps = 50 if isinstance(sampler, str) and sampler.partition("?")[0] == "euler" else 2
    return (recommended(sampling, steps) if sampler is None else sampler), steps


def default_sampling(reads_end_time: bool) -> dict[int, str]:
    """Return the sampler by number of steps of a network without measurements."""
    return FLOW_MAP_SAMPLING if reads_end_time else VELOCITY_SAMPLING


def measured_sampling(quality: Mapping[str, Any]) -> dict[int, str]:
    """Return the sampler with the smallest Fréchet distance for each number of steps in a table of `decm test`.

    Rows of a teacher next to a student, of samplers outside this package, and without a finite distance are ignored.

    Example:
        >>> row = {"model": "student", "steps": 4, "options": {}}
        >>> rows = [row | {"sampler": "mix", "fd": 0.3}, row | {"sampler": "consistency", "fd": 0.2}]
        >>> measured_sampling({"rows": rows})
        {4: 'consistency'}
    """
    rows = [row for row in quality["rows"] if row["sampler"] in SAMPLERS]
    students = [row for row in rows if row["model"] == "student"]
    best: dict[int, tuple[float, str]] = {}
    for row in students or rows:
        distance = next((row[column] for column in DISTANCES if column in row), math.nan)
        name = f"{row['sampler']}{write_options(row.get('options', {}))}"
        if math.isfinite(distance) and distance < best.get(row["steps"], (math.inf, ""))[0]:
            best[row["steps"]] = distance, name
    return {steps: name for steps, (_, name) in sorted(best.items())}


def recommended(sampling: Mapping[int, str], steps: int) -> str:
    """Return the recommended sampler for a number of steps: that of the nearest number, by ratio.

    The times of a sampler only fit its own number of steps, and are left out for others.

    Example:
        >>> recommended({2: "mix?s1=0.6", 8: "consistency"}, steps=3)
        'mix?s1=0.6'
    """
    check_steps(steps)
    number = nearest(sampling, steps)
    name, _, query = sampling[number].partition("?")
    options = read_options(query, sampling[number])
    if number != steps:
        options.pop("times", None)
    return f"{name}{write_options(options)}"


def nearest(sampling: Mapping[int, str], steps: int) -> int:
    """Return the number of steps in `sampling` that is nearest to `steps`, by ratio."""
    return min(sampling, key=lambda number: abs(math.log(number / steps)))


def shortened(identity: str) -> str:
    """Return an identity with hashes cut to 16 digits, for messages."""
    return " ".join(part[:16] if len(part) == 64 else part for part in identity.split())


def quality_file(path: str | Path) -> Path:
    """Return the file to which `decm test` writes the table of a model: quality.json in its folder.

    The table of a file or a sharded checkpoint is next to it, such as last.quality.json for last.ckpt.
    """
    path = Path(path)
    is_folder = path.is_dir() and not is_sharded(path)
    return path / QUALITY if is_folder else path.with_suffix(f".{QUALITY}")


def write_record(record: Record | None, folder: Path) -> None:
    """Write record.json, or remove that of a previous network."""
    if record is None:
        (folder / RECORD).unlink(missing_ok=True)
    else:
        write_json(folder / RECORD, record.as_dict())


def read_record(folder: Path) -> Record | None:
    """Return the record of a network folder, None if it has none."""
    try:
        return Record.from_dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def record_in(checkpoint: dict[str, Any]) -> Record | None:
    """Return the record in a training checkpoint, None if it has none."""
    if "record" not in checkpoint:
        return None
    record, config = Record.from_dict(checkpoint["record"]), checkpoint.get("config")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # The record of a single file includes the config.
    return record if config is None else replace(record, config=yaml.load(config, loader))


def with_table(network: Any, path: Path) -> Record | None:
    """Return the record of the network at `path` with the table of `decm test`, if it is of the same weights."""
    file = quality_file(path)
    if not file.is_file():
        return network.record  # type: ignore[no-any-return]
    try:
        quality = json.loads(file.read_text(encoding="utf-8"))
        if quality["protocol"][WEIGHTS_HASH] == network.identity():
            sampling = default_sampling(network.reads_end_time) | measured_sampling(quality)
            return replace(network.record or Record(), quality=quality, sampling=sampling)
        cause = "it was measured with other weights"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        # The network is complete without the table.
        cause = f"not a table of decm test: {error!r}"
    log.warning("%s is not used: %s", file, cause)
    return network.record  # type: ignore[no-any-return]


def check_recorded(what: str, name: str, identity: str, recorded: Reference | None) -> None:
    """Refuse another VAE or text encoder than the recorded one."""
    if recorded is not None and identity != recorded.identity:
        raise ValueError(
            f"the model was trained with the {what} {recorded}, but {name} is another one ({shortened(identity)}): "
            f"use the {what} that it was trained with"
        )
