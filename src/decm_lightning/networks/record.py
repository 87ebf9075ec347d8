"""What a trained network needs in order to be sampled, evaluated and published without its config."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reference:
    """A pretrained network that a record refers to, such as a teacher, a text encoder or a VAE.

    Attributes:
        name: the path or name from which it was loaded.
        identity: a hash of its weights.
        license: its license as an SPDX identifier or a name of the Hugging Face hub; "" if unknown.
    """

    name: str
    identity: str
    license: str = ""


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
        vae: the VAE of its latents; None if its samples are images.
        latents: mean, std and multiplier of the latents' normalization; None if the VAE's config determines it.
        sampling: the recommended sampler with its options by number of steps, such as {2: "mix?s1=0.6"}.
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
        """Return the record as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """Return the record of plain values, as `as_dict` returns them or as JSON stores them."""
        read = dict(values)
        for name in ("teacher", "text_encoder", "vae", "data"):
            if read.get(name) is not None:
                read[name] = Reference(**read[name])
        read["class_names"] = tuple(read.get("class_names", ()))
        read["sampling"] = {int(steps): name for steps, name in read.get("sampling", {}).items()}
        return cls(**read)
