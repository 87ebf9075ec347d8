"""python -m benchmarks.largest --network XL/1 --precision bf16 --memory 80: how many samples a device's memory holds.

What a training run keeps (the student's weights, its average, AdamW's two moments, the teacher) is counted; what a step
takes beyond that, gradients included, is measured at two batches, whose difference is the cost of a sample, and
checked at a third. So it runs on any device, for the memory of any other. On a GPU the answer is then tried: the step
must run with that batch. The last line has ratios to FACM's way as name=value.
"""

from typing import Literal

import torch
from jsonargparse import auto_cli

from benchmarks.step import NETWORKS, VARIANTS, NetworkName, distiller, peak_memory, take
from decm_lightning.types import Batch

GIB = 2**30
KEPT = {"teacher": 1, "student": 1, "AdamW": 2, "average": 1}
"""Numbers kept for each parameter, each of 4 bytes."""


def data(network: NetworkName, rows: int, device: torch.device) -> Batch:
    """Return a batch of noise."""
    size = NETWORKS[network]
    shape = (rows, size["in_channels"], size["input_size"], size["input_size"])
    return Batch(torch.randn(shape, device=device), torch.randint(1000, (rows,), device=device))


def main(
    network: NetworkName = "small",
    precision: Literal["fp32", "bf16"] = "fp32",
    memory: float = 80.0,
    batches: tuple[int, int, int] = (1, 2, 3),
    variants: list[str] = ["fm", "jvp", "dual", "facm", "decm"],  # noqa: B006
    checkpointed: bool = False,
    threads: int = 2,
) -> None:
    """Measure, and print a table.

    Args:
        network: the size of teacher and student.
        precision: weights are float32; bf16 computes in mixed precision.
        memory: of the device in question, in GiB.
        batches: samples of the three steps that are measured, rising.
        variants: keys of benchmarks.step.VARIANTS.
        checkpointed: keep only the inputs of each block.
        threads: processor threads.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = distiller(network, False, checkpointed, device)
    kept = 4 * sum(KEPT.values()) * sum(p.numel() for p in step.student.parameters())
    largest: dict[str, int] = {}
    print(f"{network}, {precision}; kept: {kept / GIB:.1f} GiB of {memory:g}")
    print("| step | MiB a sample | MiB beside | check | largest batch |\n|---|---:|---:|---:|---:|")
    for key in variants:

        def taken(rows: int, key: str = key) -> int:
            batch = data(network, rows, device)
            step.student.zero_grad(set_to_none=True)
            return peak_memory(device, lambda: take(step, VARIANTS[key], batch, precision))

        first, second, third = (taken(rows) for rows in batches)
        each = (second - first) / (batches[1] - batches[0])
        beside = first - batches[0] * each
        check = third / (beside + batches[2] * each)
        largest[key] = int((memory * GIB - kept - max(beside, 0)) / each)
        tried = ""
        if device.type == "cuda":
            try:
                taken(largest[key])
                tried = " (ran)"
            except torch.cuda.OutOfMemoryError:
                tried = " (did not fit)"
        figures = f"{each / 2**20:.0f} | {beside / 2**20:.0f} | {check:.3f} | {largest[key]}{tried}"
        print(f"| {VARIANTS[key].title} | {figures} |", flush=True)
    pairs = {"largest_vs_jvp": ("dual", "jvp"), "largest_step_vs_facm": ("decm", "facm")}
    found = {name: largest[a] / largest[b] for name, (a, b) in pairs.items() if {a, b} <= set(largest)}
    print(" ".join(f"{name}={value:.3g}" for name, value in found.items()))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
