"""Plots as SVG, in the colors of the reader's light or dark mode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

COLORS = 6
STYLE = """\
:root { --s0: #1f6fd0; --s1: #c2500a; --s2: #17804f; --s3: #8a3ffc; --s4: #b5275f; --s5: #7d6608; --ink: #333;
  --grid: #ddd; --heat: #b3261e; --teacher: #777; }
@media (prefers-color-scheme: dark) { :root { --s0: #6aa9ff; --s1: #ff9a57; --s2: #4fd19b; --s3: #c9a3ff; --s4: #ff86b3;
  --s5: #dcc64a; --ink: #ccc; --grid: #444; --heat: #ff8a73; --teacher: #aaa; } }
svg { font: 14px system-ui, sans-serif; fill: var(--ink); }
svg .grid { stroke: var(--grid); }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .cell { fill: var(--heat); }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
"""
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, LINE = 480, 280, 60, 16, 48, 22
"""The width, the height of the axes, the margins, and the height of a line of text."""
CELL = 24
Point = tuple[float, float, str]
"""x, y, and the text that is shown when the pointer is on the point."""


@dataclass(frozen=True)
class Axis:
    """Maps values from low to high to positions from start to end."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, is_log: bool) -> "Axis":
        """Return the axis of some values: a logarithmic one with a margin, or a linear one from 0."""
        low, high = (min(values) / 1.2, max(values) * 1.2) if is_log else (0.0, max(values) or 1.0)
        return cls(low, high, start, end, is_log)

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        low, high, value = (log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Return round values: 1, 2, 5, 10, ..., or only powers of ten if there are many."""
        if not self.is_log:
            unit = 10 ** floor(log10(self.high / 4))
            step = next(unit * m for m in (1, 2, 5, 10) if self.high / (unit * m) <= 6)
            return [step * n for n in range(int(self.high / step) + 1)]
        powers = range(floor(log10(self.low)), floor(log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1,)):
            ticks = [f * 10.0**power for power in powers for f in factors if self.low <= f * 10.0**power <= self.high]
            if len(ticks) <= 8:
                break
        return ticks


def line_plot(series: Mapping[str, Sequence[Point]], x_name: str, y_name: str, log_x: bool) -> str:
    """Return curves by name, with a logarithmic y axis. A curve whose name begins with "teacher" is dashed."""
    top = LINE * (len(series) + 1)
    height = top + HEIGHT + BOTTOM
    points = [point for each in series.values() for point in each]
    x = Axis.of([point[0] for point in points], LEFT, WIDTH - RIGHT, log_x)
    y = Axis.of([point[1] for point in points], top + HEIGHT, top, True)
    parts = [f'<text x="0" y="{top - 8}">{escape(y_name)}</text>']
    parts.append(f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 6}">{escape(x_name)}</text>')
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{y(tick) + 5}">{tick:g}</text>')
    for tick in x.ticks():
        parts.append(f'<text class="middle" x="{x(tick)}" y="{height - BOTTOM + 20}">{tick:g}</text>')
    for number, (name, each) in enumerate(series.items()):
        is_teacher = name.startswith("teacher")
        color = "teacher" if is_teacher else f"s{number % COLORS}"
        dash = ' stroke-dasharray="6 4"' if is_teacher or number >= COLORS else ""
        stroke, row = f'style="stroke: var(--{color})"{dash}', LINE * (number + 0.7)
        parts.append(f'<polyline {stroke} points="0,{row - 5} 28,{row - 5}"/>')
        parts.append(f'<text x="36" y="{row}">{escape(name[-52:])}</text>')
        parts.append(f'<polyline {stroke} points="{" ".join(f"{x(p[0])},{y(p[1])}" for p in each)}"/>')
        for p in each if len(each) <= 20 else ():
            title = f"<title>{escape(f'{name}: {p[2]}')}</title>"
            parts.append(f'<circle cx="{x(p[0])}" cy="{y(p[1])}" r="4" style="fill: var(--{color})">{title}</circle>')
    return _svg(WIDTH, height, f"{y_name} over {x_name}", parts)


def heat_map(errors: Mapping[tuple[float, float], float], low: float, high: float) -> str:
    """Return the errors by (t, s) as cells with t to the right and s upward, on a logarithmic scale."""
    level = Axis(low, high if high > low else 2 * low, 0.05, 1, True)
    times = sorted({time for pair in errors for time in pair})
    bottom = CELL * len(times)
    width, height = LEFT + bottom + 8, bottom + 5 * LINE
    parts = [f'<text x="0" y="{LINE - 6}">end time s</text>']
    for (t, s), error in errors.items():
        x, y = LEFT + CELL * times.index(t), LINE + bottom - CELL * (times.index(s) + 1)
        title = f"<title>t = {t:g}, s = {s:g}: {error:.3g}</title>"
        parts.append(
            f'<rect class="cell" x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
            f'fill-opacity="{min(max(level(error), 0.05), 1):.2f}">{title}</rect>'
        )
    for number in range(0, len(times), 5):
        center = CELL * (number + 0.5)
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{LINE + bottom - center + 5}">{times[number]:g}</text>')
        parts.append(f'<text class="middle" x="{LEFT + center}" y="{LINE + bottom + 18}">{times[number]:g}</text>')
    parts.append(f'<text class="middle" x="{LEFT + bottom / 2}" y="{bottom + 2 * LINE + 14}">start time t</text>')
    for number in range(20):
        parts.append(
            f'<rect class="cell" x="{LEFT + bottom * number / 20}" y="{height - 34}" width="{bottom / 20}" height="12" '
            f'fill-opacity="{(number + 1) / 20}"/>'
        )
    parts.append(f'<text x="{LEFT}" y="{height - 6}">{low:.2g}</text>')
    parts.append(f'<text class="end" x="{LEFT + bottom}" y="{height - 6}">{high:.2g}</text>')
    return _svg(width, height, "error by start and end time", parts)


def _svg(width: float, height: float, name: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
    return f'{head}aria-label="{escape(name)}">\n' + "\n".join(parts) + "\n</svg>"
