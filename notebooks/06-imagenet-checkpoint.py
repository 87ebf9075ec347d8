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
# # Bring a public ImageNet checkpoint
#
# Public LightningDiT, SiT and DiT files load as they are, and become teachers. This notebook loads such a file, checks
# that it fits the data, measures it, and trains and exports a student. It runs in less than a minute on one core with a
# tiny file of the same format. Set `IMAGENET` to a folder with the real files, and the same cells run on them (on a
# GPU):
#
# - `lightningdit-xl-imagenet256-800ep.pt` and `vavae-imagenet256-f16d32-dinov2.pt` of LightningDiT;
# - `imagenet256-latents`, which `decm encode --images imagenet/train --vae FILE --out FOLDER` writes;
# - `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity;
# - `VIRTUAL_imagenet256_labeled.npz`, ADM's reference.

# %%
import logging
import os
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["TQDM_DISABLE"] = "1"  # no progress bars

import lightning as L
import matplotlib.pyplot as plt
import torch
from safetensors.torch import save_file

import decm_lightning
from decm_lightning import Distiller, Guidance, losses, samplers
from decm_lightning.data import Digits, ImageNetLatents
from decm_lightning.demo import DigitsFeatures
from decm_lightning.evaluation import Evaluation
from decm_lightning.evaluation.pretrained import PretrainedModel
from decm_lightning.metrics import InceptionFeatures
from decm_lightning.path import interpolate, velocity
from decm_lightning.samplers.steps import at
from decm_lightning.teachers import PretrainedTeacher

logging.disable(logging.WARNING)
L.seed_everything(0, verbose=False)
torch.set_num_threads(1)
torch.set_grad_enabled(False)
plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

IMAGENET = os.environ.get("IMAGENET", "")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

# %% [markdown]
# ## A tiny file of the same format
#
# The stored digits teacher has LightningDiT's architecture, so its tensors already have the names of the public file.
# LightningDiT saves them under `ema`, with the prefix `module.` of DistributedDataParallel. Latents are safetensors
# shards with labels and mirror images, next to the statistics that normalize them. Here digits take the place of
# latents.

# %%
if not IMAGENET:
    digits = decm_lightning.load(Path(decm_lightning.__file__).parents[2] / "weights/digits/teacher")
    torch.save({"ema": {f"module.{name}": tensor for name, tensor in digits.state_dict().items()}}, "tiny.pt")

    images = Digits()
    images.setup("fit")
    x_1, labels = images.train[range(len(images.train))]
    Path("tiny-latents").mkdir(exist_ok=True)
    shard = {"latents": x_1, "latents_flip": x_1.flip(-1), "labels": labels}
    save_file(
        {name: tensor.contiguous() for name, tensor in shard.items()},
        "tiny-latents/latents_rank00_shard000.safetensors",
    )
    torch.save({"mean": torch.zeros(1, 1, 1, 1), "std": torch.ones(1, 1, 1, 1)}, "tiny-latents/latents_stats.pt")

# %% [markdown]
# ## The settings
#
# Everything that differs between the tiny and the real run is in this cell.

# %%
if IMAGENET:
    FILE = f"{IMAGENET}/lightningdit-xl-imagenet256-800ep.pt"
    vae = f"{IMAGENET}/vavae-imagenet256-f16d32-dinov2.pt"
    latents = images = ImageNetLatents(f"{IMAGENET}/imagenet256-latents", vae=vae, reference_size=100)
    features = InceptionFeatures(f"{IMAGENET}/weights-inception-2015-12-05-6726825d.pth")
    reference, samples, guidance = f"{IMAGENET}/VIRTUAL_imagenet256_labeled.npz", 50_000, Guidance(1.75, limit=1.0)
else:
    FILE = "tiny.pt"
    latents = ImageNetLatents("tiny-latents", num_classes=10, latent_norm=False, flip=False)
    features, reference, samples, guidance = DigitsFeatures(), None, 500, Guidance(1.25)

# %% [markdown]
# ## Load
#
# The architecture is inferred from the names and shapes of the tensors. Nothing in the file is executed.

# %%
network = decm_lightning.load(FILE)
print(f"{type(network).__name__} with {sum(p.numel() for p in network.parameters()):,} parameters")
print({key: network.config[key] for key in ("input_size", "in_channels", "patch_size", "width", "depth", "heads")})
print(f"{network.num_classes} classes, samples of shape {network.sample_shape}")

# %%
if not IMAGENET:
    arguments = digits.example()
    difference = (network(*arguments) - digits(*arguments)).abs().max().item()
    print(f"largest difference from the network that wrote the file: {difference}")

# %% [markdown]
# ## Does the file fit the data?
#
# The flow-matching error $\lVert v(x_t, t) - (x_1 - x_0) \rVert^2$ on a few batches answers this within seconds. It is
# shown relative to the error of the zero velocity. A teacher that fits its latents is far below 1 at every time. The
# other curves show two common mistakes: a reversed time, and latents with another normalization.

# %%
teacher = PretrainedTeacher(FILE)
latents.setup("fit")
x_1, labels = latents.train[range(256)]
x_0 = torch.randn(x_1.shape, generator=torch.Generator().manual_seed(0))
times = [k / 10 for k in range(10)]


def error(t, reverse=False, scale=1.0):
    x_t, target = interpolate(x_0, scale * x_1, at(t, x_1)), velocity(x_0, scale * x_1)
    v = teacher.velocity(x_t, at(1 - t if reverse else t, x_1), labels)
    return ((v - target).square().mean() / target.square().mean()).item()


curves = {
    "this file": [error(t) for t in times],
    "time reversed": [error(t, reverse=True) for t in times],
    "latents times 3": [error(t, scale=3.0) for t in times],
}
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
axis.axhline(1, color="0.7", ls="--", label="zero velocity")
for (name, values), colour in zip(curves.items(), ("#009E73", "#D55E00", "#CC79A7"), strict=True):
    axis.plot(times, values, "o-", ms=4, lw=2, color=colour, label=name)
axis.set(xlabel="time $t$", ylabel="relative error", yscale="log", title=f"prediction: {teacher.prediction}")
figure.legend(loc="outside right")
plt.show()

# %% [markdown]
# ## Look at samples, and measure them
#
# This is what `decm test FILE --config configs/imagenet.yaml` does. With the real files the column is `fid`, of 50,000
# samples. Sampled by Euler's method, a guided teacher needs two evaluations per step.

# %%
model = PretrainedModel(FILE, guidance)
row = torch.arange(10) * network.num_classes // 10
x = samplers.generate(
    model.models()["teacher"], samplers.euler, row, steps=50, shape=network.sample_shape, rows=range(10)
)
x = latents.decode(x) if IMAGENET else x

figure, axes = plt.subplots(1, 10, figsize=(10, 1.1), layout="constrained")
for axis, image in zip(axes, x, strict=True):
    axis.imshow((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
    axis.axis("off")
plt.show()

# %%
specs = ["teacher/euler/1", "teacher/euler/4", "teacher/euler/50"]
evaluation = Evaluation(features, specs, samples=samples, reference=reference)
trainer = L.Trainer(accelerator="auto", callbacks=[evaluation], **QUIET)
(measured,) = trainer.validate(model, images, verbose=False)
for name, value in measured.items():
    print(f"{name:24} {value:8.3f}")

# %% [markdown]
# ## The student
#
# `Distiller` copies the teacher and adds an embedding of the end time, whose output starts at zero. Before training the
# student therefore equals the teacher for every end time.

# %%
distiller = Distiller(teacher, objective=losses.paper(), guidance=guidance)
x_t, t, s = interpolate(x_0, x_1, at(0.3, x_1))[:8], at(0.3, x_1)[:8], at(0.9, x_1)[:8]
start = (distiller.student(x_t, t, s, labels[:8]) - teacher.velocity(x_t, t, labels[:8])).abs().max().item()
print(f"largest difference between student and teacher: {start}")

# %% [markdown]
# One training step. `configs/imagenet.yaml` has the paper's recipe for the whole run, with its cost.

# %%
trainer = L.Trainer(accelerator="auto", max_steps=1, **QUIET)
with torch.enable_grad():
    trainer.fit(distiller, latents)
print(losses.cost(distiller.objective, guidance.passes))
for name in distiller.objective.losses:
    if f"loss/{name}" in trainer.callback_metrics:
        print(f"{name:16} {trainer.callback_metrics[f'loss/{name}']:.3f}")

# %% [markdown]
# ## Export
#
# `save` writes a folder, and `load` reads it again. `decm export STUDENT OUT --to diffusers` writes a pipeline for
# diffusers, and `--push user/name` uploads it with a model card.

# %%
decm_lightning.save(distiller.average, "student")
again = decm_lightning.load("student")
arguments = again.example()
same = torch.equal(again(*arguments), distiller.average.eval()(*arguments))
print(sorted(file.name for file in Path("student").iterdir()), f"the same output: {same}")
