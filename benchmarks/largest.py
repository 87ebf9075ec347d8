"""python -m benchmarks.largest --network XL/1 --precision bf16 --memory 80: the largest batch that fits in memory.

The static memory of a training run (the student, its average, AdamW's two moments, the teacher) is computed. The memory
of a step beyond that, including gradients, is measured at two batch sizes and two depths. It is affine in both, so the
result can be extrapolated to other devices and to networks that are too deep for this one; a fifth measurement checks
the fit. On a GPU the largest batch is then run within the given memory, next to the static memory, and shrinks by 3 %
until it fits. The last line has ratios to FACM's engine as name=value.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from jsonargparse import auto_cli

from benchmarks.step import NETWORKS, VARIANTS, NetworkName, distiller, peak_memory, take
from decm_lightning.types import Batch

GIB, MIB = 2**30, 2**20
STATIC = {"teacher": 1, "student": 1, "AdamW": 2, "average": 1}
"""Static values per parameter, of 4 bytes each."""


@dataclass
class Largest:
    """The largest batch of one variant.

    Attributes:
        each: bytes per sample.
        constant: bytes that do not depend on the batch, beyond the static memory.
        checked: measured / predicted memory of the check.
        predicted: largest batch by prediction.
        ran: largest batch that ran on this GPU; None without a GPU.
    """

    each: float
    constant: float
    checked: float
    predicted: int
    ran: int | None = None

    @property
    def batch(self) -> int:
        """The batch that ran, or the prediction."""
        return self.predicted if self.ran is None else self.ran


def step_memory(network: NetworkName, depth: int, rows: int, key: str, precision: str, checkpointed: bool) -> int:
    """Return the peak memory of a step in bytes, including gradients, beyond the static memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = distiller(network, False, checkpointed, device, depth)
    size = NETWORKS[network]
    shape = (rows, size["in_channels"], size["input_size"], size["input_size"])
    batch = Batch(torch.randn(shape, device=device), torch.randint(1000, (rows,), device=device))
    return peak_memory(device, lambda: take(step, VARIANTS[key], batch, precision))


def runs(
    network: NetworkName, rows: int, key: str, precision: str, checkpointed: bool, memory: float, rest: int
) -> bool:
    """Return whether a step runs within `memory` GiB of this GPU, next to the networks and `rest` more bytes."""
    torch.cuda.set_per_process_memory_fraction(min(memory * GIB / torch.cuda.mem_get_info()[1], 1.0))
    try:
        held = torch.empty(rest, dtype=torch.uint8, device="cuda")
        step_memory(network, NETWORKS[network]["depth"], rows, key, precision, checkpointed)
        del held
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


def affine(values: dict[tuple[int, int], int], depth: int) -> tuple[float, float]:
    """Return constant bytes and bytes per sample at `depth`, from measurements at two depths and two batch sizes."""
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
) -> dict[str, Largest]:
    """Measure all variants and print a table.

    Args:
        network: the size of teacher and student.
        precision: weights are float32; bf16 computes in mixed precision.
        memory: memory of the target device in GiB.
        batches: the two batch sizes to measure, increasing; large enough for activations to exceed gradients.
        depths: the two numbers of blocks to measure, increasing.
        check: depth and batch size of the check.
        variants: keys of benchmarks.step.VARIANTS.
        checkpointed: store only the inputs of each block.
        threads: CPU threads.

    Returns:
        The results by variant.
    """
    torch.set_num_threads(threads)
    depth = NETWORKS[network]["depth"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in distiller(network, False, False, torch.device("meta")).student.parameters())
    static = 4 * sum(STATIC.values()) * parameters
    largest: dict[str, Largest] = {}
    print(f"{network}, {precision}; static memory: {static / GIB:.1f} GiB of {memory:g}")
    print("| step | MiB per sample | constant MiB | measured / predicted | largest batch |\n|---|---:|---:|---:|---:|")
    for key in variants:
        values = {(d, n): step_memory(network, d, n, key, precision, checkpointed) for d, n in product(depths, batches)}
        constant, each = affine(values, check[0])
        checked = step_memory(network, *check, key, precision, checkpointed) / (constant + check[1] * each)
        constant, each = affine(values, depth)
        predicted = max(int((memory * GIB - static - max(constant, 0)) / each), 0)
        found = largest[key] = Largest(each, constant, checked, predicted)
        if torch.cuda.is_available():
            # The benchmark's distiller has neither an average nor an optimizer.
            rest, rows = 4 * (STATIC["AdamW"] + STATIC["average"]) * parameters, predicted
            while rows and not runs(network, rows, key, precision, checkpointed, memory, rest):
                rows -= -(-rows * 3 // 100)
            found.ran = rows
        tried = "" if found.ran is None else f" ({found.ran} ran)"
        cells = f"{each / MIB:.2f} | {constant / MIB:.1f} | {checked:.3f} | {predicted}{tried}"
        print(f"| {VARIANTS[key].title} | {cells} |", flush=True)
    pairs = {"largest_vs_jvp": ("dual", "jvp"), "largest_step_vs_facm": ("decm", "facm")}
    ratios = {
        name: largest[a].batch / largest[b].batch
        for name, (a, b) in pairs.items()
        if a in largest and b in largest and largest[b].batch
    }
    print(" ".join(f"{name}={value:.3g}" for name, value in ratios.items()))
    return largest


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
