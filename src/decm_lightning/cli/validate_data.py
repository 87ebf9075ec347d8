"""decm validate-data: every row of a folder of latents, before a long run trusts it."""

from collections.abc import Sequence

from jsonargparse import auto_cli
from rich.progress import track

from decm_lightning.data.latents import Latents, Moments


def validate_data(
    folder: str,
    num_classes: int | None = None,
    channels: int | None = None,
    size: int | None = None,
    latent_norm: bool = True,
    latent_multiplier: float = 1.0,
) -> None:
    """Read all shards of a folder and print what is in them; the first thing wrong ends it with exit code 2.

    Args:
        folder: safetensors shards in LightningDiT's format, and latents_stats.pt.
        num_classes: labels must be below it; by default what cache.json says.
        channels: channels that the latents must have.
        size: height and width that the latents must have.
        latent_norm: normalise by latents_stats.pt, as for VA-VAE.
        latent_multiplier: times this; with latent_norm false 0.18215 for Stable Diffusion's VAE.
    """
    latents = Latents(folder, num_classes, latent_norm, latent_multiplier)
    wanted = (channels, size, size)
    if any(want not in (None, found) for want, found in zip(wanted, latents.shards.shape, strict=True)):
        expected = " x ".join("any" if want is None else str(want) for want in wanted)
        raise ValueError(f"latents of {folder} are {_times(latents.shards.shape)}: expected {expected}")
    if latents.provenance is not None:
        for file in track(sorted(latents.shards.folder.iterdir()), "checksums"):
            latents.provenance.check_file(file)
    moments = latents.measure(track(latents.everything(), "latents"))
    for name, value in _table(latents, moments).items():
        print(f"{name:<8} {value}")


def run(argv: Sequence[str]) -> None:
    """Parse and validate."""
    auto_cli(validate_data, args=list(argv), prog="decm validate-data", exit_on_error=False)


def _table(latents: Latents, moments: Moments) -> dict[str, object]:
    shards = latents.shards
    mean, std = moments.overall()
    return {
        "shards": len(shards.files),
        "images": f"{len(shards)}, each plain and mirrored",
        "classes": f"{len(shards.labels.unique())} of {shards.num_classes} present",
        "shape": _times(shards.shape),
        "mean": f"{mean:.4f} after scaling",
        "std": f"{std:.4f} after scaling",
        "VAE": latents.provenance.vae if latents.provenance else "unknown",
    }


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
