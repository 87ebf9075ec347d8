"""The model card next to an export: what the network is, how to run it, how good it is, and its license."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einops import rearrange
from huggingface_hub import ModelCard, ModelCardData
from jaxtyping import UInt8
from torch import Tensor

from decm_lightning.evaluation.table import markdown_table
from decm_lightning.export.licenses import UNKNOWN, License, base_of, license_of
from decm_lightning.files import atomic
from decm_lightning.image_writer import save_grid
from decm_lightning.networks import Network
from decm_lightning.networks.hub import is_hub_name
from decm_lightning.networks.record import Record, Reference, default_sampling, shortened
from decm_lightning.samplers.options import write_options

CARD, GRID = "README.md", "samples.png"
MARK = "<!-- decm export replaces this card. Remove this line to keep your changes. -->"
PAPER = "[Dual-End Consistency Models](https://arxiv.org/abs/2602.10764)"
LIBRARIES = {
    "folder": "decm-lightning", "safetensors": "decm-lightning", "diffusers": "diffusers", "lora": "diffusers"
}  # fmt: skip
"""The library that reads a format, in the terms of the hub."""
SMALL = 64
"""Images below this size, in pixels, are enlarged in the grid."""


@dataclass(frozen=True)
class Samples:
    """The images in a card: a row for each number of steps, and a column for each class or caption."""

    images: UInt8[Tensor, "rows columns c h w"]
    steps: Sequence[int]
    columns: Sequence[str]


def write_card(network: Network, out: Path, to: str, samples: Samples | None, name: str = "") -> list[Path]:
    """Write the card of an export and its samples, and return the files; none if the user has removed the card's mark.

    All statements come from the network and its record. `to` is the format, a key of `export.FORMATS`, and `name` the
    name on the Hugging Face hub, "" for a local export.
    """
    card, grid = places(out)
    if card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        return []
    files = [card]
    if samples is not None:
        height = samples.images.shape[-2]
        flat = rearrange(samples.images, "rows columns c h w -> (rows columns) c h w")
        save_grid(flat, samples.images.shape[1], max(1, SMALL // height), grid)
        files.append(grid)
    text = card_text(network, out, to, samples, grid.name, name)
    with atomic(card) as partial:
        partial.write_text(text, encoding="utf-8")
    return files


def places(out: Path) -> tuple[Path, Path]:
    """Return the paths of an export's card and samples.

    A folder has README.md and samples.png. A single file student.safetensors has student.md and student.png, so that
    the README.md of its folder is never replaced.
    """
    return (out / CARD, out / GRID) if out.is_dir() else (out.with_suffix(".md"), out.with_suffix(".png"))


def card_text(network: Network, out: Path, to: str, samples: Samples | None, grid: str, name: str) -> str:
    """Return the card as Markdown with the hub's YAML front matter; see `write_card`."""
    record = network.record or Record()
    base = base_of(network)
    license = license_of(base)
    parts = [
        MARK,
        f"# {(name or out.stem).rpartition('/')[2]}",
        _what(network, base),
        _pictured(samples, grid),
        "## Use",
        _usage(network, out, to, name, base),
        _recommended(network, record),
        "## Training",
        _list(_training(network, record, base)),
        "## Quality",
        *_quality(record.quality),
        "## License",
        _list(_licenses(record, base, license)),
    ]
    return str(ModelCard(f"---\n{_front(network, to, base, license).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _front(network: Network, to: str, base: Reference | None, license: License) -> ModelCardData:
    captions, is_lora = network.reads_captions, to.startswith("lora")
    kind = "text-to-image" if captions else "class-conditional" if network.num_classes else "unconditional"
    tags = ["decm-lightning", "diffusion", "few-step", "consistency-models", kind]
    image = len(network.sample_shape) == 3
    return ModelCardData(
        base_model=base.name if base is not None and is_hub_name(base.name) else None,
        library_name=LIBRARIES.get(to),
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        # The hub has no task for images of classes.
        pipeline_tag=("text-to-image" if captions else "unconditional-image-generation") if image else None,
        tags=[*tags, "lora"] if is_lora else tags,
    )


def _what(network: Network, base: Reference | None) -> str:
    count = sum(parameter.numel() for parameter in network.parameters())
    shape = " x ".join(map(str, network.sample_shape))
    given = "captions" if network.reads_captions else f"{network.num_classes} classes" * bool(network.num_classes)
    made = f"It generates samples of shape {shape}" + (f" for {given}" if given else "")
    if not network.reads_end_time:
        return f"A velocity network ({type(network).__name__}, {count:,} parameters) of decm-lightning. {made}."
    return (
        f"A few-step student ({type(network).__name__}, {count:,} parameters), distilled with decm-lightning ({PAPER}) "
        f"from {'a teacher that is not recorded' if base is None else f'`{base.name}`'}. {made} in 1 to 50 steps."
    )


def _pictured(samples: Samples | None, grid: str) -> str:
    if samples is None:
        return "No samples are shown."
    steps = ", ".join(map(str, samples.steps))
    return f"![samples at {steps} steps]({grid})\n\nRows: {steps} steps. Columns: {', '.join(samples.columns)}."


def _usage(network: Network, out: Path, to: str, name: str, base: Reference | None) -> str:
    """Return a block of a few lines that run the export."""
    where, captions = name or str(out), network.reads_captions
    condition = '"a red apple"' if captions else str(min(3, max(network.num_classes - 1, 0)))
    if to == "diffusers":
        lines = [
            "from diffusers import DiffusionPipeline",
            f'pipeline = DiffusionPipeline.from_pretrained("{where}", trust_remote_code=True)',
            f"image = pipeline({condition}, num_inference_steps=4).images[0]",
        ]
    elif to == "lora-comfyui":
        return (
            f"Place {out.name} in ComfyUI's models/loras, load it with LoraLoaderModelOnly at strength 1.0, and sample "
            "with SamplerCustomAdvanced: sampler lcm, ManualSigmas 1.0, 0.3, 0.2, 0.1, 0.0, CFGGuider with cfg 1.0."
        )
    elif to == "lora":
        lines = [
            "from diffusers import DiffusionPipeline, FlowMatchLCMScheduler",
            f'pipeline = DiffusionPipeline.from_pretrained("{base.name if base else "the base model"}")',
            f'pipeline.load_lora_weights("{name or out.parent}", weight_name="{out.name}")',
            "pipeline.scheduler = FlowMatchLCMScheduler(shift=1.0)",
            f"image = pipeline({condition}, sigmas=[1.0, 0.3, 0.2, 0.1], guidance_scale=1.0).images[0]",
        ]
    elif len(network.sample_shape) == 3 and network.sample_shape[0] not in (1, 3) and not _has_vae(network):
        # The VAE is unknown: the error of the command says which options name it.
        return f"    decm sample{'-prompts' * captions} {where}{' --prompts FILE' * captions} --steps 2"
    else:
        file = f'hf_hub_download("{name}", "{out.name}")' if name and to == "safetensors" else f'"{where}"'
        lines = [
            "import decm_lightning",
            *(["from huggingface_hub import hf_hub_download"] if file.startswith("hf") else []),
            f"student = decm_lightning.load({file})",
            f"images = student.generate([{condition}], steps={2 if network.reads_end_time else 50})",
        ]
    return "\n".join(["```python", *lines, "```"])


def _recommended(network: Network, record: Record) -> str:
    sampling = record.sampling or default_sampling(network.reads_end_time)
    rows = [{"steps": steps, "sampler": f"`{name}`"} for steps, name in sorted(sampling.items())]
    head = "Recommended samplers" if record.sampling else "Default samplers, which were not measured with this model"
    return f"{head}:\n\n{markdown_table(rows).rstrip()}"


def _training(network: Network, record: Record, base: Reference | None) -> dict[str, str]:
    guidance = ", ".join(f"{name} {value}" for name, value in (record.guidance or {}).items())
    lines = {
        "teacher": _reference(base),
        "guidance": guidance or "unknown",
        "objective": f"`{record.objective}`" if record.objective else "unknown",
        "training steps": f"{record.steps:,}" if record.steps else "unknown",
        "data": _reference(record.data),
    }
    if network.reads_captions:
        name = network.config.get("text_encoder")
        encoder = Reference(name, "") if isinstance(name, str) else None
        lines["text encoder"] = _reference(record.text_encoder or encoder)
    if record.vae is not None:
        lines["VAE"] = _reference(record.vae)
    return lines


def _quality(quality: Mapping[str, Any] | None) -> list[str]:
    """Return the measured table with its protocol."""
    if not quality or not quality.get("rows"):
        return ["Not measured: `decm test` measures it."]
    rows = quality["rows"]
    table = [
        {name: value for name, value in row.items() if name != "options"}
        | {"sampler": f"{row.get('sampler')}{write_options(row.get('options') or {})}"}
        for row in rows
    ]
    protocol = {str(name): str(value) for name, value in quality.get("protocol", {}).items()}
    return [f"{quality.get('metric', 'Unknown metric')}:", markdown_table(table).rstrip(), "Protocol:", _list(protocol)]


def _licenses(record: Record, base: Reference | None, license: License) -> dict[str, str]:
    remedy = " (check the base model and the data before you use or share it)"
    data = License.named(record.data.license) if record.data is not None else UNKNOWN
    return {
        "this model": f"{license}, as its teacher" if license != UNKNOWN else f"unknown{remedy}",
        "teacher": f"{license} (`{base.name}`)" if base is not None else "unknown",
        "data": str(data),
    }


def _reference(reference: Reference | None) -> str:
    if reference is None:
        return "unknown"
    hash = f" ({shortened(reference.identity)})" if reference.identity else ""
    return (f"`{reference.name}`" if reference.name else "unknown") + hash


def _list(lines: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _has_vae(network: Network) -> bool:
    return network.record is not None and network.record.vae is not None
