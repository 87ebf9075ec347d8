"""Sections of a report as one HTML page that needs no other file, or as Markdown with images next to it."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from re import sub
from typing import Any
from urllib.parse import quote

from decm_lightning.compare.plots import STYLE

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{title}</title>
<style>
{style}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; background: #fff;
  color: #222; overflow-wrap: anywhere; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #16181c; color: #ddd; }} }}
.scroll {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .875rem; overflow-wrap: normal; }}
th, td {{ padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }}
td:has(data) {{ text-align: right; font-variant-numeric: tabular-nums; }} td {{ max-width: 36rem; }}
figure {{ margin: 1rem 0; }} figcaption {{ font-weight: 600; }} svg, img {{ width: 100%; height: auto; }}
img {{ image-rendering: pixelated; }} figure:only-child {{ max-width: 40rem; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0 1.5rem; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


@dataclass
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        text: what it shows, and for each run the reason why something is missing.
        figures: SVG as text or the bytes of a PNG, by the name of the plot and the name of its run, "" for all runs.
        table: rows by column, the same columns in every row.
    """

    title: str
    text: list[str] = field(default_factory=list)
    figures: dict[tuple[str, str], str | bytes] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)


def as_html(title: str, sections: Sequence[Section], out: Path) -> dict[Path, bytes]:
    """Return the page by its path."""
    body = "\n".join(_section(section) for section in sections)
    return {out: PAGE.format(title=escape(title), style=STYLE, body=body).encode()}


def as_markdown(title: str, sections: Sequence[Section], out: Path) -> dict[Path, bytes]:
    """Return the Markdown and its images by their paths."""
    files, lines = {}, [f"# {title}"]
    for section in sections:
        lines += [f"## {section.title}", *section.text]
        for (name, run), content in section.figures.items():
            suffix = "svg" if isinstance(content, str) else "png"
            file = out.with_name(sub(r"[^\w.]+", "-", f"{out.stem}-{name}-{run}").strip("-") + f".{suffix}")
            lines += [f"{run}:"] * bool(run) + [f"![{name} {run}]({quote(file.name)})"]
            is_plot = isinstance(content, str)
            files[file] = content.replace(">", f"><style>\n{STYLE}</style>", 1).encode() if is_plot else content
        lines += [_markdown(section.table)] * bool(section.table)
    return {out: ("\n\n".join(lines) + "\n").encode(), **files}


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", *(f"<p>{escape(text)}</p>" for text in section.text)]
    figures = [
        f"<figure>{_image(content, f'{name} {run}')}<figcaption>{escape(run)}</figcaption></figure>"
        for (name, run), content in section.figures.items()
    ]
    parts += [f'<div class="figures">{"".join(figures)}</div>'] * bool(figures)
    if section.table:
        head = "".join(f"<th>{escape(name)}</th>" for name in section.table[0])
        rows = ["".join(f"<td>{_cell(value)}</td>" for value in row.values()) for row in section.table]
        body = "\n".join(f"<tr>{row}</tr>" for row in (head, *rows))
        parts.append(f'<div class="scroll" tabindex="0"><table>\n{body}\n</table></div>')
    return "\n".join(parts)


def _markdown(table: Sequence[Mapping[str, Any]]) -> str:
    cells = [[text(value).replace("|", "\\|") for value in row.values()] for row in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(table[0]), ["---"] * len(table[0]), *cells))


def _image(content: str | bytes, name: str) -> str:
    if isinstance(content, str):
        return content
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{b64encode(content).decode()}">'


def _cell(value: Any) -> str:
    """Return a value for HTML; numbers are shown with 4 digits and stored in full."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f'<data value="{value}">{text(value)}</data>' if is_number else escape(text(value))


def text(value: Any) -> str:
    """Return a value as text: numbers with 4 digits, and a dash for None.

    >>> text(0.354297), text(1000), text(None)
    ('0.3543', '1000', '-')
    """
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
