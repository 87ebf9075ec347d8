"""The VAE of a network's latents, with their normalization: as recorded, or as the user names it."""

from pathlib import Path
from typing import Any

from decm_lightning.autoencoders.latent_coder import LatentCoder
from decm_lightning.autoencoders.loading import load_autoencoder
from decm_lightning.autoencoders.normalization import LatentNormalization
from decm_lightning.autoencoders.provenance import read_coder
from decm_lightning.networks.record import check_recorded


def latent_coder(network: Any, vae: str | None = None) -> LatentCoder | None:
    """Return the VAE, at `vae` or as recorded, with the normalization of a network's latents; None without a record.

    A recorded folder that does not exist is looked for next to the network, so that both can move together.

    Raises:
        OSError: naming the VAE, if it does not exist.
        ValueError: if it is another VAE than the recorded one (the message names both), its latents have another number
            of channels than the network, or its path is unknown.
    """
    record = network.record
    path = vae or (record and record.vae and _beside(record.vae.name, network.place))
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


def coder_of(network: Any, vae: str | None, latents: str | None) -> LatentCoder | None:
    """Return the coder for the samples of a network; None if they are images.

    Args:
        network: the network. Another VAE than the recorded one is refused.
        vae: the VAE; None for the recorded one.
        latents: the folder of latents that the network was trained on; None for the recorded normalization, or without
            a record for that in the VAE's config, which is only used for networks that read captions.

    Raises:
        OSError: if the VAE or the statistics of the latents do not exist.
        ValueError: if the samples are not latents of this VAE, or the VAE or the normalization is unknown.
    """
    if not latents and (coder := latent_coder(network, vae)) is not None:
        return coder
    channels, by_config = network.sample_shape[0], network.reads_captions
    recorded = network.record.vae if network.record else None
    vae = vae or (_beside(recorded.name, network.place) if recorded and latents else None)
    if vae and (latents or by_config):
        coder = read_coder(vae, latents)
        check_recorded("VAE", vae, coder.autoencoder.identity, recorded)
        if (found := coder.autoencoder.latent_channels) != channels:
            raise ValueError(f"the model generates {channels} channels, but latents of {vae} have {found}")
        return coder
    if vae or latents:
        raise ValueError("give --vae and --latents together: the VAE and the folder with its latents' statistics")
    if channels not in (1, 3):
        needed = "--vae, the VAE that encoded them," if by_config else "--vae and --latents"
        raise ValueError(f"the model generates latents with {channels} channels: give {needed} to decode them")
    return None


def _beside(name: str, place: Path | None) -> str:
    """Return the folder `name`, or if it does not exist the folder with the same last part next to `place`."""
    if name and place and not Path(name).exists() and (found := place.parent / Path(name).name).is_dir():
        return str(found)
    return name
