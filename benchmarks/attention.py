"""python -m benchmarks.attention --tokens 1024: time and memory of the tangent of attention alone.

Compares the fused value alone, forward mode on the math kernel, our rule in blocks of queries, and on an NVIDIA GPU the
fused kernel and jvp-flash-attention, if it is installed. All variants run in turn in every round. Memory is the peak of
tensor memory beyond the inputs. The error is that of the tangent relative to forward mode in float64, on the first
sample and head. The last line has ratios to forward mode as name=value.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
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


def jvp_flash_attention(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Return the tangent by the kernel of the package jvp-flash-attention."""
    from jvp_flash_attention.jvp_attention import JVPAttn

    return torch.func.jvp(JVPAttn.fwd_dual, primals, tangents)[1]


FORWARD_MODE = "forward mode, math kernel"


@dataclass
class Measured:
    """The measurements of one way to compute the tangent.

    Attributes:
        seconds: one time per round.
        memory: peak memory in bytes beyond the inputs.
        error: relative error of the tangent; None for the value alone.
        failure: the reason why it does not run, or "".
    """

    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    error: float | None = None
    failure: str = ""


def ways(parts: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the functions to compare by name, for (q, dq, k, dk, v, dv) of shape (6, b, h, n, d)."""
    pairs = [Pair(parts[2 * i], parts[2 * i + 1]) for i in range(3)]
    primals, tangents = tuple(p.primal for p in pairs), tuple(p.tangent for p in pairs)
    tokens, head_size = parts.shape[-2:]
    found: dict[str, Callable[[], Tensor]] = {
        "fused value alone": lambda: functional.scaled_dot_product_attention(*primals),
        FORWARD_MODE: lambda: forward_mode(pairs),
    }
    for queries in (64, 256, tokens):
        found[f"value and blocks of {queries}"] = lambda queries=queries: in_blocks(pairs, queries)
    if supports(*primals) is None:
        scale = 1 / head_size**0.5
        found["value and fused tangent"] = lambda: (found["fused value alone"](), fused_tangent(*parts, scale))[1]
    if parts.is_cuda and find_spec("jvp_flash_attention"):
        found["jvp-flash-attention"] = lambda: jvp_flash_attention(primals, tangents)
    return found


def measure(parts: Tensor, rounds: int) -> dict[str, Measured]:
    """Return the measurements by name; ways that do not run have a failure."""
    first = parts[:, :1, :1].double()
    exact = forward_mode([Pair(first[2 * i], first[2 * i + 1]) for i in range(3)])
    found = {name: (way, Measured()) for name, way in ways(parts).items()}
    for name, (way, result) in found.items():
        try:
            tangent = way()[:1, :1].double()
            result.memory = peak_memory(parts.device, way)
        except Exception as problem:  # Another project's kernel may raise anything.
            result.failure = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
            continue
        if name != "fused value alone":
            result.error = ((tangent - exact).norm() / exact.norm()).item()
    for _ in range(rounds):
        for way, result in (pair for pair in found.values() if not pair[1].failure):
            wait(parts.device)
            start = time.perf_counter()
            way()
            wait(parts.device)
            result.seconds.append(time.perf_counter() - start)
    return {name: result for name, (_, result) in found.items()}


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
    found = measure(parts, rounds)
    print("| variant | ms | MB | error |\n|---|---:|---:|---:|")
    for name, f in found.items():
        error = "" if f.error is None else f"{f.error:.1e}"
        cells = f"fails: {f.failure} | |" if f.failure else f"{median(f.seconds) * 1e3:.1f} | {f.memory / 2**20:.1f} |"
        print(f"| {name} | {cells} {error} |")
    base = found[FORWARD_MODE].seconds
    ratios = {
        name: median(a / b for a, b in zip(f.seconds, base, strict=True)) for name, f in found.items() if not f.failure
    }
    print(" ".join(f"{name.replace(' ', '_').replace(',', '')}={ratio:.3g}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
