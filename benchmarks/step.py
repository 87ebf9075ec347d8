"""python -m benchmarks.step --network small --batch 4: time and memory of a training step with each derivative engine.

Every variant runs the distiller's training step and its backward pass: the guided teacher's velocity (two rows per
sample), the student with its derivative, the residual, the gradient. All variants run in turn in every round, in one
process. Times are medians over rounds, and ratios are medians of the rounds' ratios. Memory is the peak of tensor
memory beyond the memory in use before the step. The last line has the ratios as name=value.
"""

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from decm_lightning import Distiller
from decm_lightning.conditions import select
from decm_lightning.derivatives import Engine, JVPResult, Tangent, central, dual, functional
from decm_lightning.guidance import Guidance
from decm_lightning.losses import Objective, consistency_only, end_identity, facm, flow_matching_only
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher
from decm_lightning.types import Batch, Condition, FlowMapNetwork, Sample, Time

S, B, L, XL = {"width": 384, "heads": 6}, {"width": 768, "heads": 12}, {"width": 1024, "heads": 16}, {"width": 1152}
NETWORKS: dict[str, dict[str, int]] = {
    "tiny": {"input_size": 8, "in_channels": 4, "patch_size": 2, "width": 64, "depth": 2, "heads": 2},
    # The targets in docs/benchmarks.md are for this size: 256 tokens.
    "small": {"input_size": 16, "in_channels": 16, "depth": 12, **S},
    "S/2": {"input_size": 32, "in_channels": 4, "patch_size": 2, "depth": 12, **S},
    "B/2": {"input_size": 32, "in_channels": 4, "patch_size": 2, "depth": 12, **B},
    "L/2": {"input_size": 32, "in_channels": 4, "patch_size": 2, "depth": 24, **L},
    "XL/1": {"input_size": 16, "in_channels": 32, "depth": 28, "heads": 16, **XL},
    "S/2 at 4096 tokens": {"input_size": 128, "in_channels": 4, "patch_size": 2, "depth": 12, **S},
}
NetworkName = Literal["tiny", "small", "S/2", "B/2", "L/2", "XL/1", "S/2 at 4096 tokens"]


def facm_engine(
    network: FlowMapNetwork, x_t: Sample, t: Time, s: Time, condition: Condition, tangent: Tangent | None
) -> JVPResult:
    """FACM's engine: a pass under torch.func.jvp on the math kernel with graph, and another pass for the other rows."""
    if tangent is None:
        return JVPResult(network(x_t, t, s, condition), None)
    rows = len(tangent.t)
    known = select(condition, slice(rows))
    with sdpa_kernel(SDPBackend.MATH):
        u, jvp = torch.func.jvp(
            lambda x, start, end: network(x, start, end, known),
            (x_t[:rows], t[:rows], s[:rows]),
            (tangent.x, tangent.t, tangent.s),
        )
    if rows == len(t):
        return JVPResult(u, jvp.detach())
    rest = network(x_t[rows:], t[rows:], s[rows:], select(condition, slice(rows, None)))
    return JVPResult(torch.cat([u, rest]), jvp.detach())


@dataclass(frozen=True)
class Variant:
    """A training step: its objective and its engine.

    Attributes:
        title: the name in the table.
        objective: the losses.
        engine: the derivative engine.
    """

    title: str
    objective: Objective
    engine: Engine


VARIANTS = {
    "fm": Variant("flow matching, no derivative", flow_matching_only(), dual),
    "jvp": Variant("consistency: torch.func.jvp with graph (FACM)", consistency_only(), facm_engine),
    "functional": Variant("consistency: torch.func.jvp without graph + forward", consistency_only(), functional),
    "central": Variant("consistency: central difference", consistency_only(), central),
    "dual": Variant("consistency: dual forward (ours)", consistency_only(), dual),
    "facm": Variant("FACM's step: two losses, each on all rows", facm(), facm_engine),
    "decm": Variant(
        "DE-CM's step: three losses on 1/2, 1/4, 1/4 of the rows", end_identity(batch_fractions=(0.5, 0.25, 0.25)), dual
    ),
}


@dataclass
class Measured:
    """The measurements of one variant.

    Attributes:
        variant: the variant's key.
        compiled: whether the blocks were compiled.
        checkpointed: whether activations were recomputed.
        seconds: one time per round.
        memory: peak memory in bytes beyond the memory in use before the step.
        failure: the reason why the variant does not run, or "".
    """

    variant: str
    compiled: bool
    checkpointed: bool
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    failure: str = ""


def distiller(
    network: NetworkName, compiled: bool, checkpointed: bool, device: torch.device, depth: int | None = None
) -> Distiller:
    """Return a distiller with random weights, none of them zero, and without logging; `depth` overrides the depth."""
    torch.manual_seed(0)
    size: dict[str, Any] = NETWORKS[network] | ({} if depth is None else {"depth": depth})
    # Random weights for XL/1 take half a minute on a CPU.
    with device:
        teacher, student = DiT(**size), DiT(**size, end_time=True)
        for parameter in (*teacher.parameters(), *student.parameters()):
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
    module = Distiller(Teacher(teacher), student, guidance=Guidance(2.0), gradient_checkpointing=checkpointed).to(
        device
    )
    # A step's gradient does not use the average, which takes 2.7 GB for XL.
    module.average = nn.Identity()
    for method in ("log", "log_dict"):
        setattr(module, method, lambda *_, **__: None)
    if compiled:
        teacher.compile_units()
        student.compile_units()
    return module


def take(step: Distiller, variant: Variant, batch: Batch, precision: str) -> None:
    """Compute the gradient of one step."""
    step.objective, step.derivative = variant.objective, variant.engine
    step.student.zero_grad(set_to_none=True)
    with torch.autocast(batch.x_1.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = step.training_step(batch, 0)
    loss.backward()


def wait(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device, run: Any) -> int:
    """Return the peak of tensor memory during a run, in bytes beyond the memory in use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    peak = now = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def error(network: NetworkName, batch: Batch) -> float:
    """Return the relative error of the dual engine's jvp in float32 against torch.func.jvp in float64."""
    step = distiller(network, False, False, batch.x_1.device)
    x, t = batch.x_1[:1], torch.full((1,), 0.3, device=batch.x_1.device)
    tangent = Tangent(torch.randn_like(x), torch.ones_like(t), torch.full_like(t, -0.5))
    with torch.no_grad():
        jvp = dual(step.student, x, t, t + 0.5, batch.condition[:1], tangent).jvp
        wide = [value.double() for value in (x, t, t + 0.5)]
        exact = functional(
            step.student.double(),
            *wide,
            batch.condition[:1],
            Tangent(tangent.x.double(), tangent.t.double(), tangent.s.double()),
        ).jvp
    return ((jvp - exact).norm() / exact.norm()).item()


def measure(
    network: NetworkName,
    batch: Batch,
    precision: str,
    rounds: int,
    compiled: list[bool],
    checkpointed: list[bool],
    variants: list[str],
) -> list[Measured]:
    """Measure all variants; those that do not run have a failure."""
    device = batch.x_1.device
    cells: list[tuple[Measured, Any]] = []
    for c in compiled:
        for k in checkpointed:
            step = distiller(network, c, k, device)
            for key in variants:
                result, variant = Measured(key, c, k), VARIANTS[key]
                run = lambda step=step, variant=variant: take(step, variant, batch, precision)  # noqa: E731
                try:
                    start = time.perf_counter()
                    run()
                    # An existing gradient would be freed and counted as negative memory.
                    step.student.zero_grad(set_to_none=True)
                    result.memory = peak_memory(device, run)
                except (RuntimeError, NotImplementedError, ValueError) as problem:
                    result.failure = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
                    step.student.zero_grad(set_to_none=True)
                print(
                    f"{key:11} compiled {c!s:5} checkpointed {k!s:5} {time.perf_counter() - start:6.1f} s to start",
                    flush=True,
                )
                cells.append((result, run))
    running = [(result, run) for result, run in cells if not result.failure]
    for i in range(rounds):
        for result, run in running:
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            result.seconds.append(time.perf_counter() - start)
        print(f"round {i + 1} of {rounds} done", flush=True)
    return [result for result, _ in cells]


def ratio(of: Measured, to: Measured) -> float:
    """Return the median over rounds of the ratio of times."""
    return median(a / b for a, b in zip(of.seconds, to.seconds, strict=True))


def table(measured: list[Measured]) -> str:
    """Return the table, relative to time and memory of the plain flow-matching step."""
    base = next(f for f in measured if (f.variant, f.compiled, f.checkpointed) == ("fm", False, False))
    lines = ["| step | compiled | checkpointed | ms | x time | MB | x memory |", "|---|---|---|---:|---:|---:|---:|"]
    for f in measured:
        marks = f"{'yes' if f.compiled else ''} | {'yes' if f.checkpointed else ''}"
        if f.failure:
            lines.append(f"| {VARIANTS[f.variant].title} | {marks} | fails: {f.failure[:90]} | | | |")
            continue
        lines.append(
            f"| {VARIANTS[f.variant].title} | {marks} | {median(f.seconds) * 1e3:.0f} | {ratio(f, base):.2f} "
            f"| {f.memory / 2**20:.0f} | {f.memory / base.memory:.2f} |"
        )
    return "\n".join(lines) + "\n"


def ratios(measured: list[Measured]) -> dict[str, float]:
    """Return the ratios that docs/benchmarks.md has targets for, where both variants were measured."""
    cells = {(f.variant, f.compiled, f.checkpointed): f for f in measured if not f.failure}

    def cell(variant: str, compiled: bool = False, checkpointed: bool = False) -> Measured | None:
        return cells.get((variant, compiled, checkpointed))

    jvp, fm, ours = cell("jvp"), cell("fm"), cell("dual")
    pairs = {
        "time_vs_jvp": (ours, jvp),
        "time_vs_jvp_compiled": (cell("dual", True), jvp),
        "time_vs_fm": (ours, fm),
        "step_vs_facm": (cell("decm"), cell("facm")),
        "step_vs_facm_compiled": (cell("decm", True), cell("facm")),
    }
    times = {name: ratio(of, to) for name, (of, to) in pairs.items() if of and to}
    memories = {
        "memory_vs_jvp": (ours, jvp),
        "memory_vs_fm": (ours, fm),
        "memory_vs_jvp_compiled": (cell("dual", True), jvp),
        "memory_vs_jvp_checkpointed": (cell("dual", False, True), jvp),
    }
    return times | {name: of.memory / to.memory for name, (of, to) in memories.items() if of and to}


def plot(measured: list[Measured], file: Path) -> None:
    """Plot time against memory, with a marker per variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    base = next(f for f in measured if (f.variant, f.compiled, f.checkpointed) == ("fm", False, False))
    for i, key in enumerate(VARIANTS):
        for f in (f for f in measured if f.variant == key and not f.failure):
            label = VARIANTS[key].title if not f.compiled and not f.checkpointed else None
            shape = "s" if f.checkpointed else "o"
            axis.plot(
                ratio(f, base),
                f.memory / base.memory,
                shape,
                color=f"C{i}",
                mfc=f"C{i}" if not f.compiled else "none",
                label=label,
                ms=9,
            )
    axis.set(
        xlabel="time, in plain flow-matching steps", ylabel="peak memory, in plain flow-matching steps", yscale="log"
    )
    axis.set_title("filled: eager, open: compiled; circle: plain, square: checkpointed", fontsize=9)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def machine(device: torch.device, threads: int) -> str:
    """Return the device and the versions."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {threads} threads"
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}"


def main(
    network: NetworkName = "small",
    batch: int = 4,
    precision: Literal["fp32", "bf16"] = "fp32",
    rounds: int = 5,
    compiled: list[bool] = [False, True],  # noqa: B006
    checkpointed: list[bool] = [False, True],  # noqa: B006
    variants: list[str] = list(VARIANTS),  # noqa: B006
    exact: bool = True,
    threads: int = 2,
    out: Path = Path("runs/benchmark"),
) -> None:
    """Measure all variants; write a table, a plot and the raw measurements.

    Args:
        network: the size of teacher and student.
        batch: samples per step.
        precision: weights are float32; bf16 computes in mixed precision.
        rounds: number of timings of each variant.
        compiled: whether to compile: false, true, or both.
        checkpointed: whether to recompute activations: false, true, or both.
        variants: keys of VARIANTS; must include fm, the reference of all ratios.
        exact: also measure the error of jvp against float64, which needs memory for two more copies of the network.
        threads: CPU threads.
        out: output folder.
    """
    torch.set_num_threads(threads)
    # All variants share the blocks' code and compile it separately, which exceeds the default limit.
    torch._dynamo.config.recompile_limit = 64
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = NETWORKS[network]
    torch.manual_seed(1)
    shape = (batch, size["in_channels"], size["input_size"], size["input_size"])
    data = Batch(torch.randn(shape, device=device), torch.randint(1000, (batch,), device=device))
    measured = measure(network, data, precision, rounds, compiled, checkpointed, variants)
    out.mkdir(parents=True, exist_ok=True)
    name = f"{network.replace('/', '').replace(' ', '-')}-{batch}-{precision}-{device.type}"
    head = f"{network}, batch {batch}, {precision}, {rounds} rounds; {machine(device, threads)}\n\n"
    (out / f"{name}.md").write_text(head + table(measured))
    (out / f"{name}.json").write_text(
        json.dumps({"machine": head.strip(), "found": [asdict(f) for f in measured]}, indent=1)
    )
    plot(measured, out / f"{name}.png")
    print(f"\n{head}{table(measured)}\nwritten to {out / name}.md, .json and .png")
    values = ratios(measured) | ({"error": error(network, data)} if exact else {})
    print(" ".join(f"{key}={value:.3g}" for key, value in values.items()))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
