"""Write trained networks in formats that other programs read."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Literal

Format = Literal["folder", "safetensors", "diffusers", "lora", "lora-comfyui"]
FORMATS: dict[Format, str] = {
    "folder": "own_formats:write_folder",
    "safetensors": "own_formats:write",
    "diffusers": "diffusers.writing:write",
    "lora": "lora:write",
    "lora-comfyui": "lora:write_comfyui",
}
"""The function of each format, "module:function" in this package: `write(network, out, dtype)` returns the files."""

Write = Callable[..., list[Path]]
"""`write(network, out, dtype)`, and options of the format."""


def writer(to: Format) -> Write:
    """Return the function that writes a format. Its module is imported only now."""
    module, _, function = FORMATS[to].partition(":")
    found: Write = getattr(import_module(f"{__name__}.{module}"), function)
    return found
