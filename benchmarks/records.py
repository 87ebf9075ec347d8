"""python -m benchmarks.records: write record.json of the stored students, which were trained before there were records.

The settings are those of the README files next to the weights, and the values those of docs/results.md. Hashes are
computed from the weights, the data and the text encoder on this machine.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli

from decm_lightning.cli.trainer import build
from decm_lightning.networks.record import RECORD, Record, Reference, default_sampling, measured_sampling, write_record

SOURCE = {"source": "docs/results.md", "labels": "balanced", "pixels": "rounded to uint8"}
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Stored:
    """What is known about a stored student.

    Args:
        config: the config of its run.
        steps: training steps.
        objective: the preset and its arguments.
        features: the feature network of its evaluation.
        protocol: further settings of the evaluation.
        rows: "sampler/steps" with the measured columns.
        class_names: names of its classes.
        license: license of the data.
    """

    config: str
    steps: int
    objective: tuple[str, dict[str, Any]]
    features: str
    protocol: dict[str, int]
    rows: dict[str, dict[str, float]]
    class_names: tuple[str, ...] = ()
    license: str = ""

    def quality(self) -> dict[str, Any]:
        """Return the measured values in the format of quality.json."""
        rows = []
        for name, values in self.rows.items():
            sampler, steps = name.split("/")
            rows.append({"model": "student", "sampler": sampler, "steps": int(steps), "nfe": int(steps), **values})
        protocol = {"feature network": self.features} | SOURCE | self.protocol
        return {"metric": f"Fréchet distance on {self.features}", "protocol": protocol, "rows": rows}

    def record(self) -> Record:
        """Return the record, from the config, the data and the teacher on this machine."""
        name, arguments = self.objective
        objective = {"class_path": f"decm_lightning.losses.{name}", "init_args": arguments}
        steps = ("--trainer.max_steps", str(self.steps), "--trainer.logger", "false")
        cli = build("--config", self.config, *steps, "--model.init_args.objective", json.dumps(objective))
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
        # These students were trained with OneCycleLR, whose settings the configs no longer have.
        del config["model"]["init_args"]["lr_scheduler"]
        own, quality = cli.datamodule.record(), self.quality()
        return replace(
            own,
            teacher=Reference(cli.model.teacher.name, cli.model.teacher.identity(), "apache-2.0"),
            guidance=asdict(cli.model.guidance),
            objective=str(cli.model.requested_objective),
            steps=self.steps,
            class_names=self.class_names,
            sampling=default_sampling(True) | measured_sampling(quality),
            quality=quality,
            data=replace(own.data, license=self.license or own.data.license),
            config=config,
        )


STORED = {
    "digits": Stored(
        "configs/digits/decm.yaml", 2500, ("end_identity", {"batch_fractions": [0.5, 0.25, 0.25]}),
        "DigitsFeatures", {"real images": 1797, "generated images": 1797},
        {
            "mix/1": {"fd": 0.525}, "mix/2": {"fd": 0.306}, "consistency/4": {"fd": 0.225},
            "consistency/8": {"fd": 0.181}, "euler/50": {"fd": 0.228},
        },
        tuple("0123456789"),
    ),
    "fashion": Stored(
        "configs/fashion/decm.yaml", 1000, ("end_identity", {"batch_fractions": [0.5, 0.25, 0.25]}),
        "EfficientNet-Lite0 at 64 pixels, 64 directions", {"real images": 1000, "generated images": 1000},
        {
            "mix/1": {"fd": 29.702, "kid": 5.6059}, "consistency/2": {"fd": 20.621, "kid": 3.4091},
            "consistency/4": {"fd": 17.481, "kid": 2.6487}, "euler/8": {"fd": 14.138, "kid": 1.8533},
            "euler/16": {"fd": 14.979, "kid": 2.0933}, "euler/50": {"fd": 17.734, "kid": 2.8361},
        },
        FASHION, "MIT",
    ),
    "emoji": Stored(
        "configs/emoji/decm.yaml", 600, ("paper", {"batch_fractions": [0.5, 0.25, 0.25], "r_decay_steps": 150}),
        "EfficientNet-Lite0 at 64 pixels, 64 directions", {"real images": 194, "generated images": 194},
        {
            "mix/1": {"fd": 92.4, "kid": 15.4}, "mix/2": {"fd": 75.8, "kid": 11.0}, "mix/4": {"fd": 75.9, "kid": 11.1},
            "mix/8": {"fd": 75.9, "kid": 11.0}, "consistency/4": {"fd": 74.4, "kid": 10.6},
            "euler/50": {"fd": 79.6, "kid": 12.2},
        },
    ),
}  # fmt: skip


def write(names: list[str] | None = None) -> None:
    """Write record.json of the stored students.

    Args:
        names: the students in weights, such as [digits]; all by default.
    """
    for name in names or STORED:
        folder = Path("weights") / name / "student"
        write_record(STORED[name].record(), folder)
        print(f"wrote {folder / RECORD}")


if __name__ == "__main__":
    auto_cli(write, as_positional=False)
