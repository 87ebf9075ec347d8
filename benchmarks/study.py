"""python -m benchmarks.study configs/compare/digits.yaml: compare methods at equal numbers of network evaluations.

Every method distills the teacher of one config, for the number of steps at which all methods have run the same number
of forward passes per row of the batch (`losses.cost`). Runs with another seed, which do not rank, choose its learning
rate by the sum of log distances over the numbers of sampling steps in `choice`. Runs are plain `decm fit` and
`decm test` commands in their own folders, with their configs. The same command resumes an interrupted study. The table
of each run is kept in docs/compare, so that a study continues on another machine; delete it to run its run again, for
example after a change of the method.
"""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings

from benchmarks.study_table import Ranked, by_steps, plot, table
from decm_lightning.corrected_distiller import Corrector
from decm_lightning.guidance import Guidance
from decm_lightning.losses import Cost, Objective, cost


class Run(NamedTuple):
    """One student: a method, a learning rate, a seed, and a budget of forward passes per row of the batch."""

    method: str
    rate: float
    seed: int
    passes: float


class Study:
    """A study file: see configs/compare/digits.yaml for its keys.

    Args:
        file: the study file.
        folder: where the runs are written.
        tables: where the measured table of each run is kept.
    """

    def __init__(self, file: Path, folder: Path, tables: Path) -> None:
        self.settings: dict[str, Any] = yaml.safe_load(file.read_text())
        self.config = self.settings["config"]
        self.base: dict[str, Any] = yaml.safe_load(Path(self.config).read_text())
        self.folder = folder / file.stem
        self.tables = tables / file.stem
        self.choice: dict[str, Any] = self.settings.get("choice", {})

    def steps(self, run: Run) -> int:
        """Return the number of training steps that use up the budget."""
        return max(1, round(run.passes / self.cost(run).total))

    def cost(self, run: Run) -> Cost:
        """Return the cost of a training step in forward passes per row of the batch."""
        guided = Guidance(**self.guidance(run)).passes
        found = cost(built(self.objective(run)).for_run(10_000), guided)
        if "corrector" in (own := self.settings["methods"][run.method]):
            return Corrector(**own["corrector"]).added_to(found, guided)
        return found

    def objective(self, run: Run) -> dict[str, Any]:
        """Return the objective of a method: a preset of `losses` by its name, or any class path."""
        others = ("guidance", "optimizer", "corrector", "model", "rate", "specs", "chosen_by")
        method = {name: value for name, value in self.settings["methods"][run.method].items() if name not in others}
        name = method["class_path"]
        return {**method, "class_path": name if "." in name else f"decm_lightning.losses.{name}"}

    def guidance(self, run: Run) -> dict[str, Any]:
        """Return the guidance of a method; by default that of the config."""
        default = self.base["model"]["init_args"].get("guidance", {})
        found: dict[str, Any] = self.settings["methods"][run.method].get("guidance", default)
        return found

    def optimizer(self, run: Run) -> dict[str, Any]:
        """Return the optimizer of a method; by default AdamW without weight decay."""
        given = self.settings["methods"][run.method].get("optimizer", {})
        settings = {"lr": run.rate, "weight_decay": 0.0} | given.get("init_args", {})
        return {"class_path": given.get("class_path", "torch.optim.AdamW"), "init_args": settings}

    def place(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.folder / f"{run.method}-{run.rate:g}-seed{run.seed}-{run.passes:g}"

    def quality(self, run: Run) -> dict[str, Any]:
        """Return the measured table of a run, after training and testing it unless that is done."""
        place = self.place(run)
        table = self.tables / f"{place.name}.json"
        if not table.exists():
            checkpoint = place / "checkpoints" / "last.ckpt"
            if not (place / "trained").exists():
                resume = ["--ckpt_path", str(checkpoint)] if checkpoint.exists() else []
                self.call("fit", run, resume)
                (place / "trained").touch()
            self.call("test", run, ["--ckpt_path", str(checkpoint)])
            self.tables.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.with_suffix(".quality.json"), table)
        found: dict[str, Any] = json.loads(table.read_text())
        return found

    def call(self, command: str, run: Run, options: list[str]) -> None:
        """Run one command; its output is in the run's log.txt."""
        place, steps = self.place(run), self.steps(run)
        own = self.settings["methods"][run.method]
        corrector = {"corrector": own["corrector"]} if "corrector" in own else {}
        place.mkdir(parents=True, exist_ok=True)
        overlay = {
            "seed_everything": run.seed,
            "trainer": {
                "max_steps": steps, "val_check_interval": None, "limit_val_batches": 0, "enable_progress_bar": False,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(self.folder), "name": place.name, "version": ""},
                },
                "callbacks": self.callbacks(run),
            },
            "model": {
                "class_path": f"decm_lightning.{'Corrected' * bool(corrector)}Distiller",
                "init_args": corrector | {
                    "objective": self.objective(run), "guidance": self.guidance(run),
                    "compile": self.settings.get("compile", False),
                    "optimizer": self.optimizer(run), **own.get("model", {}),
                },
            },
        }  # fmt: skip
        file = place / "overlay.yaml"
        file.write_text(yaml.safe_dump(overlay))
        print(f"{command} {place.name}: {steps} steps", flush=True)
        arguments = ["--config", self.config, "--config", str(file), *options]
        with (place / "log.txt").open("a") as log:
            ended = subprocess.run(
                [sys.executable, "-m", "decm_lightning", command, *arguments], stdout=log, stderr=log
            )
        if ended.returncode:
            remedy = f"see {log.name}; the same command resumes the study"
            raise SystemExit(f"{command} {place.name} ended with exit code {ended.returncode}: {remedy}")

    def callbacks(self, run: Run) -> list[dict[str, Any]]:
        """Return the config's callbacks that train, log gradients and test, with the study's specs."""
        kept = []
        specs = self.settings["methods"][run.method].get("specs", self.settings["specs"])
        # The teacher and the floors are measured once, with the first method's first seed, and the distance to the
        # teacher's converged ODE, which takes as long as half of the other samples, with the first seed.
        seed = self.settings["seeds"][0]
        first = (run.method, run.seed) == (next(iter(self.settings["methods"])), seed)
        if run.seed == self.choice.get("seed"):
            specs = self.choice.get("specs", specs)
        elif first:
            specs = [*self.settings["teacher"], *specs]
        for callback in copy.deepcopy(self.base["trainer"]["callbacks"]):
            name = callback["class_path"].rpartition(".")[2]
            if name == "Evaluation":
                callback["init_args"] |= {"test_specs": specs, "floors": first}
                if run.seed != seed:
                    callback["init_args"]["paired"] = None
            if name in ("Evaluation", "GradientNorms", "ModelCheckpoint"):
                kept.append(callback)
        return kept

    def rate(self, method: str) -> float:
        """Return the learning rate of a method: its own or the only one, or else the best by the runs of `choice`.

        The search starts in the middle of `rates`, and ends at a rate that is better than its neighbors in the list.
        """
        own = self.settings["methods"][method].get("rate")
        rates = [own] if own else sorted(self.settings["rates"])
        here = (len(rates) - 1) // 2
        while True:
            near = [place for place in (here + 1, here - 1) if 0 <= place < len(rates)]
            # Lazily, so that a rate below is tried only if the one above is worse.
            better = (place for place in near if self.score(method, rates[place]) < self.score(method, rates[here]))
            if (place := next(better, None)) is None:
                return float(rates[here])
            here = place

    def score(self, method: str, rate: float) -> float:
        """Return the sum of log distances over the numbers of sampling steps of `choice`, or the method's own."""
        best = by_steps(self.quality(Run(method, rate, self.choice["seed"], self.choice["passes"])))
        counts = self.settings["methods"][method].get("chosen_by", self.choice["steps"])
        scored = [math.log(best[steps][0]) for steps in counts if steps in best]
        return sum(scored) if scored else math.inf


def built(objective: dict[str, Any]) -> Objective:
    """Return the objective that a config describes."""
    # A config may name a function that returns an objective.
    set_parsing_settings(subclasses_enabled=[Objective])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    found: Objective = parser.instantiate(parser.parse_object({"objective": objective})).objective
    return found


def run_study(
    file: str, folder: str = "runs/compare", tables: str = "docs/compare", methods: list[str] | None = None
) -> None:
    """Run a study, print its table, and write table.md and table.png into the folder of its runs.

    Args:
        file: the study file.
        folder: where the runs are written.
        tables: where the measured table of each run is kept.
        methods: names of the methods to run; by default all.
    """
    study = Study(Path(file), Path(folder), Path(tables))
    chosen = methods or list(study.settings["methods"])
    rates = {method: study.rate(method) for method in chosen}
    results: dict[str, Ranked] = {}
    # Seed by seed, so that an interrupted study has every method with equally many seeds.
    for seed in study.settings["seeds"]:
        for method in chosen:
            run = Run(method, rates[method], seed, study.settings["passes"])
            found = results.setdefault(method, Ranked(run.rate, study.steps(run), study.cost(run).total, []))
            found.runs.append(study.quality(run))
        text = table(results)
        study.folder.mkdir(parents=True, exist_ok=True)
        (study.folder / "table.md").write_text(text)
        plot(results, study.folder / "table.png")
        print(text, flush=True)
    print(f"compare the runs: decm compare {study.folder}/*-seed{study.settings['seeds'][0]}-* --out report.html")


if __name__ == "__main__":
    auto_cli(run_study, as_positional=True)
