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
# # Distill your own images
#
# From a folder of images to a student that generates images like them in one step: train a teacher by flow matching,
# then distill it. `decm new photos --out my-run` does the same as this notebook for any folder. It chooses the sizes,
# measures the time of a step, and writes two configs.
#
# The runs below take about a minute on one core, so the images are tiny and the samples rough. The end of the notebook
# tells what more time gives. The images are Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0 (extra
# `emoji`).

# %%
import io
import logging
import os
import shutil
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["TQDM_DISABLE"] = "1"  # no progress bars

import lightning as L
import numpy as np
import torch
from IPython import display
from PIL import Image, ImageDraw

import decm_lightning
from decm_lightning import Distiller, TeacherTraining
from decm_lightning.data import ImageFolder
from decm_lightning.demo.emoji import read_emoji
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import DiT
from decm_lightning.teachers import PretrainedTeacher

logging.disable(logging.WARNING)
L.seed_everything(0, verbose=False)
torch.set_num_threads(1)

STEPS = int(os.environ.get("DECM_NOTEBOOK_STEPS", 500))  # training steps of the teacher; the student has a third
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

# %% [markdown]
# ## The images
#
# `ImageFolder` reads class folders, images without classes, tars, and data sets of Hugging Face. Put your own images
# into `photos`, and leave out this cell.

# %%
for emoji in read_emoji():
    name = emoji.words[0]
    if "nation" in emoji.words or "o clock" in name or name.endswith("thirty"):
        folder = Path("photos") / ("flags" if "nation" in emoji.words else "clocks")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(emoji.file, folder)

# %% [markdown]
# All images are read once, cropped to squares, resized and stored. `flip` would mirror a random half of them, which
# spoils clocks and flags.

# %%
data = ImageFolder("photos", size=16, batch_size=32, flip=False, held_out=0.0, cache="cache")
data.setup("fit")
print(f"{len(data.train)} images of {' and '.join(data.class_names)}")


def grid(rows, side=48):
    """Return a PNG with rows of images, and their names on the left."""
    columns = max(map(len, rows.values()))
    sheet = Image.new("RGB", (140 + columns * side, len(rows) * side), "white")
    for y, (name, images) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((0, (y + 0.5) * side), name, "black", anchor="lm", font_size=14)
        for x, image in enumerate(images):
            sheet.paste(image.resize((side - 4, side - 4), Image.Resampling.NEAREST), (140 + x * side, y * side))
    file = io.BytesIO()
    sheet.quantize(128).save(file, "PNG")
    return display.Image(file.getvalue())


LABELS = [0] * 5 + [1] * 7
x_1, labels = data.train[range(len(data.train))]
pixels = to_uint8(torch.cat([x_1[labels == 0][:5], x_1[labels == 1][:7]]))
real = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
grid({"real": real})

# %% [markdown]
# ## The teacher
#
# A small transformer on 4 x 4 patches learns the velocity from noise to images. `pixel_skip` lets the noise of the
# pixels bypass the few tokens.


# %%
def optimizer(parameters):
    return torch.optim.AdamW(parameters, 2e-3, weight_decay=0.0)


def fit(module, steps):
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, **QUIET)
    trainer.fit(module, data)
    return module.average


network = DiT(16, 3, patch_size=4, width=128, depth=4, heads=4, num_classes=2, pixel_skip=True)
teacher = fit(TeacherTraining(network, optimizer), STEPS)
decm_lightning.save(teacher, "teacher")

samples = {f"teacher, {n} step{'s' * (n > 1)}": teacher.generate(LABELS, steps=n) for n in (1, 4, 25)}
grid(samples)

# %% [markdown]
# ## The student
#
# The student starts as a copy of the teacher, and learns to jump.

# %%
student = fit(Distiller(PretrainedTeacher("teacher"), optimizer=optimizer), STEPS // 3)

samples |= {f"student, {n} step{'s' * (n > 1)}": student.generate(LABELS, steps=n) for n in (1, 2)}
grid(samples)

# %% [markdown]
# Each column starts from the same noise, so the student's images can be compared with those of the teacher at 25 steps,
# pixel by pixel.

# %%
truth = np.stack(samples["teacher, 25 steps"]).astype(float)
distance = {name: float(np.sqrt(np.mean((np.stack(images) - truth) ** 2))) for name, images in samples.items()}
for name, value in distance.items():
    print(f"{name:20} RMS difference from 25 steps {value:6.1f} of 255")

# %% [markdown]
# ## More time
#
# More training helps most: `decm new` plans 25 minutes by default, at 32 x 32 pixels on a CPU. After that come a wider
# or deeper network and smaller patches. On a GPU it plans for 128 x 128 pixels. With several classes the teacher should
# be guided: `Distiller(..., guidance=Guidance(1.5))` trains the student on the guided velocity, at no cost in sampling.
#
#     decm new photos --out my-run --minutes 25
#     decm fit --config my-run/teacher.yaml
#     decm fit --config my-run/student.yaml
#     decm sample my-run/student/checkpoints/last.ckpt --steps 4 --out samples.png
