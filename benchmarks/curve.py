"""python -m benchmarks.curve CONFIG FOLDER OUT: quality over training steps, as a table and a log-log plot.

Every checkpoint in FOLDER is tested by a plain `decm test`; the same command resumes. A `ModelCheckpoint` with
`save_top_k: -1` and `save_weights_only: true` keeps them while training. A line through the last half of the
checkpoints tells what longer training would give: its slope is the power of the number of training steps.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.study_table import by_steps

SPECS = ["student/mix/1", "student/mix/2", "student/consistency/2", "student/consistency/4", "student/euler/50"]


def measured(config: str, checkpoint: Path, out: Path, specs: list[str]) -> dict[int, float]:
    """Return the smallest distance by number of sampling steps, after testing the checkpoint unless that is done.

    Args:
        config: the config whose data and metric are used.
        checkpoint: a training checkpoint.
        out: the folder of all tables.
        specs: what is sampled.
    """
    place = out / checkpoint.stem
    table = place / "quality.json"
    if not table.exists():
        arguments = ["test", "--config", config, "--ckpt_path", str(checkpoint), "--out", str(place)]
        options = {"test_specs": json.dumps(specs), "floors": "false", "paired": "null"}
        for name, value in options.items():
            arguments += [f"--trainer.callbacks.{name}", value]
        subprocess.run([sys.executable, "-m", "decm_lightning", *arguments], check=True)
    rows = json.loads(table.read_text())
    model = specs[0].partition("/")[0]
    return {steps: distance for steps, (distance, _) in by_steps(rows, model).items()}


def slope(steps: list[int], distances: list[float]) -> float:
    """Return k of distance = c steps^k, fitted to the last half of the points, at least two.

    >>> slope([1, 10, 100, 1000], [9.0, 5.0, 1.0, 0.1])
    -1.0
    """
    first = min(len(steps) // 2, len(steps) - 2)
    # Adding 0 turns -0.0 into 0.0.
    return round(float(np.polyfit(np.log(steps[first:]), np.log(distances[first:]), 1)[0]), 3) + 0.0


def main(file: str, folder: Path, out: Path, specs: list[str] = SPECS, goal: float | None = None) -> None:
    """Measure the checkpoints of one run, print the table, and write curve.md and curve.png into `out`.

    Args:
        file: the config whose data and metric are used.
        folder: at least two checkpoints of one run.
        out: the folder of the tables and the plot.
        specs: what is sampled, all of one model.
        goal: a distance to draw as a line, such as the teacher's.
    """
    checkpoints = list(folder.glob("*.ckpt"))
    if len(checkpoints) < 2:
        raise SystemExit(f"a curve needs at least two checkpoints: found {len(checkpoints)} in {folder}")
    trained = {int(torch.load(path, weights_only=True, mmap=True)["global_step"]): path for path in checkpoints}
    points = {step: measured(file, trained[step], out, specs) for step in sorted(trained)}
    counts = sorted(next(iter(points.values())))
    names = {n: f"{n} step{'s' * (n > 1)}" for n in counts}
    lines = [f"| training steps | {' | '.join(names.values())} |", "|---:" * (len(counts) + 1) + "|"]
    lines += [f"| {step:,} | {' | '.join(f'{row[n]:.3f}' for n in counts)} |" for step, row in points.items()]
    powers = {n: slope(list(points), [row[n] for row in points.values()]) for n in counts}
    lines.append(f"| power of the training steps | {' | '.join(f'{powers[n]:.2f}' for n in counts)} |")
    text = "\n".join(lines) + "\n"
    (out / "curve.md").write_text(text)
    print(text)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for n in counts:
        axes.loglog(list(points), [row[n] for row in points.values()], "o-", label=f"{names[n]} ({powers[n]:.2f})")
    if goal is not None:
        axes.axhline(goal, color="gray", linestyle="--", label=f"goal {goal:g}")
    axes.set(xlabel="training steps", ylabel="Fréchet distance")
    axes.legend(title="sampling steps (power)")
    figure.savefig(out / "curve.png", dpi=110)


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
