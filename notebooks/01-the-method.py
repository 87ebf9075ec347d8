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
# # The method, on a flow with an exact solution
#
# A diffusion or flow-matching teacher generates a sample by following a velocity field in many small steps. A *student*
# learns to do the same in a few long jumps. Dual-End Consistency Models (DE-CM,
# [arXiv 2602.10764](https://arxiv.org/abs/2602.10764)) train it with three losses. This notebook shows that the three
# losses are one equation on three edges of a triangle, and what each of them does.
#
# The data are two-dimensional: a mixture of eight Gaussians, whose velocity has a closed form. The teacher is therefore
# exact, and every error below is the student's. The notebook runs in about a minute on one core.

# %%
import logging
import os
import tempfile
import warnings

warnings.filterwarnings("ignore")

import lightning as L
import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader

import decm_lightning
from decm_lightning import Distiller, losses
from decm_lightning.derivatives import Tangent, functional
from decm_lightning.flows import Gaussian, GaussianMixture
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.losses import FlowMapLoss, Objective, residual, tangent
from decm_lightning.networks import MLP, save
from decm_lightning.path import interpolate, jump
from decm_lightning.samplers import euler, flow_map_of, sampler
from decm_lightning.samplers.steps import at, flow_map_step
from decm_lightning.teachers import ExactTeacher
from decm_lightning.time_laws import Uniform
from decm_lightning.triangle import DataEdge, Diagonal, NoiseEdge, Triangle
from decm_lightning.types import Batch

STEPS = int(os.environ.get("DECM_NOTEBOOK_STEPS", 1000))  # training steps of each student
BATCH = 256
POINTS = 50_000  # points by which the samplers are compared

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# One colour for each method and each edge, the same in every figure. Exact results are gray or black.
COLOURS = {
    "flow matching": "#0072B2",
    "consistency": "#E69F00",
    "noise-to-noisy": "#CC79A7",
    "whole triangle": "#56B4E9",
    "flow matching + consistency": "#009E73",
    "all three": "#D55E00",
}
EXACT = "0.72"

# %% [markdown]
# ## 1. The path and the jump
#
# Time $t = 0$ is noise $x_0 \sim N(0, I)$, and time $t = 1$ is data $x_1$. The path between them is straight:
#
# $$x_t = (1 - t)\, x_0 + t\, x_1, \qquad \text{with conditional velocity } x_1 - x_0.$$
#
# Many such lines pass through one point $x_t$. Their mean velocity there, $v(x_t, t) = E[x_1 - x_0 \mid x_t]$, moves
# noise to data along *curved* trajectories. A teacher learns this velocity. A **student** $u(x_t, t, s)$ learns the
# mean velocity from time $t$ to a later time $s$. This gives the jump along the trajectory, the **flow map**
#
# $$f(x_t, t, s) = x_t + (s - t)\, u(x_t, t, s), \qquad u(x_t, t, t) = v(x_t, t).$$

# %%
flow = GaussianMixture.ring()
generator = torch.Generator().manual_seed(0)


def exact(x, t, s):
    """The exact flow map from time t to time s, by an adaptive Runge-Kutta solver."""
    return flow.flow_map(x, at(t, x), at(s, x), tolerance=1e-5)


def rms(x):
    return x.square().mean().sqrt().item()


x_0 = torch.randn(100, 2, generator=generator)
grid = [k / 40 for k in range(41)]
trajectories = torch.stack([exact(x_0, 0.0, s) for s in grid])  # (time, trajectory, 2)

# One jump from t = 0.3 to s = 1, on the trajectory that turns aside most.
t, s = 0.3, 1.0
x_t = trajectories[grid.index(t)]
x_tangent = jump(x_t, flow(x_t, at(t, x_t)), at(t, x_t), at(s, x_t))
a, b = (trajectories[-1] - x_t).T, (x_tangent - x_t).T
row = (a[0] * b[1] - a[1] * b[0]).abs().argmax().item()

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
left.plot(*trajectories.permute(2, 0, 1), color=EXACT, lw=0.8, zorder=0)
left.scatter(*x_0.T, s=14, facecolors="white", edgecolors="black", lw=0.8, label="noise, $t = 0$")
left.scatter(*trajectories[-1].T, s=14, color="black", label="data, $t = 1$")
left.set(title="100 exact trajectories", xlabel="$x^{(1)}$", ylabel="$x^{(2)}$", aspect="equal")
left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)

start, end, miss = x_t[row].tolist(), trajectories[-1, row].tolist(), x_tangent[row].tolist()
right.plot(*trajectories[:, row].T, color=EXACT, lw=4, label="exact trajectory")
for target, colour, label in [
    (end, "black", "$(s - t)\\, u(x_t, t, s)$: the jump"),
    (miss, COLOURS["flow matching"], "$(s - t)\\, v(x_t, t)$: one Euler step"),
]:
    right.annotate("", target, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})
    right.plot([], [], color=colour, lw=2, label=label)
right.scatter(*zip(start, end, strict=True), color="black", zorder=3)
right.scatter(*miss, s=1, color=COLOURS["flow matching"])
right.annotate("$x_t$", start, (8, 4), textcoords="offset points", fontsize=14)
right.annotate("$f(x_t, t, s)$", end, (8, 4), textcoords="offset points", fontsize=14)
right.set(title=f"one of them: a jump from $t = {t}$ to $s = {s:g}$", xlabel="$x^{(1)}$", ylabel="$x^{(2)}$")
right.set_aspect("equal", adjustable="datalim")
right.margins(0.2)
right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))
plt.show()

# %% [markdown]
# Trajectories first run toward the center, because all components are still possible, and then turn to one of the eight
# components. A long step along the initial velocity is therefore wrong: from $t = 0$ all such steps would end near the
# center. A student must learn the mean velocity over the whole jump instead.
#
# ## 2. The triangle
#
# A jump is a pair of times $(t, s)$ with $0 \le t \le s \le 1$, which is a point in a triangle. Few-step methods differ
# in the region of the triangle that they train on, and in how they weight the equations at the **start** and at the
# **end** of a jump. A loss in this package consists of an edge, two weights, and a weighting. The table and the plot
# below are computed from the presets.

# %%
METHODS = {
    "flow matching": losses.flow_matching_only(),
    "consistency": losses.consistency_only(),
    "noise-to-noisy (N2N)": Objective({"noise_to_noisy": FlowMapLoss(NoiseEdge(), start_weight=0.0, end_weight=1.0)}),
    "DE-CM: all three": losses.end_identity(),
    "MeanFlow": losses.mean_flow(),
    "Lagrangian distillation": losses.lagrangian(),
}
EDGE_COLOURS = {
    Diagonal: COLOURS["flow matching"],
    DataEdge: COLOURS["consistency"],
    NoiseEdge: COLOURS["noise-to-noisy"],
    Triangle: COLOURS["whole triangle"],
}

figure, axes = plt.subplots(2, 3, figsize=(12, 7.6), sharex=True, sharey=True, layout="constrained")
print(f"{'method':26} {'edge':10} start   end")
for axis, (name, objective) in zip(axes.flat, METHODS.items(), strict=True):
    axis.fill([0, 0, 1], [0, 1, 1], color="0.95", zorder=0)
    for i, loss in enumerate(objective.losses.values()):
        edge = type(loss.edge)
        times = loss.edge.draw(objective.times.draw(60, generator), 0, generator)
        ends = f"{edge.__name__}: start {loss.start_weight:g}, end {loss.end_weight:g}"
        axis.scatter(times.t, times.s, s=12, color=EDGE_COLOURS[edge], clip_on=False)
        axis.text(0.99, 0.05 + 0.09 * i, ends, color=EDGE_COLOURS[edge], ha="right", weight="bold")
        print(f"{name if i == 0 else '':26} {edge.__name__:10} {loss.start_weight:4g} {loss.end_weight:5g}")
    axis.set(title=name, xlim=(0, 1), ylim=(0, 1), aspect="equal")
for axis in axes[-1]:
    axis.set_xlabel("start time $t$")
for axis in axes[:, 0]:
    axis.set_ylabel("end time $s$")
plt.show()

# %% [markdown]
# Each dot is one jump of a training batch. Jumps on the diagonal have length 0 and learn the teacher's velocity. On the
# upper edge every point jumps to data. On the left edge noise jumps to every noise level. `losses.paper()` has the same
# three edges as `losses.end_identity()`, but it trains N2N at both ends (start 1, end 0.5), at every third step, and
# from a start time that falls from 0.1 to 0.
#
# ## 3. One residual
#
# The exact mean velocity satisfies two identities, one for each end of a jump:
#
# $$u = v(x_t, t) + (s - t) \left( \tfrac{\partial u}{\partial x} v + \tfrac{\partial u}{\partial t} \right)
# \quad \text{(start)}, \qquad
# u + (s - t)\, \tfrac{\partial u}{\partial s} = v\big(f(x_t, t, s), s\big) \quad \text{(end)}.$$
#
# Weighted by $\gamma$ (start) and $\lambda$ (end), their sum is the **dual-end residual**
#
# $$g = (\gamma + \lambda)\, u - \gamma\, v_{\text{start}} - \lambda\, v_{\text{end}}
# - (s - t)\, jvp\big[\gamma v_{\text{start}},\; \gamma,\; -\lambda\big],$$
#
# where $jvp[\cdot]$ is the derivative of $u$ along that *tangent* over $(x, t, s)$. Every loss here is
# $\lVert u - \mathrm{sg}(u - N(g)) \rVert^2$ on its edge, which moves the student toward $g = 0$. $N$ normalizes the
# residual, and sg stops the gradient. On the diagonal $s - t = 0$, and the residual reduces to flow matching.
#
# For a single Gaussian the flow map has a closed form, so we can check that $g = 0$. A public summary of the paper
# prints a different tangent, $(\lambda v,\; \lambda,\; -\gamma)$; the last column shows the residual with that tangent.

# %%
gaussian = Gaussian(mean=torch.tensor([1.0, -0.5], dtype=torch.float64), std=0.4)
x_0 = torch.randn(4096, 2, generator=generator, dtype=torch.float64)
x_1 = gaussian.sample(4096, 2, generator, torch.float64)
times = Triangle().draw(Uniform().draw(4096, generator).double(), 0, generator)
t, s, x_t = times.t, times.s, interpolate(x_0, x_1, times.t)

v_start = gaussian.velocity(x_t, t)
v_end = gaussian.velocity(gaussian.flow_map(x_t, t, s), s)

print("start end | rms of g, our tangent | the printed one")
for start, end in [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5), (0.3, 1.7), (1.0, 1.0)]:
    values = []
    for direction in (
        tangent(v_start, t, start, end),
        Tangent(end * v_start, torch.full_like(t, end), torch.full_like(t, -start)),
    ):
        result = functional(gaussian, x_t, t, s, None, direction)
        values.append(rms(residual(result.u, result.jvp, v_start, v_end, t, s, start, end)))
    print(f"{start:5g} {end:3g} | {values[0]:21.1e} | {values[1]:15.1e}")

# %% [markdown]
# Our residual is zero up to rounding for every pair of weights. The printed tangent is wrong if the two weights differ.
# If they are equal, both tangents agree by symmetry, so a test with equal weights would not detect the error.
#
# ## 4. The effect of each loss
#
# We train four students with the same network, the same initial weights and the same data. Only `objective` differs.
# The `Distiller` is the package's LightningModule: it samples the jumps, evaluates the teacher, differentiates the
# student, and maintains a moving average of its weights (`average`), which we evaluate.

# %%
OBJECTIVES = {
    "flow matching": losses.flow_matching_only(),
    "consistency": losses.consistency_only(),
    "flow matching + consistency": losses.consistency_and_flow_matching(),
    "all three": losses.end_identity(),
}
teacher = ExactTeacher(flow)


def train(objective, steps, guidance=None, num_classes=0):
    """Return the averaged student after `steps` steps; each time from the same seed."""
    L.seed_everything(0, verbose=False)
    draws = [flow.sample(BATCH, torch.Generator().manual_seed(step)) for step in range(steps)]
    batches = [Batch(draw.x_1, draw.condition if num_classes else None) for draw in draws]
    module = Distiller(
        teacher,
        MLP(2, 128, 3, num_classes),
        objective,
        guidance or Guidance(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3),
        ema_decay=0.995,
    )
    L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(batches, batch_size=None))
    return module.average.eval()


students = {name: train(objective, STEPS) for name, objective in OBJECTIVES.items()}

# %% [markdown]
# Each student now moves the same 2,000 noise points: in one jump $0 \to s$ for several $s$, and in 50 Euler steps. We
# measure the distance to the end points of the exact flow (root mean square over coordinates).

# %%
torch.set_grad_enabled(False)
x_0 = torch.randn(2000, 2, generator=generator)
ends = [0.05, *(k / 10 for k in range(1, 11))]
truth = {s: exact(x_0, 0.0, s) for s in ends}

jump_errors = {n: [rms(flow_map_step(u, x_0, 0.0, s, None) - truth[s]) for s in ends] for n, u in students.items()}
euler_errors = {n: rms(euler(u, x_0, None, 50) - truth[1.0]) for n, u in students.items()}
teacher_error = rms(euler(flow_map_of(teacher), x_0, None, 50) - truth[1.0])

print(f"{'error of':28} jump 0 -> 0.2  0 -> 0.5  0 -> 0.8  0 -> 1   50 Euler steps")
for name, errors in jump_errors.items():
    picked = [errors[ends.index(s)] for s in (0.2, 0.5, 0.8, 1.0)]
    print(f"{name:28} {picked[0]:13.3f} {picked[1]:9.3f} {picked[2]:9.3f} {picked[3]:7.3f} {euler_errors[name]:12.3f}")
print(f"{'the exact velocity (teacher)':28} {'':>41} {teacher_error:12.3f}")

figure, (curve, one, many) = plt.subplots(1, 3, figsize=(14, 4.4), width_ratios=[2, 1, 1], layout="constrained")
for name, errors in jump_errors.items():
    curve.plot(ends, errors, "o-", ms=4, lw=2, color=COLOURS[name], label=name)
curve.set(title="error of one jump from noise to time $s$", xlabel="end time $s$", ylabel="RMS error", yscale="log")
curve.legend()
last = {name: errors[-1] for name, errors in jump_errors.items()}
for axis, errors, title in [(one, last, "one jump 0 to 1"), (many, euler_errors, "50 Euler steps")]:
    bars = axis.barh(list(errors), list(errors.values()), color=[COLOURS[name] for name in errors])
    axis.bar_label(bars, fmt="%.3f", padding=3)
    axis.set(title=title, xlabel="RMS error", yticks=[], xlim=(0, 1.25 * max(errors.values())))
    axis.invert_yaxis()
plt.show()

# %%
SQUARE = {"xlim": (-3, 3), "ylim": (-3, 3), "aspect": "equal", "xticks": [], "yticks": []}
SHOWN = 800  # points shown of each set

figure, axes = plt.subplots(3, 4, figsize=(11, 8.6), layout="constrained")
for column, (name, student) in zip(axes.T, students.items(), strict=True):
    clouds = [
        flow_map_step(student, x_0, 0.0, 0.5, None),
        flow_map_step(student, x_0, 0.0, 1.0, None),
        euler(student, x_0, None, 50),
    ]
    for axis, cloud, target in zip(column, clouds, (truth[0.5], truth[1.0], truth[1.0]), strict=True):
        axis.scatter(*target[:SHOWN].T, s=3, color=EXACT)
        axis.scatter(*cloud[:SHOWN].T, s=1, color=COLOURS[name])
        axis.set(**SQUARE)
    column[0].set_title(name, color=COLOURS[name])
for axis, label in zip(axes[:, 0], ["one jump 0 to 0.5", "one jump 0 to 1", "50 Euler steps"], strict=True):
    axis.set_ylabel(label)
figure.suptitle("exact in grey, the student in colour")
plt.show()

# %% [markdown]
# The numbers and the plots show:
#
# - **Flow matching alone** is accurate only for short jumps. Its error grows with the length of the jump, and the jump
#   $0 \to 1$ ends near the center. It needs its 50 Euler steps.
# - **Consistency alone** learns only the jump to data. A jump to an intermediate time goes too far, and its diagonal is
#   not a velocity: 50 Euler steps overshoot the ring.
# - **Flow matching + consistency** fixes both ends. Neither loss trains the middle of the curve, $0 < s < 1$ from
#   noise, but the network interpolates it surprisingly well.
# - **All three**: N2N trains the middle and lowers its error. At $s = 1$ and with 50 Euler steps it changes little
#   here. Other seeds gave the same result: better in the middle, no gain at the two ends.
#
# Consistency alone is even slightly better at the single jump, because it uses the whole network for it. No student is
# perfect. The exact jump to data separates noise along the borders between the components; a small network after a
# short training blurs these borders and leaves points between the clusters. On ImageNet the paper reports larger gains:
# there, all three losses together are best at every number of steps.
#
# ## 5. Samplers
#
# A sampler is a sequence of jumps. Each sampler uses different edges of the triangle:
#
# - **Euler**: $n$ equal short steps along the diagonal, as for the teacher.
# - **Consistency** (CM in the plot): jump to data, add fresh noise up to a later time, jump again.
# - **Mix**: one jump $0 \to s_1$ on the noise edge, Euler steps on the diagonal, one last jump to data. No new noise.
#
# With one step, consistency and Mix are the same jump $0 \to 1$. Consistency adds fresh noise, so a noise point has no
# unique end point. We therefore compare distributions by the sliced Wasserstein distance to exact samples. Smaller is
# better. The floor is the distance between two sets of exact samples.

# %%
NAMES = {"euler": "Euler", "consistency": "CM", "mix": "Mix"}
COUNTS = (1, 2, 4, 8)

angles = torch.arange(32) * (torch.pi / 32)
directions = torch.stack([angles.cos(), angles.sin()])


def distance(x, y):
    """Sliced Wasserstein-1 distance of two clouds of equal size, times 1000, over 32 directions."""
    return 1000 * ((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean().item()


reference = flow.sample(POINTS, generator).x_1
floor = distance(flow.sample(POINTS, generator).x_1, reference)
noise = torch.randn(POINTS, 2, generator=generator)
student = students["all three"]
samples = {(name, n): sampler(name)(student, noise, None, n, generator=generator) for name in NAMES for n in COUNTS}
distances = {key: distance(cloud, reference) for key, cloud in samples.items()}

print(f"{'steps':16}" + "".join(f"{n:6}" for n in COUNTS))
for name, title in NAMES.items():
    print(f"{title:16}" + "".join(f"{distances[name, n]:6.0f}" for n in COUNTS))
print(f"floor: {floor:.0f} between two clouds of {POINTS:,} exact samples")

figure, axes = plt.subplots(3, 5, figsize=(11, 6.8), layout="constrained")
for line, (name, title) in zip(axes, NAMES.items(), strict=True):
    for axis, n in zip(line, COUNTS, strict=False):
        axis.scatter(*samples[name, n][:SHOWN].T, s=1, color=COLOURS["all three"])
        axis.set(title=f"{n} step{'s' * (n > 1)}: {distances[name, n]:.0f}", **SQUARE)
    line[-1].scatter(*reference[:SHOWN].T, s=1, color="black")
    line[-1].set(title="exact", **SQUARE)
    line[0].set_ylabel(title, fontsize=13)
plt.show()

# %% [markdown]
# Euler with few steps stays near the center and needs many more than eight steps. The other two are close to the ring
# after one step: most points lie between neighboring components, and a few lie inside the ring. A second step clears
# the inside. With more steps consistency improves a little, while Mix, which adds no noise and relies on the diagonal,
# does not. Differences of about 10 are noise: they change by that much with the length of the training.
# All distances remain well above the floor. Since the teacher is exact, this gap is due to the small student.
#
# ## 6. Guidance and next steps
#
# Here the eight components are classes. Classifier-free guidance moves the velocity of a class away from the velocity
# of the whole mixture. `limit` bounds the correction (*velocity normalization*), and `interval` sets the times at which
# it is active:
#
# $$v = v_{\text{class}} + (w - 1)\, \min\!\big(1, \tfrac{\eta}{\mathrm{rms}(dv)}\big)\, dv,
# \qquad dv = v_{\text{class}} - v_{\text{all}}.$$
#
# A `Distiller` with `guidance=` trains the student on the guided velocity, so that sampling needs no second pass.

# %%
torch.set_grad_enabled(True)
guidance = Guidance(scale=3.0, limit=0.5)
guided = GuidedField(teacher, teacher.null, guidance)
student = train(losses.end_identity(), STEPS // 2, guidance, num_classes=8)

# %%
torch.set_grad_enabled(False)
labels = torch.arange(2000) % 8
free = GuidedField(teacher, teacher.null, Guidance(scale=3.0))
clouds = {
    "teacher, $w = 1$": (euler(flow_map_of(teacher), x_0, labels, 50), "0.4"),
    "teacher, $w = 3$, no limit": (euler(flow_map_of(free), x_0, labels, 50), "0.4"),
    "teacher, $w = 3$, limit 0.5": (euler(flow_map_of(guided), x_0, labels, 50), "0.4"),
    "student of the third, one jump": (flow_map_step(student, x_0, 0.0, 1.0, labels), COLOURS["all three"]),
}
figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
for axis, (title, (cloud, colour)) in zip(axes, clouds.items(), strict=True):
    axis.scatter(*cloud[:SHOWN].T, s=2, color=colour)
    axis.scatter(*flow.means.T, marker="+", s=60, color="black")
    axis.set(title=title, **SQUARE)
    print(f"{title:32} mean distance from the centre {cloud.norm(dim=1).mean():.2f} (the classes' means: 2.00)")
plt.show()

# %% [markdown]
# Guidance moves every class outward, past its mean, and the limit reduces this. The student was trained for half the
# steps of the students above. Its single jump ends where the teacher's samples are, in streaks that are thinner than
# the teacher's clusters.
#
# A trained network is saved as a folder and loaded in one call. A training checkpoint loads in the same way and gives
# the averaged weights.

# %%
with tempfile.TemporaryDirectory() as folder:
    save(student, folder)
    again = decm_lightning.load(folder)
same = torch.equal(flow_map_step(again, x_0, 0.0, 1.0, labels), flow_map_step(student, x_0, 0.0, 1.0, labels))
print(f"the loaded {type(again).__name__} gives the same samples: {same}")

# %% [markdown]
# Next steps:
#
# - `decm fit --config configs/digits/decm.yaml` distills a teacher of small images with the same `Distiller`. The YAML
#   file names the same classes as this notebook, and any key can be overridden (`--trainer.max_steps 100`).
# - `decm test`, `decm sample` and `decm export` evaluate a checkpoint, sample from it, and save it as a folder.
# - `decm_lightning.load(...)` loads a checkpoint or folder in Python; `.generate(...)` returns images.
# - [The second notebook](02-your-own-method.ipynb) defines a new method by its edge, weights and time law.
