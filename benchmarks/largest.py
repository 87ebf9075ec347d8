"""python -m benchmarks.largest --network XL/1 --precision bf16 --memory 80: how many samples a device's memory holds.

What a training run keeps (the student's weights, its average, AdamW's two moments, the teacher) is counted; what a step
takes beyond that, gradients included, is measured at two batches and two depths. It is affine in each, so that this
runs on any device, for the memory of any other, and for networks too deep for it; a fifth measurement is a check. On a
GPU the answer is then tried within that memory, beside all that is kept. The last line has ratios to FACM's way as
name=value.
"""

from itertools import product
from typing import Literal

import torch
from jsonargparse import auto_cli

from benchmarks.step import NETWORKS, VARIANTS, NetworkName, distiller, peak_memory, take
from decm_lightning.types import Batch

GIB, MIB = 2**30, 2**20
KEPT = {"teacher": 1, "student": 1, "AdamW": 2, "average": 1}
"""Numbers kept for each parameter, each of 4 bytes."""


def taken(network: NetworkName, depth: int, rows: int, key: str, precision: str, checkpointed: bool) -> int:
    """Return the bytes that a step takes at its peak, gradients included, beyond what is kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = distiller(network, False, checkpointed, device, depth)
    size = NETWORKS[network]
    shape = (rows, size["in_channels"], size["input_size"], size["input_size"])
    batch = Batch(torch.randn(shape, device=device), torch.randint(1000, (rows,), device=device))
    return peak_memory(device, lambda: take(step, VARIANTS[key], batch, precision))


def runs(
    network: NetworkName, rows: int, key: str, precision: str, checkpointed: bool, memory: float, rest: int
) -> bool:
    """Return whether a step runs within so many GiB of this GPU, beside networks and `rest` bytes more."""
    torch.cuda.set_per_process_memory_fraction(min(memory * GIB / torch.cuda.mem_get_info()[1], 1.0))
    try:
        held = torch.empty(rest, dtype=torch.uint8, device="cuda")
        taken(network, NETWORKS[network]["depth"], rows, key, precision, checkpointed)
        del held
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


def affine(values: dict[tuple[int, int], int], depth: int) -> tuple[float, float]:
    """Return bytes beside the samples, and bytes for each, at `depth`, from values at two depths and two batches."""
    (d0, d1), (n0, n1) = (sorted({key[axis] for key in values}) for axis in (0, 1))

    def at(rows: int) -> float:
        slope = (values[d1, rows] - values[d0, rows]) / (d1 - d0)
        return values[d0, rows] + slope * (depth - d0)

    each = (at(n1) - at(n0)) / (n1 - n0)
    return at(n0) - n0 * each, each


def main(
    network: NetworkName = "small",
    precision: Literal["fp32", "bf16"] = "fp32",
    memory: float = 80.0,
    batches: tuple[int, int] = (8, 16),
    depths: tuple[int, int] = (1, 2),
    check: tuple[int, int] = (3, 12),
    variants: list[str] = ["fm", "jvp", "dual", "facm", "decm"],  # noqa: B006
    checkpointed: bool = False,
    threads: int = 2,
) -> None:
    """Measure, and print a table.

    Args:
        network: the size of teacher and student.
        precision: weights are float32; bf16 computes in mixed precision.
        memory: of the device in question, in GiB.
        batches: samples of the steps that are measured, rising; enough that activations outweigh gradients.
        depths: blocks of the networks that are measured, rising.
        check: depth and samples of the check.
        variants: keys of benchmarks.step.VARIANTS.
        checkpointed: keep only the inputs of each block.
        threads: processor threads.
    """
    torch.set_num_threads(threads)
    depth = NETWORKS[network]["depth"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in distiller(network, False, False, torch.device("meta")).student.parameters())
    kept = 4 * sum(KEPT.values()) * parameters
    largest: dict[str, int] = {}
    print(f"{network}, {precision}; kept: {kept / GIB:.1f} GiB of {memory:g}")
    print("| step | MiB a sample | MiB beside | measured / foreseen | largest batch |\n|---|---:|---:|---:|---:|")
    for key in variants:
        values = {(d, n): taken(network, d, n, key, precision, checkpointed) for d, n in product(depths, batches)}
        beside, each = affine(values, check[0])
        met = taken(network, *check, key, precision, checkpointed) / (beside + check[1] * each)
        beside, each = affine(values, depth)
        largest[key] = max(int((memory * GIB - kept - max(beside, 0)) / each), 0)
        tried = ""
        if torch.cuda.is_available() and largest[key]:
            # The benchmark's distiller has neither an average nor an optimizer.
            rest = 4 * (KEPT["AdamW"] + KEPT["average"]) * parameters
            fits = runs(network, largest[key], key, precision, checkpointed, memory, rest)
            tried = " (ran)" if fits else " (did not fit)"
        figures = f"{each / MIB:.2f} | {beside / MIB:.1f} | {met:.3f} | {largest[key]}{tried}"
        print(f"| {VARIANTS[key].title} | {figures} |", flush=True)
    pairs = {"largest_vs_jvp": ("dual", "jvp"), "largest_step_vs_facm": ("decm", "facm")}
    found = {name: largest[a] / largest[b] for name, (a, b) in pairs.items() if a in largest and largest.get(b)}
    print(" ".join(f"{name}={value:.3g}" for name, value in found.items()))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
