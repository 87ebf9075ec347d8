"""The documentation's site: `make docs` builds it into build/site, without network access and with errors on warnings.

Equations become MathML, which browsers render themselves: no script, no fonts and no server of somebody else. The
converter is that of docutils, on which Sphinx depends anyway.
"""

import re
from itertools import groupby
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

project = "decm-lightning"
author = "The decm-lightning authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = project
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"light_css_variables": {"code-font-size": "0.72em"}}
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Links to any existing file are allowed: source files and notebooks are offered as downloads.
copybutton_exclude = ".linenos, .gp"

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Shapes such as "b *sample" in the types of attributes would be read as markup.
napoleon_attr_annotations = False

# `make docs-links` reads the addresses of other sites, and needs a network.
linkcheck_timeout = 20


def as_mathml(self: Any, node: nodes.math | nodes.math_block, block: bool) -> None:
    """Write an equation as MathML."""
    self.body.append(latex2mathml.tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def readme_links(app: Sphinx, relative_path: Any, parent: str, content: list[str]) -> None:
    """Rewrite the README's links, which start at the root of the repository, to start at docs/."""
    if relative_path.name == "README.md":
        content[0] = re.sub(r"\]\((?!https?:|#)", "](../", content[0]).replace("](../docs/", "](")
        titled(app, parent, content)


def titled(app: Sphinx, page: str, content: list[str]) -> None:
    """Let links whose text is the name of a page show the page's title."""
    content[0] = re.sub(r"\[[\w/-]+\.md\]\(", "[](", content[0])


def from_markdown(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring from Markdown (tables, `code`, indented formulas) to reStructuredText."""
    rewritten: list[str] = []
    if what in ("property", "attribute", "data") and lines:
        # Napoleon takes the text before a colon for a type.
        lines[0] = lines[0].replace(": ", " - ")
    for is_table, group in groupby(lines, lambda line: re.fullmatch(r" *\|.*\|", line) is not None):
        block = list(group)
        rewritten += table(block) if is_table else paragraphs(block)
    lines[:] = rewritten


def table(lines: list[str]) -> list[str]:
    """Return a Markdown table as a list-table."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    cells = [
        f"   {'* -' if k == 0 else '  -'} {escaped(cell)}" for row in [rows[0], *rows[2:]] for k, cell in enumerate(row)
    ]
    return [".. list-table::", "   :header-rows: 1", "", *cells, ""]


def paragraphs(lines: list[str]) -> list[str]:
    """Return lines with their characters escaped, and indented paragraphs, which are formulas, as literal blocks."""
    result: list[str] = []
    above = 0
    for is_blank, group in groupby(lines, lambda line: not line.strip()):
        block = list(group)
        if is_blank:
            result += block
            continue
        indent = len(block[0]) - len(block[0].lstrip())
        is_code = block[0].lstrip().startswith(">>>")
        is_formula = indent > above and not is_code
        result += ["::", ""] if is_formula else []
        result += block if is_code or is_formula else [escaped(line) for line in block]
        above = above if is_formula else indent
    return result


def escaped(line: str) -> str:
    """Return a line with `code` as a literal and without other markup."""
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(
        f"`{part}`" if k % 2 else re.sub(r"([*|\\]|_\b(?!\w))", r"\\\1", part) for k, part in enumerate(parts)
    )


def signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, text: str, returns: str) -> tuple[str, str]:
    """Return a signature that Sphinx can parse, where dataclasses have "<factory>"."""
    return text and text.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> None:
    """Register the functions above."""
    inline, block = ((lambda self, node, b=b: as_mathml(self, node, b), None) for b in (False, True))
    app.add_html_math_renderer("mathml", inline, block)
    app.connect("source-read", titled)
    app.connect("include-read", readme_links)
    app.connect("autodoc-process-signature", signature)
    # Before napoleon, which reads the sections of the docstring.
    app.connect("autodoc-process-docstring", from_markdown, priority=400)
