# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own method, in 25 lines
#
# A few-step method consists of a region of the triangle of jumps $(t, s)$, two weights for the identities at the start
# and at the end of a jump, and a distribution of the start times $t$. This notebook defines a method that is not part
# of the package, and trains it on two teachers: the exact mixture of [the first notebook](01-the-method.ipynb) and a
# network trained on digits.
#
# The method is designed for **two steps**, $0 \to \frac12 \to 1$. Every point learns to jump half of the remaining way,
# by both identities with equal weights, and to jump to data, by consistency. Start times are denser near the data,
# where the trajectories turn to the classes.

# %%
# Not part of the method: a quiet notebook, and the number of training steps.
import logging
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt

import decm_lightning

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
STEPS = int(os.environ.get("DECM_NOTEBOOK_STEPS", 1500))
DIGITS = str(Path(decm_lightning.__file__).parents[2] / "weights/digits/teacher")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

# %% [markdown]
# ## The method
#
# An `Edge` defines the jumps that start at the batch's times `t`. A `TimeLaw` is a quantile function, which maps
# uniform levels to times. A `FlowMapLoss` has an edge and two weights, and an `Objective` is a set of named losses with
# one normalization of their residuals. All are dataclasses, so they can be compared when a run is resumed.

# %%
from dataclasses import dataclass

import lightning as L
import torch
from torch.utils.data import DataLoader

from decm_lightning import Batch, Distiller, Objective, data, flows, losses, networks, teachers
from decm_lightning.triangle import DataEdge, Diagonal, Edge, TimeLaw, Times


@dataclass(frozen=True)
class Halfway(Edge):
    def draw(self, t, step, generator):
        return Times(t, (t + 1) / 2)


@dataclass(frozen=True)
class Late(TimeLaw):
    def quantiles(self, levels):
        return levels**0.7


halfway = losses.FlowMapLoss(Halfway(), start_weight=0.5, end_weight=0.5)
edges = {"consistency": losses.FlowMapLoss(DataEdge()), "flow_matching": losses.FlowMapLoss(Diagonal())}
objective = Objective({"halfway": halfway} | edges, normalization="tangent_norm", times=Late())

# %% [markdown]
# The `Distiller` trains a student on this objective with any teacher. Without a student argument, the student starts
# from the teacher's weights. RAdam has a built-in warm-up; without one Adam's first steps would damage these weights.


# %%
def distill(teacher, student, batches, steps):
    module = Distiller(teacher, student, objective, optimizer=lambda p: torch.optim.RAdam(p, 3e-3), ema_decay=0.99)
    L.Trainer(accelerator="cpu", max_steps=steps, **QUIET).fit(module, batches)
    return module.average


flow = flows.GaussianMixture.ring()
points = [Batch(flow.sample(256, torch.Generator().manual_seed(step)).x_1, None) for step in range(STEPS)]
plane = distill(teachers.ExactTeacher(flow), networks.MLP(2), DataLoader(points, batch_size=None), STEPS)
digits = distill(teachers.PretrainedTeacher(DIGITS), None, data.Digits(64), STEPS // 20)

# %% [markdown]
# ## The result
#
# The first plot shows the jumps of one batch. The others show exact samples, and the student's samples at one step and
# at the two steps that the method is designed for.

# %%
generator = torch.Generator().manual_seed(0)
t = Late().draw(100, generator)
clouds = {"exact": flow.sample(2000, generator).x_1}
for steps in (1, 2):
    clouds[f"student, {steps} step{'s' * (steps > 1)}"] = plane.generate(steps=steps, s1=0.5, rows=range(2000))

figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
axes[0].fill([0, 0, 1], [0, 1, 1], color="0.95", zorder=0)
for name, loss in objective.losses.items():
    times = loss.edge.draw(t, 0, generator)
    axes[0].scatter(times.t, times.s, s=8, label=name, clip_on=False)
axes[0].set(xlabel="start time $t$", ylabel="end time $s$", xlim=(0, 1), ylim=(0, 1), aspect="equal")
axes[0].legend(loc="lower right", frameon=False)
for axis, (name, cloud) in zip(axes[1:], clouds.items(), strict=True):
    axis.scatter(*cloud.T, s=1, color="black" if name == "exact" else "#D55E00")
    axis.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Digits: the teacher at 50 Euler steps, and the student at one and two steps from the same noise. The teacher is not
# guided here; `Distiller(..., guidance=Guidance(1.25))` would train the student on the guided velocity.

# %%
teacher = decm_lightning.load(DIGITS)
rows = {
    "teacher, 50 steps": teacher.generate(),
    "student, 1 step": digits.generate(steps=1),
    "student, 2 steps": digits.generate(steps=2, s1=0.5),
}
figure, axes = plt.subplots(3, 10, figsize=(10, 3), layout="constrained")
for line, (name, images) in zip(axes, rows.items(), strict=True):
    for axis, image in zip(line, images, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name, rotation="horizontal", ha="right", va="center")
plt.show()

# %% [markdown]
# If these classes are in a module, a config can name them by their path: `edge: my_module.Halfway`,
# `times: my_module.Late`.
