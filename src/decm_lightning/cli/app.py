"""decm app: a page in the browser that generates images at several numbers of steps side by side."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.cli.sampling import ImageGenerator, image_generator, in_steps
from decm_lightning.cli.targets import check_device
from decm_lightning.conditions import select
from decm_lightning.errors import NonFiniteError, needs
from decm_lightning.image_writer import to_pil
from decm_lightning.networks import Network, load
from decm_lightning.networks.record import Record
from decm_lightning.sample_folder import sample_name
from decm_lightning.samplers import SAMPLERS
from decm_lightning.seeds import check_seed
from decm_lightning.text import CaptionEncoder
from decm_lightning.types import Condition

HOST = "127.0.0.1"
COUNTS = (1, 2, 4, 8)
"""The numbers of steps that the page shows next to the chosen one."""
LARGEST = 50
IMAGES = 4
"""Images for each number of steps."""
RECOMMENDED = "recommended"
EXACT = 2**53 - 1
"""The largest integer that a browser represents exactly."""
SMALL = 128
"""Images below this size, in pixels, are shown with sharp pixels."""
CSS = """
.gradio-container {width: 100%; max-width: 1300px !important; margin: auto !important}
#samples .html-container {padding: 0 !important}
.columns {display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 20px 16px}
.columns figure {margin: 0; color: var(--body-text-color)}
.columns figcaption {padding-bottom: 6px}
.tiles {display: grid; grid-template-columns: 1fr 1fr; gap: 4px}
.tiles > * {aspect-ratio: ASPECT; padding: 0 !important; border-radius: 4px; overflow: hidden}
.tiles > span {background: var(--border-color-primary)}
.tiles img {width: 100%; height: 100%; margin: 0; image-rendering: PIXELS}
@media (max-width: 640px) {.columns {grid-template-columns: 1fr} .tiles {grid-template-columns: repeat(4, 1fr)}}
"""


def app(
    model: str,
    port: int = 7860,
    share: bool = False,
    encoder: str | None = None,
    device: str = "cpu",
    vae: str | None = None,
    latents: str | None = None,
    trust: bool = False,
) -> None:
    """Serve a page that generates images of a class or caption at several numbers of steps, until Ctrl-C.

    The images are those of decm sample and decm sample-prompts for the same seed. Only this machine can open the page,
    unless it is shared.

    Args:
        model: a .ckpt file, a folder with config.json and model.safetensors, or a .safetensors file of decm export.
        port: the port on 127.0.0.1, from 1 to 65535.
        share: also make a public link, through a server of Gradio; anyone who has the link can generate images.
        encoder: the text encoder that the model was trained with; by default the recorded one. Another one is refused.
        device: the device, such as cpu or cuda.
        vae: the VAE of the latents: a folder, a name on the Hugging Face hub, or a file such as VA-VAE's. By default
            the recorded one; another one is refused.
        latents: the folder of latents that the model was trained on, whose latents_stats.pt and cache.json are read. By
            default the recorded statistics.
        trust: allow a network class from outside this package; importing its module runs its code.
    """
    gradio = import_gradio()
    check_port(port)
    check_device(device)
    network = load(model, device, trust)
    generator = image_generator(network, None, None, 0, vae, latents)
    texts = network.caption_encoder(encoder) if network.reads_captions else None
    with TemporaryDirectory(prefix="decm-app-") as folder:
        studio = Studio(generator, texts, Path(folder))
        # Errors of the model show now, and the first times of the page are not those of a first call.
        studio.column("a cat" if texts else 0, RECOMMENDED, 1, 0)
        place = Path(model).with_suffix("") if Path(model).is_file() else Path(model)
        _serve(page(gradio, studio, "/".join(place.parts[-2:])), studio, port, share)


def import_gradio() -> ModuleType:
    """Return the module gradio."""
    with needs("decm app", "gradio", "app"):
        import gradio
    return gradio


def check_port(port: int) -> None:
    """Check that a server can listen on a port of this machine."""
    if not 0 < port < 2**16:
        raise ValueError(f"port must be from 1 to 65535: got {port}")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise OSError(
                f"port {port} cannot be used ({str(error.strerror).lower()}): choose another --port"
            ) from None


@dataclass(frozen=True)
class Column:
    """Images with the same number of steps.

    Args:
        files: one PNG per image.
        milliseconds: the time to generate all of them.
    """

    files: Sequence[Path]
    milliseconds: float


@dataclass(frozen=True)
class Studio:
    """Generates the images of the page and writes them as PNG files, like decm sample does into a folder.

    Args:
        generator: the image generator of the network, which stays loaded.
        encoder: the text encoder; None for a network without captions.
        folder: the folder for the files.
    """

    generator: ImageGenerator
    encoder: CaptionEncoder | None
    folder: Path

    def column(self, requested: int | str | None, sampler: str, steps: int, seed: int) -> Column:
        """Generate the first images of a class or caption."""
        condition, rows = self._rows(requested)
        named = None if sampler == RECOMMENDED else sampler
        generator = self.generator.at(steps, named, check_seed(seed))
        start = time.perf_counter()
        images = generator.images(condition, rows)
        milliseconds = 1000 * (time.perf_counter() - start)
        label = requested if isinstance(requested, int) else None
        # A browser may store an image by its address, so that every call needs a new one.
        folder = Path(mkdtemp(dir=self.folder))
        files = [folder / sample_name(row, label) for row in rows]
        for file, image in zip(files, images, strict=True):
            to_pil(image).save(file, "PNG")
        return Column(files, milliseconds)

    def _rows(self, requested: int | str | None) -> tuple[Condition, list[int]]:
        """Return the condition and the sample numbers: image k of class c is k * num_classes + c, of a caption k."""
        network, device = self.generator.network, self.generator.device
        if self.encoder is not None:
            if not isinstance(requested, str) or not requested.strip():
                raise ValueError("the caption is empty")
            captions = select(self.encoder([requested.strip()]), torch.zeros(IMAGES, dtype=torch.long))
            return _pytree.tree_map_only(Tensor, lambda part: part.to(device), captions), list(range(IMAGES))
        if not network.num_classes:
            return None, list(range(IMAGES))
        label = int(requested or 0)
        labels = torch.full((IMAGES,), label, device=device)
        return labels, [k * network.num_classes + label for k in range(IMAGES)]


def page(gradio: Any, studio: Studio, name: str) -> Any:
    """Return the page as gradio.Blocks."""

    def generate(requested: int | str | None, sampler: str, steps: int, seed: int | None) -> Iterator[str]:
        columns: dict[int, Column | None] = dict.fromkeys(sorted({*COUNTS, int(steps)}))
        for count in columns:
            try:
                columns[count] = studio.column(requested, sampler, count, int(seed or 0))
            except (ValueError, NonFiniteError) as error:
                raise gradio.Error(str(error), print_exception=False) from error
            yield html(columns)

    network = studio.generator.network
    with gradio.Blocks(title=f"{name} - decm app", analytics_enabled=False) as demo:
        gradio.Markdown(f"# {name}\n{_subtitle(network)}")
        with gradio.Row(equal_height=True):
            requested = _condition(gradio, network)
            choices = [RECOMMENDED, *SAMPLERS]
            sampler = gradio.Dropdown(choices, value=RECOMMENDED, label="Sampler", elem_id="sampler", min_width=170)
            steps = gradio.Slider(1, LARGEST, value=16, step=1, label="Steps", elem_id="steps", min_width=200)
            seed = gradio.Number(0, precision=0, minimum=0, maximum=EXACT, label="Seed", elem_id="seed", min_width=100)
            button = gradio.Button("Generate", variant="primary", elem_id="generate", min_width=120)
        shown = gradio.HTML(html(dict.fromkeys(COUNTS)), elem_id="samples")
        gradio.Markdown(f"Each column shows the same {IMAGES} samples. The times are for all {IMAGES} together.")
        events = [button.click] + ([requested.submit] if isinstance(requested, gradio.Textbox) else [])
        gradio.on(events, generate, [requested, sampler, steps, seed], shown, concurrency_limit=1)
    return demo


def html(columns: Mapping[int, Column | None]) -> str:
    """Return the columns by number of steps; one that is not generated yet has empty tiles."""
    figures = []
    for steps, column in columns.items():
        files = column.files if column else []
        tiles = [
            f'<a href="gradio_api/file={file}" target="_blank">'
            f'<img src="gradio_api/file={file}" alt="sample {file.stem}, {in_steps(steps)}"></a>'
            for file in files
        ] or ["<span></span>"] * IMAGES
        head = f"<b>{in_steps(steps)}</b>" + (f" in {column.milliseconds:.0f} ms" if column else "")
        figures.append(f'<figure><figcaption>{head}</figcaption><div class="tiles">{"".join(tiles)}</div></figure>')
    return f'<div class="columns">{"".join(figures)}</div>'


def _condition(gradio: Any, network: Network) -> Any:
    """Return the input for a class or a caption."""
    if network.reads_captions:
        return gradio.Textbox("a red apple", label="Caption", elem_id="condition", scale=3, min_width=250)
    if not network.num_classes:
        return gradio.State(None)
    named = dict(enumerate((network.record or Record()).class_names))
    choices = [(named.get(label, str(label)), label) for label in range(network.num_classes)]
    return gradio.Dropdown(choices, value=0, label="Class", elem_id="condition", min_width=170)


def _subtitle(network: Network) -> str:
    record, count = network.record or Record(), sum(parameter.numel() for parameter in network.parameters())
    made = f"{type(network).__name__}, {count / 1e6:.1f} million parameters"
    return made + (f", distilled from {record.teacher.name}" if record.teacher and record.teacher.name else "")


def _serve(demo: Any, studio: Studio, port: int, share: bool) -> None:
    """Serve the page until Ctrl-C."""
    width, height = studio.generator.size
    # Enlarged small images would look blurred.
    css = CSS.replace("ASPECT", f"{width} / {height}").replace("PIXELS", "pixelated" if width < SMALL else "auto")
    _, url, public = demo.queue().launch(
        server_name=HOST, server_port=port, share=share, quiet=True, prevent_thread_lock=True, show_error=True,
        css=css, ssr_mode=False, footer_links=[], allowed_paths=[str(studio.folder)],
    )  # fmt: skip
    try:
        if share and not public:
            raise OSError("no public link: the server of Gradio cannot be reached (the page works without --share)")
        print(f"serving at {public or url}, until Ctrl-C", flush=True)
        threading.Event().wait()
    finally:
        demo.close(verbose=False)
