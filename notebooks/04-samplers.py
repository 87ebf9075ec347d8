# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Samplers and schedules
#
# A student $u(x_t, t, s)$ can be sampled in several ways, and the choice needs no training. This notebook samples two
# stored students by the four samplers of the package, at different numbers of network evaluations (NFE) and with
# different schedules. Fashion-MNIST is used to look, and digits are used to measure, because their feature network is
# fast. The notebook runs in about a minute on one core.

# %%
import base64
import io
import logging
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import lightning as L
import matplotlib.pyplot as plt
import torch
from IPython import display
from PIL import Image, ImageDraw

import decm_lightning
from decm_lightning import samplers
from decm_lightning.data import Digits
from decm_lightning.demo import DigitsFeatures
from decm_lightning.evaluation import Evaluation
from decm_lightning.evaluation.pretrained import PretrainedModel

logging.disable(logging.WARNING)
torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

WEIGHTS = Path(decm_lightning.__file__).parents[2] / "weights"
COLOURS = {"euler": "#0072B2", "consistency": "#E69F00", "mix": "#CC79A7", "flow_map": "#009E73"}
NFE = (1, 2, 4, 8)

# %% [markdown]
# ## Where each sampler steps
#
# A sampler is a function of a student and noise. Each of its steps is a point $(t, s)$ in the triangle, so a function
# that records its arguments shows the schedule of any sampler:
#
# - **euler** steps along the velocity $u(x_t, t, t)$, which is on the diagonal;
# - **consistency** jumps to data, adds noise again, and repeats; it stays on the upper edge;
# - **mix** jumps from noise to time $s_1$, takes Euler steps, and jumps to data;
# - **flow_map** jumps from time to time, inside the triangle.


# %%
def schedule(name, steps, **options):
    """Return the (t, s) of each network evaluation."""
    calls = []

    def student(x_t, t, s, condition):
        calls.append((t.item(), s.item()))
        return x_t

    samplers.sampler(name, **options)(student, torch.zeros(1, 1), None, steps)
    return calls


figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), sharey=True, layout="constrained")
for axis, (name, colour) in zip(axes, COLOURS.items(), strict=True):
    axis.fill([0, 0, 1], [0, 1, 1], color="0.95", zorder=0)
    for step, (t, s) in enumerate(schedule(name, 4), 1):
        axis.scatter(t, s, s=260, color=colour, clip_on=False)
        axis.text(t, s, step, color="white", ha="center", va="center", weight="bold")
    axis.set(title=f"{name}, 4 steps", xlabel="start time $t$", xlim=(0, 1), ylim=(0, 1), aspect="equal")
axes[0].set_ylabel("end time $s$")
plt.show()

# %% [markdown]
# ## The same noise, four samplers
#
# Each column starts from the same noise. One Euler step gives the mean of the class. The other samplers give an
# image in one step, and further steps remove noise from it. `student.generate` returns PIL images.

# %%
fashion = decm_lightning.load(WEIGHTS / "fashion/student")


def grid(rows, side=56):
    """Return a PNG with rows of images, and their names on the left."""
    sheet = Image.new("L", (130 + 10 * side, len(rows) * side), "white")
    for y, (name, images) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((0, (y + 0.5) * side), name, "black", anchor="lm", font_size=14)
        for x, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (130 + x * side, y * side))
    file = io.BytesIO()
    sheet.quantize(16).save(file, "PNG")
    return display.Image(file.getvalue())


grid({f"{name}, {n} NFE": fashion.generate(range(10), steps=n, sampler=name) for name in COLOURS for n in NFE})

# %% [markdown]
# ## Quality over NFE
#
# `Evaluation` is the callback behind `decm test`. It measures each spec `model/sampler/steps?option=value` with the
# same noise: the Fréchet distance of features between 500 samples and the real digits. Lower is better.


# %%
def measure(specs):
    """Return the Fréchet distance of each spec of the digits student."""
    evaluation = Evaluation(DigitsFeatures(), specs, samples=500)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[evaluation], **quiet)
    (values,) = trainer.validate(PretrainedModel(str(WEIGHTS / "digits/student")), Digits(), verbose=False)
    return {spec: values[f"fd/{spec}"] for spec in specs}


quality = measure([f"student/{name}/{steps}" for name in COLOURS for steps in NFE])

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, colour in COLOURS.items():
    axis.plot(NFE, [quality[f"student/{name}/{n}"] for n in NFE], "o-", ms=5, lw=2, color=colour, label=name)
axis.set(xlabel="network evaluations (NFE)", ylabel="Fréchet distance", xscale="log", yscale="log")
axis.minorticks_off()
axis.set_xticks(NFE, NFE)
axis.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
axis.legend()
plt.show()

# %% [markdown]
# ## The first end time of mix
#
# At 2 steps mix has one free time $s_1$, where the first jump ends and the second starts. At $s_1$ = 0 or 1, one of the
# two jumps would have length 0. The best time for this student is near 0.7, and the default is 0.75.

# %%
ENDS = [k / 10 for k in range(1, 10)]
by_end = measure([f"student/mix/2?s1={s1}" for s1 in ENDS])

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.axhline(quality["student/mix/1"], color="0.7", ls="--", label="1 step")
axis.plot(ENDS, list(by_end.values()), "o-", ms=5, lw=2, color=COLOURS["mix"], label="mix, 2 steps")
axis.set(xlabel="$s_1$", ylabel="Fréchet distance")
axis.legend()
plt.show()

# %% [markdown]
# Move the slider to see the effect of $s_1$ on the same noise. It works without a running kernel. Where a viewer hides
# it, the rows below show three of the values.

# %%
rows = {f"s1 = {s1}": fashion.generate(range(10), steps=2, sampler="mix", s1=s1) for s1 in ENDS}


def html(image, hidden):
    return f'<img src="data:image/png;base64,{base64.b64encode(image.data).decode()}" {"hidden" * hidden}>'


frames = [html(grid({name: images}), name != "s1 = 0.5") for name, images in rows.items()]
show = "this.parentNode.querySelectorAll('img').forEach((image, i) => image.hidden = i != this.value)"
display.HTML(f'<div><input type="range" max="{len(ENDS) - 1}" oninput="{show}"><br>{"".join(frames)}</div>')

# %%
grid({name: images for name, images in rows.items() if name in ("s1 = 0.1", "s1 = 0.5", "s1 = 0.9")})

# %% [markdown]
# ## Your own schedule
#
# Every sampler takes its times directly, or a `shift` that moves the default times toward the noise (above 1) or the
# data (below 1). The consistency sampler is best when it adds noise late.

# %%
schedules = {
    "shift=0.5": {"shift": 0.5},
    "default": {},
    "shift=2": {"shift": 2.0},
    "times=[0.25,0.5,0.75]": {"times": [0.25, 0.5, 0.75]},
}
specs = {name: f"student/consistency/4?{name}".removesuffix("?default") for name in schedules}
by_schedule = measure(list(specs.values()))

print(f"{'consistency, 4 steps':24} {'times':24} distance")
for name, options in schedules.items():
    times = ", ".join(f"{t:.2f}" for t, _ in schedule("consistency", 4, **options))
    print(f"{name:24} {times:24} {by_schedule[specs[name]]:8.3f}")

# %% [markdown]
# The same specs work in a config (`test_specs` of `Evaluation`) and on the command line:
# `decm sample weights/fashion/student --sampler 'mix?s1=0.6' --steps 2`. Your own sampler is a function like
# `samplers.euler`, named by its path: `decm sample ... --sampler my_module.heun`.
