"""python -m benchmarks.gpu_stages STAGE --out DIR: one stage of benchmarks.gpu_proof, which starts and limits it.

A stage rewrites DIR/STAGE.json after every value, so that a stage that is killed keeps what it has measured. With
--small it measures tiny sizes, on a CPU too. Stages import what they need, so that a broken package fails one of them.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from shutil import copy
from statistics import median
from typing import Any

import lightning as L
import torch
import yaml

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIB = 2**20
TESTS = [
    "tests/derivatives/test_fused_attention.py",
    "tests/derivatives/test_dual_fused_check.py",
    "tests/test_teacher_velocities.py::test_step_waits_for_no_gpu",
    "tests/evaluation/test_evaluation.py::test_nothing_of_an_evaluation_stays_on_a_gpu",
]
FRACTIONS = {"teacher": 0.38, "student": 0.42}
"""Fractions of the seconds of the Fashion-MNIST stage; the rest is for starting, compiling and testing."""


class Values(dict[str, Any]):
    """The values of a stage, written to `file` at every change."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.write()

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a value, print it, and write all of them."""
        super().__setitem__(name, value)
        print(f"{name}: {value}", flush=True)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"values": self}, indent=1))
        os.replace(part, self.file)


@contextmanager
def reported(values: Values, name: str) -> Iterator[None]:
    """Turn an error into a value of one line, and free the GPU's memory."""
    try:
        yield
    except Exception as problem:
        values[name] = {"failure": f"{type(problem).__name__}: {(str(problem).strip() or '-').splitlines()[0]}"}
    finally:
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def tests(values: Values, options: argparse.Namespace) -> None:
    """Run the tests of the kernel, and those that need a GPU."""
    import pytest

    class Counter:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                values[report.outcome] = values.get(report.outcome, 0) + 1
            if report.failed:
                values["failures"] = [*values.get("failures", []), report.nodeid]

    values["passed"] = 0
    # Most of the time is the compilation of kernels.
    workers = ["-n", "6"] if DEVICE.type == "cuda" and find_spec("xdist") else []
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", *workers, *TESTS], plugins=[Counter()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}")


def attention(values: Values, options: argparse.Namespace) -> None:
    """Measure attention and its tangent: XL/1's shape with heads of 64, and a long sequence."""
    from benchmarks.attention import measure

    shapes = [(1, 2, 32, 16)] if options.small else [(64, 16, 256, 64), (2, 16, 4096, 64)]
    for batch, heads, tokens, head_size in shapes:
        for dtype in ("bfloat16", "float32"):
            prefix = f"{dtype}, batch {batch}, {tokens} tokens: "
            with reported(values, prefix.rstrip(": ")):
                torch.manual_seed(0)
                parts = torch.randn(6, batch, heads, tokens, head_size, device=DEVICE, dtype=getattr(torch, dtype))
                for name, f in measure(parts, 2 if options.small else 10).items():
                    numbers = {"ms": median(f.seconds or [0.0]) * 1e3, "MiB": f.memory / MIB}
                    numbers |= {} if f.error is None else {"error": f.error}
                    values[prefix + name] = {"failure": f.failure} if f.failure else numbers


def _batch(network: Any, rows: int) -> Any:
    from benchmarks.step import NETWORKS
    from decm_lightning.types import Batch

    torch.manual_seed(1)
    size = NETWORKS[network]
    images = torch.randn(rows, size["in_channels"], size["input_size"], size["input_size"], device=DEVICE)
    return Batch(images, torch.randint(1000, (rows,), device=DEVICE))


def arithmetic(values: Values, options: argparse.Namespace) -> None:
    """Measure matrix products in bfloat16, and count a step's operations per sample, without our fused kernel's."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = [(64, 64, 64)] if options.small else [(8192, 8192, 8192), (16384, 1152, 4608), (16384, 1152, 1152)]
    for m, k, n in sizes:
        a, b = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        repeats = 3 if options.small else 50
        # The first round is for the clock and the choice of a kernel.
        for _ in range(2):
            _wait()
            start = time.perf_counter()
            for _ in range(repeats):
                a @ b
            _wait()
        values[f"matmul {m} x {k} x {n}"] = {"TFLOP/s": 2e-12 * m * k * n * repeats / (time.perf_counter() - start)}
    from benchmarks.step import VARIANTS, distiller, take

    network, rows = ("tiny", 4) if options.small else ("XL/1", 8)
    step = distiller(network, False, False, DEVICE)
    for key in ("fm", "dual", "jvp", "decm", "facm"):
        with reported(values, key), FlopCounterMode(display=False) as counter:
            take(step, VARIANTS[key], _batch(network, rows), "bf16")
            values[key] = {"GFLOP per sample": counter.get_total_flops() / rows / 1e9}


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def step(values: Values, options: argparse.Namespace) -> None:
    """Time the training step: at batch 64, at smaller batches until FACM's step fits, then compiled."""
    network, batches = ("tiny", [4]) if options.small else ("XL/1", [64, 32, 16])
    equal = batches[-1]
    for rows in batches:
        _time(values, network, rows, False, ["fm", "dual", "decm", "jvp", "facm"], options)
        if "images/s" in values.get(f"facm, batch {rows}", {}):
            equal = rows
            break
    # One at a time, most important first: each takes a minute to compile.
    cells = (
        [("decm", batches[0])] if options.small else [("decm", batches[0]), ("fm", batches[0]), ("dual", batches[0])]
    )
    if equal != batches[0]:
        cells.insert(1, ("decm", equal))
    for key, rows in cells:
        _time(values, network, rows, True, [key], options)


def _time(
    values: Values, network: Any, rows: int, compiled: bool, variants: list[str], options: argparse.Namespace
) -> None:
    from benchmarks.step import measure

    torch._dynamo.config.recompile_limit = 64
    name = f"batch {rows}{', compiled' if compiled else ''}"
    with reported(values, name):
        for f in measure(
            network, _batch(network, rows), "bf16", 2 if options.small else 7, [compiled], [False], variants
        ):
            numbers = {"MiB": f.memory / MIB}
            if f.seconds:
                numbers |= {"ms": median(f.seconds) * 1e3, "images/s": rows / median(f.seconds)}
            values[f"{f.variant}, {name}"] = {"failure": f.failure} if f.failure else numbers


def largest(values: Values, options: argparse.Namespace) -> None:
    """Find the largest batch of each step on this GPU, next to weights, optimizer and average."""
    from benchmarks.largest import main

    network, batches, check = ("tiny", (4, 8), (3, 6)) if options.small else ("XL/1", (16, 32), (3, 24))
    memory = torch.cuda.mem_get_info()[0] / 2**30 - 1 if DEVICE.type == "cuda" else 1.0
    values["memory"] = {"GiB": memory}
    for key in ("facm", "decm") if options.small else ("facm", "decm", "jvp", "dual", "fm"):
        with reported(values, key):
            found = main(network, "bf16", memory, batches, (1, 2), check, [key])[key]
            values[key] = {"batch": found.batch} | {n: v for n, v in asdict(found).items() if v is not None}


def fashion(values: Values, options: argparse.Namespace) -> None:
    """Train a Fashion-MNIST teacher and distill it, each for a fraction of the stage's seconds."""
    from decm_lightning import save
    from decm_lightning.cli.trainer import build
    from decm_lightning.networks.network import check_compiler

    torch.set_float32_matmul_precision("high")
    compiled = False
    with suppress(ValueError):
        check_compiler()
        compiled = DEVICE.type == "cuda"
    values["training"] = {"batch": 32 if options.small else 1024, "compiled": compiled}
    for role, config in (("teacher", "teacher"), ("student", "decm")):
        file = options.work / f"{role}.yaml"
        file.write_text(yaml.safe_dump(_config(config, role, compiled, options)))
        cli = build("--config", str(file))
        pace = Pace(2.0, 1, 3) if options.small else Pace(FRACTIONS[role] * options.seconds, 20, 120)
        cli.trainer.callbacks.append(pace)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        values[role] = {"steps": cli.trainer.global_step, "s": pace.seconds, "images/s": pace.images / pace.seconds}
        if role == "teacher":
            save(cli.model.average, options.work / "network")
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    log = Path(cli.trainer.log_dir)
    copy(log / "samples.png", options.out)
    values["quality.md"] = (log / "quality.md").read_text()
    values["quality"] = json.loads((log / "quality.json").read_text())


def _config(name: str, role: str, compiled: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Return configs/fashion/NAME.yaml with the batch, length, data and outputs of this stage."""
    config: dict[str, Any] = yaml.safe_load(Path(f"configs/fashion/{name}.yaml").read_text())
    evaluation = next(c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(".Evaluation"))
    config["trainer"]["logger"]["init_args"] = {"save_dir": str(options.work), "name": role, "version": ""}
    # The length is set when the pace is known.
    config["trainer"] |= {
        "callbacks": [evaluation] if role == "student" else [],
        "max_steps": 10**8,
        "limit_val_batches": 0,
    }
    config["trainer"] |= {"val_check_interval": None, "enable_checkpointing": False, "enable_progress_bar": False}
    arguments = config["model"]["init_args"]
    arguments["compile"] = compiled
    config["data"]["init_args"] |= {"folder": str(options.data), "batch_size": 32 if options.small else 1024}
    if role == "student":
        arguments["teacher"]["init_args"]["path"] = str(options.work / "network")
    if options.small:
        evaluation["init_args"] |= {"test_samples": 80, "test_specs": ["teacher/euler/2", "student/mix/1"]}
        config["data"]["init_args"]["reference_size"] = 80
        if role == "teacher":
            arguments["network"]["init_args"] |= {"width": 32, "depth": 1, "heads": 2}
    return config


class Pace(L.Callback):
    """Sets the number of steps from the pace between two early steps, so that the schedule ends with the time."""

    def __init__(self, limit: float, first: int, last: int) -> None:
        self.limit, self.first, self.last = limit, first, last
        self.images, self.seconds = 0, 0.0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start the clock."""
        self.start = self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Set the number of steps when the pace is known."""
        self.images += len(batch[0])
        if trainer.global_step not in (self.first, self.last):
            return
        _wait()
        now = time.perf_counter()
        if trainer.global_step == self.last:
            each = (now - self.since) / (self.last - self.first)
            steps = self.last + max(1, int((self.limit - (now - self.start)) / each))
            trainer.fit_loop.epoch_loop.max_steps = steps
            module.set_length(steps)
        self.since = now

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop the clock."""
        _wait()
        self.seconds = time.perf_counter() - self.start


STAGES: dict[str, Callable[[Values, argparse.Namespace], None]] = {
    stage.__name__: stage for stage in (tests, attention, arithmetic, largest, step, fashion)
}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("stage", choices=STAGES)
    for name, content in (("out", "STAGE.json"), ("work", "logs and weights"), ("data", "the four IDX files")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"folder of {content}")
    parser.add_argument("--seconds", type=float, required=True, help="time of the stage")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    STAGES[options.stage](Values(options.out / f"{options.stage}.json"), options)


if __name__ == "__main__":
    main()
