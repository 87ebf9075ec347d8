"""decm export: a checkpoint's averaged weights as a folder that `load`, `decm sample` and a teacher read."""

from collections.abc import Sequence

from jsonargparse import auto_cli

from decm_lightning.networks import load, save


def export(checkpoint: str, out: str) -> None:
    """Write config.json and model.safetensors.

    Args:
        checkpoint: a .ckpt file written by decm fit.
        out: the folder to write.
    """
    save(load(checkpoint), out)
    print(f"wrote {out}/config.json and {out}/model.safetensors")


def run(argv: Sequence[str]) -> None:
    """Parse and export."""
    auto_cli(export, args=list(argv), prog="decm export", exit_on_error=False)
