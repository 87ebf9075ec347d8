"""decm validate-data: check every row of a folder of latents before a long run."""

from collections.abc import Sequence

from tqdm.auto import tqdm

from decm_lightning.autoencoders import load_autoencoder
from decm_lightning.data.latents.validation import ErrorReport, FolderCheck


def validate_data(
    folder: str,
    num_classes: int | None = None,
    channels: int | None = None,
    size: int | None = None,
    latent_norm: bool = True,
    latent_multiplier: float = 1.0,
    vae: str | None = None,
) -> None:
    """Read all shards of a folder, and print their statistics and errors. The exit code is 2 if there are errors.

    Args:
        folder: a folder with safetensors shards in LightningDiT's format and latents_stats.pt.
        num_classes: number of classes; by default the value in cache.json.
        channels: expected channels of the latents.
        size: expected height and width of the latents.
        latent_norm: normalize the latents by latents_stats.pt, as for VA-VAE.
        latent_multiplier: factor of the latents; 0.18215 with latent_norm false for Stable Diffusion's VAE.
        vae: the VAE to check the latents against: a folder, a name on the Hugging Face hub, or a file.
    """
    autoencoder = None if vae is None else load_autoencoder(vae)
    errors = ErrorReport(tqdm.write)
    try:
        check = FolderCheck(folder, num_classes, latent_norm, latent_multiplier, errors)
    except ValueError:
        errors.check(folder)
        raise
    expected = (channels, size, size)
    if any(number not in (None, found) for number, found in zip(expected, check.shards.shape, strict=True)):
        text = _times(["any" if number is None else number for number in expected])
        errors.add("shape", f"latents of {folder} are {_times(check.shards.shape)}: expected {text}")
    check.check_checksums()
    check.read()
    table = _table(check)
    if vae is not None and autoencoder is not None:
        table["decoding"] = check.check_vae(vae, autoencoder)
    for name, value in table.items():
        print(f"{name:<8} {value}")
    _print_channels(check)
    errors.check(folder)


def _table(check: FolderCheck) -> dict[str, object]:
    shards = check.shards
    table: dict[str, object] = {
        "shards": len(shards.files),
        "images": f"{len(shards)}, each plain and mirrored",
        "classes": f"{len(shards.labels.unique())} of {shards.num_classes} present",
        "shape": _times(shards.shape),
    }
    for kind, count in shards.skipped.items():
        table["skipped"] = f"{table['skipped']}, {count} {kind}" if "skipped" in table else f"{count} {kind}"
    if check.moments.count:
        mean, std = check.moments.overall()
        means, stds = check.moments.mean, check.moments.std()
        furthest, oddest = int(means.abs().argmax()), int((stds - 1).abs().argmax())
        unit = "unscaled" if check.normalization is None else "after scaling"
        table["mean"] = f"{mean:.4f} {unit}, furthest from 0 in channel {furthest}: {means[furthest]:.4f}"
        table["std"] = f"{std:.4f} {unit}, furthest from 1 in channel {oddest}: {stds[oddest]:.4f}"
        lowest, highest = int(check.minimum.argmin()), int(check.maximum.argmax())
        table["range"] = (
            f"{check.minimum[lowest]:.2f} (channel {lowest}) to {check.maximum[highest]:.2f} (channel {highest})"
        )
    table["VAE"] = check.provenance.vae if check.provenance else "unknown"
    return table


def _print_channels(check: FolderCheck) -> None:
    if not check.moments.count:
        return
    print(f"\n{'channel':>7} {'mean':>9} {'std':>9} {'min':>9} {'max':>9}")
    values = (check.moments.mean, check.moments.std(), check.minimum, check.maximum)
    for channel, row in enumerate(zip(*(value.tolist() for value in values), strict=True)):
        print(f"{channel:>7} " + " ".join(f"{value:>9.4f}" for value in row))


def _times(shape: Sequence[object]) -> str:
    return " x ".join(map(str, shape))
