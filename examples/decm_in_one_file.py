"""Dual-End Consistency Models (arXiv 2602.10764) in one file with torch alone, on a 2-D mixture whose flow is exact.

    python examples/decm_in_one_file.py

trains a student for about a minute on one core, prints how far its samples are from the teacher's converged ODE
(root mean square over pairs from the same noise), and writes their histograms to decm.png: the teacher above, the
student below, at 1, 2, 4 and 8 steps.

Conventions: t = 0 is noise x_0, t = 1 is data x_1, x_t = (1 - t) x_0 + t x_1, and v(x_t, t) is the teacher's velocity.
The student's u(x_t, t, s) is the mean velocity of the step from t to s: f(x_t, t, s) = x_t + (s - t) u(x_t, t, s).
"""

import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Field = Callable[[Tensor, Tensor], Tensor]
FlowMap = Callable[[Tensor, Tensor, Tensor], Tensor]

# The teacher: the exact velocity of the flow from N(0, I) to eight Gaussians on a circle.
ANGLES = torch.arange(8) * math.pi / 4
MEANS, STD = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.2


def teacher(x_t: Tensor, t: Tensor) -> Tensor:
    """Return v(x_t, t) = sum_k p(k | x_t) (m_k + q / a^2 (x_t - t m_k)), a^2 = (1 - t)^2 + t^2 std^2, (b, 2)."""
    t, means = t[:, None, None], MEANS.to(x_t)
    a_squared = (1 - t) ** 2 + t**2 * STD**2
    centered = x_t[:, None] - t * means
    weights = (-centered.square().sum(-1) / (2 * a_squared[..., 0])).softmax(1)
    return (weights[..., None] * (means + (t * STD**2 - (1 - t)) / a_squared * centered)).sum(1)


class Student(nn.Module):
    """u(x_t, t, s) as a perceptron."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        layers = [nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the mean velocity from t to s, (b, 2)."""
        return self.layers(torch.cat([x_t, t[:, None], s[:, None]], 1))


# The residual, of which every loss is a case: start weight gamma, end weight lambda.


def step(x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return f(x_t, t, s) = x_t + (s - t) u."""
    return x_t + (s - t)[:, None] * u


def residual(
    student: FlowMap, field: Field, x_t: Tensor, t: Tensor, s: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return u, and g = (lambda + gamma) u - gamma v_start - lambda v_end - (s - t) jvp: 0 for the exact flow map.

    The jvp is that of u along (gamma v_start, gamma, -lambda) over (x_t, t, s). Nothing but u has a gradient.
    """
    u = student(x_t, t, s)
    with torch.no_grad():
        v_start = field(x_t, t)
        v_end = field(step(x_t, u, t, s), s) if lam else torch.zeros_like(u)
        tangent = (gamma * v_start, torch.full_like(t, gamma), torch.full_like(s, -lam))
        jvp = torch.func.jvp(student, (x_t, t, s), tangent)[1]
        g = (lam + gamma) * u - gamma * v_start - lam * v_end - (s - t)[:, None] * jvp
    return u, g


def regression(u: Tensor, g: Tensor, cosine_weight: float = 0.0) -> Tensor:
    """Return |u - sg(u - clamp(g))|^2 + w (1 - cos(u, sg(u - g))), averaged."""
    loss = (u - (u - g.clamp(-1, 1)).detach()).square().mean()
    if cosine_weight:
        loss = loss + cosine_weight * (1 - nn.functional.cosine_similarity(u, (u - g).detach(), dim=1)).mean()
    return loss


# DE-CM: three edges of the triangle 0 <= t <= s <= 1.


def strata(count: int) -> Tensor:
    """Return one uniform time in each of `count` equal parts of [0, 1], in random order."""
    return (torch.randperm(count) + torch.rand(count)) / count


def losses(student: FlowMap, field: Field, x_0: Tensor, x_1: Tensor, number: int, decay_steps: int) -> dict[str, Tensor]:
    """Return the losses of training step `number` on pairs of noise and data."""
    t, ones = strata(len(x_0)), torch.ones(len(x_0))
    x_t = x_0 + t[:, None] * (x_1 - x_0)
    terms = {
        # The data edge, s = 1: consistency.
        "consistency": regression(*residual(student, field, x_t, t, ones, 1.0, 0.0)),
        # The diagonal, s = t: flow matching to the teacher's velocity. There the factor (s - t) removes the jvp.
        "flow_matching": regression(*residual(student, field, x_t, t, t, 1.0, 0.0), cosine_weight=1.0),
    }
    if number % 3 == 0:
        # The noise edge, t = r -> 0: from noise to every s (noise-to-noisy).
        r = 0.1 * max(0.0, 1 - number / decay_steps) * ones
        s = r + (1 - r) * strata(len(x_0))
        x_r = x_0 + r[:, None] * (x_1 - x_0)
        terms["noise_to_noisy"] = regression(*residual(student, field, x_r, r, s, 1.0, 0.5))
    return terms


# Samplers: from noise in n steps.


def move(student: FlowMap, x: Tensor, t: float, s: float, end: float | None = None) -> Tensor:
    """Return x moved from t to s by the mean velocity u(x, t, end); `end` is s unless given."""
    times = [torch.full((len(x),), time) for time in (t, s, s if end is None else end)]
    return step(x, student(x, times[0], times[2]), times[0], times[1])


def euler(student: FlowMap, x: Tensor, steps: int) -> Tensor:
    """Follow u(x, t, t) on the diagonal: good at many steps."""
    for k in range(steps):
        x = move(student, x, k / steps, (k + 1) / steps, end=k / steps)
    return x


def consistency(student: FlowMap, x: Tensor, steps: int) -> Tensor:
    """Go to data, add noise back at later and later times, and go to data again, on the data edge."""
    x = move(student, x, 0.0, 1.0)
    for k in range(steps - 1):
        t = 0.7 + 0.3 * k / (steps - 1)
        x = move(student, (1 - t) * torch.randn_like(x) + t * x, t, 1.0)
    return x


def mix(student: FlowMap, x: Tensor, steps: int) -> Tensor:
    """Take one step on the noise edge to s_1, Euler steps from there, and a last step on the data edge."""
    if steps == 1:
        return move(student, x, 0.0, 1.0)
    s1 = 0.75 if steps <= 3 else 0.7 if steps < 8 else 0.5
    grid = torch.linspace(s1, 1, steps).tolist()
    x = move(student, x, 0.0, s1)
    for t, s in zip(grid[:-2], grid[1:-1], strict=True):
        x = move(student, x, t, s, end=t)
    return move(student, x, grid[-2], 1.0)


def train(steps: int = 2000, batch: int = 256) -> Student:
    """Return a trained student."""
    student = Student()
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    # A warm-up, then a cosine: without the warm-up the first steps ruin a short run.
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / warmup) * (0.505 + 0.495 * math.cos(math.pi * n / steps))
    )
    for number in range(steps):
        x_1 = MEANS[torch.randint(len(MEANS), (batch,))] + STD * torch.randn(batch, 2)
        loss = torch.stack(list(losses(student, teacher, torch.randn(batch, 2), x_1, number, steps // 4).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student


def save_histograms(rows: list[list[Tensor]], file: Path, size: int = 128) -> None:
    """Write 2-D histograms of samples as one grayscale PNG."""
    strips = []
    for row in rows:
        counts = [torch.histogramdd(x, [size, size], range=[-3.0, 3.0, -3.0, 3.0]).hist.T.flip(0) for x in row]
        strips.append(torch.cat([1 - (c / c.max()).sqrt() for c in counts], 1))
    pixels = (255 * torch.cat(strips)).byte().numpy()
    height, width = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@torch.no_grad()
def main() -> None:
    """Train, compare and draw."""
    torch.manual_seed(0)
    with torch.enable_grad():
        student = train()
    x_0 = torch.randn(20_000, 2)

    def of_teacher(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return teacher(x, t)

    truth, counts = euler(of_teacher, x_0, 400), (1, 2, 4, 8)
    print("error        " + "".join(f"{n:7d}" for n in counts) + "  steps")
    by_name = {"teacher": (euler, of_teacher), "Euler": (euler, student), "consistency": (consistency, student)}
    samples = {}
    for name, (sampler, network) in (by_name | {"Mix": (mix, student)}).items():
        samples[name] = [sampler(network, x_0, n) for n in counts]
        errors = [(x - truth).square().sum(1).mean().sqrt().item() for x in samples[name]]
        print(f"{name:13}" + "".join(f"{error:7.3f}" for error in errors))
    save_histograms([samples["teacher"], samples["Mix"]], Path("decm.png"))
    print("wrote decm.png")


if __name__ == "__main__":
    main()
