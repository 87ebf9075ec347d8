"""python -m benchmarks.attention --tokens 1024: time and memory of the tangent of attention alone.

Compares the fused value alone, forward mode on the math kernel, our rule in blocks of queries, and on an NVIDIA GPU the
fused kernel. All variants run in turn in every round. Memory is the peak of tensor memory beyond the inputs. The last
line has ratios to forward mode as name=value.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.step import peak_memory, wait
from decm_lightning.derivatives.dual import attention
from decm_lightning.derivatives.dual.dispatch import Pair
from decm_lightning.derivatives.dual.fused_attention import fused_tangent, supports


def forward_mode(pairs: list[Pair]) -> Tensor:
    """Return the tangent by torch.func.jvp."""
    with sdpa_kernel(SDPBackend.MATH):
        primals, tangents = tuple(p.primal for p in pairs), tuple(p.tangent for p in pairs)
        return torch.func.jvp(functional.scaled_dot_product_attention, primals, tangents)[1]


def in_blocks(pairs: list[Pair], queries: int) -> Tensor:
    """Compute the value, and return the tangent by our rule in blocks of `queries` queries."""
    value = functional.scaled_dot_product_attention(*(p.primal for p in pairs))
    return attention.by_blocks(
        *(part for p in pairs for part in (p.primal, p.tangent)), 1 / value.shape[-1] ** 0.5, queries
    )


def main(
    tokens: int = 1024,
    batch: int = 4,
    heads: int = 6,
    head_size: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 5,
    threads: int = 2,
) -> None:
    """Measure all variants and print a table.

    Args:
        tokens: number of queries and of keys.
        batch: batch size.
        heads: number of heads.
        head_size: size of a head.
        dtype: dtype of all tensors.
        rounds: number of timings of each variant.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    parts = torch.randn(6, batch, heads, tokens, head_size, device=device, dtype=getattr(torch, dtype))
    pairs = [Pair(parts[2 * i], parts[2 * i + 1]) for i in range(3)]
    primals = [p.primal for p in pairs]
    ways: dict[str, Callable[[], Tensor]] = {
        "fused value alone": lambda: functional.scaled_dot_product_attention(*primals),
        "forward mode, math kernel": lambda: forward_mode(pairs),
    }
    for queries in (64, 256, tokens):
        ways[f"value and blocks of {queries}"] = lambda queries=queries: in_blocks(pairs, queries)
    if supports(*primals) is None:
        scale = 1 / head_size**0.5
        ways["value and fused tangent"] = lambda: (ways["fused value alone"](), fused_tangent(*parts, scale))[1]
    memory = {name: peak_memory(device, way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    print("| variant | ms | MB |\n|---|---:|---:|")
    for name, values in seconds.items():
        print(f"| {name} | {median(values) * 1e3:.1f} | {memory[name] / 2**20:.1f} |")
    base = seconds["forward mode, math kernel"]
    ratios = {name: median(a / b for a, b in zip(values, base, strict=True)) for name, values in seconds.items()}
    print(" ".join(f"{name.replace(' ', '_').replace(',', '')}={ratio:.3g}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
