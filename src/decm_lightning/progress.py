"""Progress bars: one line that is renewed in a terminal, and one new line every 30 seconds in a file or a pipe."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 30
"""Between two lines, without a terminal."""


class Progress(tqdm):
    """tqdm's bar with the speed and the time left in words. Without a terminal it is one plain line every 30 seconds.

    Args:
        iterable: the items to iterate over; None to call `update`.
        note: returns the end of the line, such as the loss. It is only called when a line is shown.
        options: options of tqdm, such as desc, total and unit (in the singular).
    """

    def __init__(self, iterable: Iterable[Any] | None = None, note: Callable[[], str] = str, **options: Any) -> None:
        self.note = note
        shown = {"mininterval": 0.5, "bar_format": "{head}|{bar:20}| {line}", "dynamic_ncols": True}
        if not _in_terminal():
            shown = {"mininterval": SECONDS, "bar_format": "{head}{line}", "delay": SECONDS, "file": _Lines(sys.stderr)}
        own = {"miniters": 1, "maxinterval": float("inf"), "unit": "step", "leave": False}
        # A process without a console has no streams.
        options["disable"] = options.get("disable") or sys.stderr is None
        super().__init__(iterable, **{**own, **shown, **options})

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values of tqdm, with the texts before and after the bar."""
        values = super().format_dict
        n, total, elapsed = values["n"], values["total"], values["elapsed"]
        speed = values["rate"] or (n - values["initial"]) / max(elapsed, 1e-9)
        units = f"{self.unit}es" if self.unit.endswith("ch") else f"{self.unit}s"
        parts = [f"{n}{f'/{total}' if total else ''} {units}"]
        if speed:
            parts.append(f"{speed:.3g} {units}/s" if speed >= 1 else f"{1 / speed:.3g} s per {self.unit}")
        if speed and total:
            parts.append(f"{duration((total - n) / speed)} left")
        note = self.note()
        head = values["prefix"].removesuffix(": ")
        return values | {"head": head and f"{head} ", "line": ", ".join([*parts, note] if note else parts)}


class _Lines:
    """A file in which each text that tqdm writes is a line, without the characters that move a cursor."""

    encoding = "utf-8"

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip()
        if text:
            self.file.write(f"{text}\n")
            self.file.flush()

    def flush(self) -> None:
        self.file.flush()


def _in_terminal() -> bool:
    try:
        # Some terminals of containers have no size, and tqdm shows nothing there.
        return os.isatty(sys.stderr.fileno()) and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):
        return False


def duration(seconds: float) -> str:
    """Return a duration in words.

    Example:
        >>> duration(48.2), duration(200), duration(7800)
        ('48 s', '3 min', '2 h 10 min')
    """
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def say(text: str) -> None:
    """Write a line to standard error, above the bars."""
    if sys.stderr is not None:
        Progress.write(text, file=sys.stderr)
