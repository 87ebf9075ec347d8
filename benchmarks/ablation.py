"""python -m benchmarks.ablation --data digits --steps 1500 --seeds [0]: the effect of each loss, as in docs/results.md.

Distills the teacher of a data set with consistency alone, flow matching + consistency, and all three losses (both
presets), by the data set's config and with the same number of rows per step. Evaluates every student by the config's
protocol. Writes a table (runs/ablation) and a plot of the gradient norms (docs). Results are stored in docs/ablation
and students in runs/ablation. The same command resumes an interrupted study, also on another machine.
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from decm_lightning.callbacks import GradientNorms, Throughput
from decm_lightning.cli.trainer import build
from decm_lightning.evaluation import Evaluation, SampleGrid
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.networks import save

OBJECTIVES: dict[str, dict[str, Any]] = {
    "consistency only": {"class_path": "consistency_only"},
    "flow matching + consistency": {
        "class_path": "consistency_and_flow_matching",
        "init_args": {"batch_fractions": [0.67, 0.33]},
    },
    "all three, paper": {"class_path": "paper", "init_args": {"batch_fractions": [0.5, 0.25, 0.25]}},
    "all three, end identity": {"class_path": "end_identity", "init_args": {"batch_fractions": [0.5, 0.25, 0.25]}},
}
STUDENT = [
    "mix/1",
    "mix/2",
    "mix/4",
    "mix/8",
    "mix/16",
    "consistency/2",
    "consistency/4",
    "consistency/8",
    "euler/8",
    "euler/16",
    "euler/50",
]
TEACHER = ["euler/1", "euler/2", "euler/4", "euler/8", "euler/16", "euler/50"]
STEPS = (1, 2, 4, 8, 16, 50)


class Curve(L.Callback):
    """Records the total gradient norm of every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Append the norm that GradientNorms logged."""
        self.norms.append(trainer.callback_metrics["grad_norm/total"].item())


def measure(config: str, objective: str, seed: int, steps: int, folder: Path, compile: bool) -> dict[str, object]:
    """Train one student, save it in `folder` and test it; return its distances by spec and its gradient norms."""
    spec = dict(OBJECTIVES[objective])
    spec["class_path"] = f"decm_lightning.losses.{spec['class_path']}"
    cli = build(
        *("--config", config, "--seed_everything", str(seed), "--trainer.max_steps", str(steps)),
        *(
            "--trainer.default_root_dir",
            str(folder),
            "--trainer.logger",
            "false",
            "--trainer.val_check_interval",
            "null",
        ),
        *("--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"),
        *("--model.init_args.objective", json.dumps(spec)),
        *("--model.init_args.compile", str(compile).lower()),
    )
    # The compiler's recompilation limit also counts earlier students.
    torch.compiler.reset()
    unused = (LearningRateMonitor, ModelCheckpoint, SampleGrid, Throughput, GradientNorms)
    evaluation = next(c for c in cli.trainer.callbacks if isinstance(c, Evaluation))
    evaluation.test_specs = [SamplingSpec.parse(f"student/{name}") for name in STUDENT]
    norms, curve = GradientNorms(every_n_steps=0), Curve()
    cli.trainer.callbacks = [c for c in cli.trainer.callbacks if not isinstance(c, unused)] + [norms, curve]
    cli.trainer.fit(cli.model, cli.datamodule)
    save(cli.model.average, folder)
    return {"distances": test(cli), "norms": [float(f"{norm:.4g}") for norm in curve.norms], "spikes": norms.spikes}


def teacher(config: str, folder: Path) -> dict[str, object]:
    """Test the teacher alone."""
    cli = build(
        "--config",
        config,
        "--trainer.default_root_dir",
        str(folder),
        "--trainer.logger",
        "false",
        "--trainer.enable_progress_bar",
        "false",
    )
    evaluation = next(c for c in cli.trainer.callbacks if isinstance(c, Evaluation))
    evaluation.test_specs = [SamplingSpec.parse(f"teacher/{name}") for name in TEACHER]
    cli.trainer.callbacks = [evaluation]
    return {"distances": test(cli)}


def test(cli: object) -> dict[str, dict[str, float]]:
    """Return the distances of every test spec, "sampler/steps" -> {fd, kid}."""
    distances: dict[str, dict[str, float]] = defaultdict(dict)
    (logged,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    for name, value in logged.items():
        _, distance, _, sampler, steps = name.split("/")
        distances[f"{sampler}/{steps}"][distance] = value
    return distances


def best(runs: list[dict], steps: int) -> tuple[str, list[float], list[float]]:
    """Return the sampler with the smallest mean distance at `steps`, and its fd and kid in each run."""
    samplers = {name.split("/")[0] for name in runs[0]["distances"] if name.endswith(f"/{steps}")}
    values = {s: [run["distances"][f"{s}/{steps}"]["fd"] for run in runs] for s in samplers}
    winner = min(values, key=lambda s: mean(values[s]))
    return winner, values[winner], [run["distances"][f"{winner}/{steps}"]["kid"] for run in runs]


def table(results: dict[str, list[dict]]) -> str:
    """Return the table: a row per model, a column per number of steps, with the best sampler for each."""
    lines = ["| model | " + " | ".join(str(n) for n in STEPS) + " | spikes |", "|---" * (len(STEPS) + 2) + "|"]
    for name, runs in results.items():
        cells = []
        for steps in STEPS:
            sampler, fd, kid = best(runs, steps)
            spread = f" ± {stdev(fd):.3f}" if len(fd) > 1 else ""
            cells.append(f"{mean(fd):.3f}{spread} ({sampler}; KID {mean(kid):.4f})")
        spikes = ", ".join(str(run["spikes"]) for run in runs) if "spikes" in runs[0] else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {spikes} |")
    return "\n".join(lines) + "\n"


def plot_norms(results: dict[str, list[dict]], file: Path) -> None:
    """Plot the gradient norm of every step, with a color per objective and a line per seed (paper, Figure 4)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    names = [name for name, runs in results.items() if "norms" in runs[0]]
    for color, name in enumerate(names):
        for i, run in enumerate(results[name]):
            axis.semilogy(run["norms"], color=f"C{color}", lw=0.5, alpha=0.7, label=name if i == 0 else None)
    axis.set(xlabel="training step", ylabel="gradient norm before clipping")
    axis.legend(loc="upper right")
    figure.savefig(file, dpi=120)


def study(
    data: Literal["digits", "fashion"], steps: int, seeds: list[int], threads: int = 2, compile: bool = False
) -> None:
    """Run the study.

    Args:
        data: the data set.
        steps: training steps of each student.
        seeds: one run per objective and seed.
        threads: CPU threads.
        compile: compile the networks, which is a third faster and needs a C++ compiler.
    """
    torch.set_num_threads(threads)
    config, folder, stored = f"configs/{data}/decm.yaml", Path("runs/ablation") / data, Path("docs/ablation") / data
    for place in (folder, stored):
        place.mkdir(parents=True, exist_ok=True)
    jobs = [("teacher", None)] + [(name, seed) for seed in seeds for name in reversed(OBJECTIVES)]
    results: dict[str, list[dict]] = defaultdict(list)
    for name, seed in jobs:
        file = stored / f"{name.replace(' ', '-').replace(',', '')}-{seed}-{steps}.json"
        if not file.exists():
            result = (
                teacher(config, folder / "teacher")
                if seed is None
                else measure(config, name, seed, steps, folder / file.stem, compile)
            )
            file.write_text(json.dumps(result))
        results[name].append(json.loads(file.read_text()))
        print(f"{name}, seed {seed}: {results[name][-1]['distances']}", flush=True)
    results = {name: results[name] for name in ("teacher", *OBJECTIVES)}
    Path(f"runs/ablation/{data}.md").write_text(table(results))
    plot_norms(results, Path(f"docs/gradient-norms-{data}.png"))
    print(table(results))


if __name__ == "__main__":
    auto_cli(study, as_positional=False)
