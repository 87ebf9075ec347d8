"""python -m benchmarks.averages CONFIG FOLDER OUT: the length of the weights' average, varied after one run.

Checkpoints at many steps t of a run are averaged with weights proportional to t^power (Karras et al., arXiv 2312.02696,
section 3.1), which covers about the last 1 / (power + 1) of the run, and tested by a plain `decm test`. The ramp of
`training.EMA`, (1 + n) / (10 + n), is the power 8. A `ModelCheckpoint` with `save_top_k: -1` and
`save_weights_only: true` keeps the checkpoints, at distances of less than 1 / power of the run.
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.curve import SPECS, measured
from decm_lightning.networks import load, save

POWERS = [2.0, 4.0, 8.0, 16.0, 32.0]


def average(weights: dict[int, dict[str, Tensor]], power: float) -> dict[str, Tensor]:
    """Return the average of the weights by training step, with weights proportional to step^power, in float64.

    >>> average({1: {"w": torch.tensor(0.0)}, 2: {"w": torch.tensor(3.0)}}, power=1)
    {'w': tensor(2., dtype=torch.float64)}
    """
    last = max(weights)
    shares = {step: (step / last) ** power for step in weights}
    total = sum(shares.values())
    names = weights[last]
    return {name: sum(share / total * weights[step][name].double() for step, share in shares.items()) for name in names}  # type: ignore[misc]


def main(file: str, folder: Path, out: Path, powers: list[float] = POWERS, specs: list[str] = SPECS) -> None:
    """Average the checkpoints of one run, measure each average and the last weights, and write averages.md into `out`.

    Args:
        file: the config whose data and metric are used.
        folder: the checkpoints of one run.
        out: the folder of the averages, their tables and averages.md.
        powers: powers of the training step.
        specs: what is sampled, all of one model.
    """
    checkpoints = list(folder.glob("*.ckpt"))
    if not checkpoints:
        raise SystemExit(f"no checkpoints in {folder}")
    steps = {int(torch.load(path, weights_only=True, mmap=True)["global_step"]): path for path in checkpoints}
    weights = {step: load(path, weights="model").state_dict() for step, path in steps.items()}
    network = load(steps[max(steps)], weights="model")
    rows = {}
    for power in [*powers, torch.inf]:
        place = out / f"power_{power:g}"
        network.load_state_dict(average(weights, power))
        save(network, place)
        rows[power] = measured(file, place, out / "tables", specs)
    counts = sorted(next(iter(rows.values())))
    head = " | ".join(f"{n} step{'s' * (n > 1)}" for n in counts)
    lines = [f"| power | {head} |", "|---:" * (len(counts) + 1) + "|"]
    lines += [f"| {power:g} | {' | '.join(f'{row[n]:.3f}' for n in counts)} |" for power, row in rows.items()]
    text = "\n".join(lines) + "\n"
    (out / "averages.md").write_text(text)
    print(text)


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
