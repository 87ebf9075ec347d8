"""python -m benchmarks.loader: rows of latents per CPU second, through `Latents` and through a plain memory map.

Writes random shards with the shape and dtype of LightningDiT's to a temporary folder (64 KB per image in float32). In
every round both readers read the same batches of shuffled items, half of them mirrored, in one thread. The results are
medians over rounds of rows per second of CPU time, with the files in the page cache. The last line is the median of the
rounds' ratios.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from safetensors.torch import save_file

from decm_lightning.data.latents.imagenet import Latents
from decm_lightning.data.latents.shards import KEYS


def write(folder: Path, shards: int, rows: int, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Write shards of noise, and the same rows as one float32 file for the memory map."""
    generator = torch.Generator().manual_seed(0)
    with (folder / "rows.bin").open("wb") as whole:
        for shard in range(shards):
            x = torch.randn(2, rows, *shape, generator=generator).to(dtype)
            labels = torch.randint(1000, (rows,), generator=generator)
            tensors = dict(zip(KEYS, (x[0].clone(), x[1].clone(), labels), strict=True))
            save_file(tensors, folder / f"shard{shard:03d}.safetensors")
            whole.write(x[0].float().numpy().tobytes())
    ones = torch.ones(1, shape[0], 1, 1)
    torch.save({"mean": 0 * ones, "std": ones}, folder / "latents_stats.pt")


def main(
    shards: int = 20,
    rows: int = 1000,
    batch: int = 256,
    batches: int = 24,
    rounds: int = 9,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    shape: tuple[int, int, int] = (32, 16, 16),
) -> None:
    """Measure both readers and print their speeds.

    Args:
        shards: number of files.
        rows: images per file.
        batch: items per batch.
        batches: batches per round.
        rounds: number of rounds.
        dtype: dtype of the stored latents.
        shape: shape of a latent.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), shards, rows, shape, getattr(torch, dtype))
        latents = Latents(folder, 1000)
        count = len(latents)
        mapped = np.memmap(Path(folder) / "rows.bin", np.float32, "r", shape=(count, *shape))
        ways: dict[str, Callable[[list[int]], object]] = {
            "Latents, scaled, with labels": latents.__getitems__,
            "memory map, raw rows": lambda items: mapped[np.asarray(items) % count],
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for seed in range(rounds):
            order = np.random.default_rng(seed).integers(2 * count, size=(batches, batch)).tolist()
            for name, read in ways.items():
                start = time.process_time()
                for items in order:
                    read(items)
                speeds[name].append(batches * batch / (time.process_time() - start))
    for name, values in speeds.items():
        print(f"{name}: {median(values):,.0f} rows per CPU second ({min(values):,.0f} to {max(values):,.0f})")
    ours, raw = speeds.values()
    print(f"ratio={median(one / other for one, other in zip(ours, raw, strict=True)):.2f}")


if __name__ == "__main__":
    auto_cli(main)
