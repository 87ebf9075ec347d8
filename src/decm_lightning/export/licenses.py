"""Find the license that a student inherits from the model it was distilled from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from decm_lightning.networks import Network
from decm_lightning.networks.hub import HUB_NAME, is_hub_name
from decm_lightning.networks.record import Reference

IDS = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "openrail++",
    "creativeml-openrail-m", "bigscience-openrail-m", "gemma", "unlicense",
}  # fmt: skip
"""The hub's own names of licenses, as far as models of this kind use them; it calls all others "other"."""
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class License:
    """A license in the terms of the Hugging Face hub.

    `id` is the hub's identifier, "unknown", or "other" for a license that the hub does not list. This has a name, in
    lower case with hyphens, and the address of its text.
    """

    id: str
    name: str | None = None
    link: str | None = None

    @classmethod
    def named(cls, name: str) -> "License":
        """Return the license of an SPDX identifier or another name; unknown for an empty name."""
        slug = re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")
        if not slug or slug == "unknown":
            return UNKNOWN
        known = (license for license in BASES.values() if license.name == slug)
        return cls(slug) if slug in IDS else next(known, cls("other", slug))

    def __str__(self) -> str:
        text = self.name or self.id
        return f"[{text}]({self.link})" if self.link else text


UNKNOWN = License("unknown")


def _other(name: str, model: str, file: str) -> License:
    return License("other", name, f"{HUB}/{model}/blob/main/{file}")


# From the models' own cards. Sana's card names its license in the text only.
BASES = {
    "stable-diffusion-3.5": _other("stabilityai-ai-community", "stabilityai/stable-diffusion-3.5-medium", "LICENSE.md"),
    "flux.1-dev": _other("flux-1-dev-non-commercial-license", "black-forest-labs/FLUX.1-dev", "LICENSE.md"),
    "flux.1-schnell": License("apache-2.0"),
    "sana_": _other("nscl-v2-custom", "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "LICENSE.txt"),
}
"""The licenses of known base models, by how their names begin in lower case."""


def base_of(network: Network) -> Reference | None:
    """Return the model whose weights the network adapts or was distilled from; None if its name is unknown."""
    record, model = network.record, network.config.get("model")
    if record is not None and record.teacher is not None and record.teacher.name:
        return record.teacher
    return Reference(model, str(network.config.get("base") or "")) if isinstance(model, str) else None


def license_of(base: Reference | None) -> License:
    """Return the license of a base model.

    It is the recorded one, that of a known model, or that in the base's own card, in its folder or in the hub's cache.
    Nothing is downloaded.
    """
    if base is None:
        return UNKNOWN
    if base.license:
        return License.named(base.license)
    for name, license in BASES.items():
        # A folder of the hub's cache is called models--user--name.
        if re.search(rf"(^|/|--){re.escape(name)}", base.name.lower()):
            return license
    return _in_card(base.name)


def _in_card(name: str) -> License:
    data = _card_data(name)
    found, link = data.get("license"), data.get("license_link")
    if not isinstance(found, str):
        return UNKNOWN
    if isinstance(link, str) and not link.startswith("http"):
        link = f"{HUB}/{name}/blob/main/{link}" if is_hub_name(name) else None
    if found == "other":
        return License(found, str(data.get("license_name") or "") or None, link)
    return License.named(found)


def _card_data(name: str) -> dict[str, Any]:
    """Return the metadata in the card of a folder, or of a name in the hub's cache; empty without a card."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    place: Any = Path(name) / "README.md"
    if not place.is_file() and HUB_NAME.fullmatch(name):
        place = try_to_load_from_cache(name, "README.md")
    try:
        return metadata_load(place) or {}
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        return {}
