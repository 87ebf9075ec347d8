"""The HTML page of a report, which needs no other file, and its plots as SVG."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib
import torch
from markdown_it import MarkdownIt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>decm compare</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; overflow-wrap: anywhere; }
body { background: #fff; color: #222; } h1 { font-size: 1.6rem; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd; } }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8885; }
th { white-space: nowrap; } td { max-width: 36rem; } img { width: 100%; image-rendering: pixelated; }
p img { max-width: 40rem; } td img { min-width: 17rem; } td:has(img) { border: 0; }
</style></head><body>
BODY</body></html>
"""
INK, STYLE = "#010203", "svg { color: #333 } @media (prefers-color-scheme: dark) { svg { color: #ccc } }"
"""A color that is replaced by that of the text, and the color of the text."""
COLORS = ("#3987e5", "#d95926", "#199e70", "#9085e9", "#d55181", "#c98500")
RULES: Any = {"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
RULES |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)


def html(markdown: str, figures: Mapping[str, bytes]) -> bytes:
    """Return a report as a page that contains its figures, which are SVG or PNG files by name."""
    body = MarkdownIt("js-default").render(markdown)
    for name, content in figures.items():
        media = "png" if name.endswith(".png") else "svg+xml"
        body = body.replace(f'src="{name}"', f'src="data:image/{media};base64,{b64encode(content).decode()}"')
    return PAGE.replace("BODY", body).encode()


@matplotlib.rc_context(RULES)
def line_plot(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str, log_x: bool) -> bytes:
    """Return curves by name, with a logarithmic y axis. A curve whose name begins with "teacher" is dashed."""
    figure = Figure((5, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    for number, (name, points) in enumerate(series.items()):
        color, line = ("#888", "--") if name.startswith("teacher") else (COLORS[number % len(COLORS)], "-")
        axes.plot(*zip(*points, strict=True), line, c=color, label=name, marker="o" * (len(points) < 20), ms=4)
    axes.set(xlabel=x_name, ylabel=y_name, yscale="log", xscale="log" if log_x else "linear")
    for axis in (axes.xaxis, axes.yaxis) if log_x else (axes.yaxis,):
        axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left")
    return _svg(figure)


@matplotlib.rc_context(RULES)
def heat_map(errors: Tensor) -> bytes:
    """Return errors by t and s, at equal steps from 0 to 1, as cells. Colors cover 0.02 to 1 in all plots."""
    figure = Figure((3.6, 3), layout="constrained")
    axes: Any = figure.subplots()
    times = torch.linspace(0, 1, len(errors))
    cells = axes.pcolormesh(times, times, errors.T, norm=LogNorm(0.02, 1))
    axes.set(xlabel="start time t", ylabel="end time s", aspect="equal")
    figure.colorbar(cells, extend="both", format="{x:g}", ticks=LogLocator(subs=(1, 2, 5))).ax.minorticks_off()
    return _svg(figure)


def _svg(figure: Figure) -> bytes:
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue().replace(INK, "currentColor").replace("<defs>", f"<style>{STYLE}</style><defs>", 1).encode()
