"""The parts around a network that its record names: the VAE of its latents and the text encoder of its captions."""

from typing import Any

from decm_lightning.autoencoders.latent_coder import LatentCoder
from decm_lightning.autoencoders.normalization import LatentNormalization
from decm_lightning.networks.record import Reference, shortened
from decm_lightning.text import CaptionEncoder


def latent_coder(network: Any, vae: str | None = None) -> LatentCoder | None:
    """Return the VAE with the normalization of a network's latents; None if the record knows no VAE.

    Args:
        network: the network, with or without a record.
        vae: where the VAE is; None for the path or name in the record.

    Raises:
        OSError: naming the VAE, if it does not exist.
        ValueError: if it is another VAE than the recorded one (the message names both), its latents have another number
            of channels than the network, or its path is unknown.
    """
    # Imported here: it imports the networks.
    from decm_lightning.autoencoders.loading import load_autoencoder

    record = network.record
    path = vae or (record and record.vae and record.vae.name)
    if record is None or not (record.vae or (vae and record.latents)):
        return None
    if not path:
        raise ValueError(f"the path of the VAE {record.vae} is not recorded: pass it as vae (--vae PATH)")
    try:
        autoencoder = load_autoencoder(path)
    except OSError as error:
        fault = f"the VAE of the model's latents, {record.vae or path}, was not found"
        raise FileNotFoundError(f"{fault}: pass its path as vae (--vae PATH): {error}") from error
    check_recorded("VAE", path, autoencoder.identity, record.vae)
    if (found := autoencoder.latent_channels) != network.sample_shape[0]:
        raise ValueError(f"the model generates {network.sample_shape[0]} channels, but latents of {path} have {found}")
    return LatentCoder(autoencoder, record.latents and LatentNormalization.from_json(record.latents))


def check_recorded(what: str, name: str, identity: str, recorded: Reference | None) -> None:
    """Refuse another VAE or text encoder than the recorded one.

    Raises:
        ValueError: naming both.
    """
    if recorded is not None and identity != recorded.identity:
        raise ValueError(
            f"the model was trained with the {what} {recorded}, but {name} is another one ({shortened(identity)}): "
            f"use the {what} that it was trained with"
        )


def checked_encoder(network: Any, encoder: CaptionEncoder) -> CaptionEncoder:
    """Return a text encoder after checking that it is the recorded one, if one is recorded.

    Raises:
        ValueError: if it is another one. The message names both.
    """
    if network.record is not None:
        recorded = network.record.text_encoder
        check_recorded("text encoder", encoder.name or type(encoder).__name__, encoder.identity, recorded)
    return encoder
