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
# # Text to image
#
# The stored emoji student turns captions into latents of 8 x 8 x 8, and a small VAE decodes them to 64 x 64 pixels.
# Teacher and student were trained for three hours on one core, so the images are rough. Everything below works in the
# same way for a larger student. The notebook needs the extra `emoji` and the text encoder MiniLM, and runs in less than
# a minute on one core.
#
# The training images are Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0.

# %%
import io
import logging
import os
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["TQDM_DISABLE"] = "1"  # no progress bars

import lightning as L
import torch
from IPython import display
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

import decm_lightning
from decm_lightning import Batch, Distiller, Guidance, losses, samplers
from decm_lightning.data import Conditions
from decm_lightning.demo.emoji import caption, read_emoji
from decm_lightning.evaluation.pretrained import PretrainedModel
from decm_lightning.image_reader import pixels_of
from decm_lightning.image_writer import to_pil, to_uint8
from decm_lightning.teachers import PretrainedTeacher

logging.disable(logging.WARNING)
L.seed_everything(0, verbose=False)
torch.set_num_threads(1)

WEIGHTS = Path(decm_lightning.__file__).parents[2] / "weights/emoji"
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def grid(rows, side=64):
    """Return a PNG with rows of images, and their names on the left."""
    columns = max(map(len, rows.values()))
    sheet = Image.new("RGB", (150 + columns * side, len(rows) * side), "white")
    for y, (name, images) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((0, (y + 0.5) * side), name, "black", anchor="lm", font_size=14)
        for x, image in enumerate(images):
            sheet.paste(image.resize((side - 4, side - 4)), (150 + x * side, y * side))
    file = io.BytesIO()
    sheet.quantize(128).save(file, "PNG")
    return display.Image(file.getvalue())


# %% [markdown]
# ## Captions to images
#
# `generate` takes captions as text, and encodes them with the text encoder that the student was trained with. Pass the
# encoder when you generate often: otherwise each call loads it again.

# %%
student = decm_lightning.load(WEIGHTS / "student")
encoder = student.caption_encoder()
captions = ["winking face", "full moon face", "grapes, fruit", "green square", "purple circle", "red heart, love"]

grid({"2 steps": student.generate(captions, steps=2, encoder=encoder)})

# %% [markdown]
# ## Several steps, the same noise
#
# Sample number i of a seed always starts from the same noise, so the rows differ only in the number of steps.

# %%
grid({f"{n} step{'s' * (n > 1)}": student.generate(captions, steps=n, encoder=encoder) for n in (1, 2, 4, 8)})

# %% [markdown]
# The noise can vary instead, for one caption in each row: `rows` are the numbers of the samples.

# %%
texts = ("winking face", "grapes, fruit")
grid({text: student.generate(text, steps=2, rows=range(8), encoder=encoder) for text in texts})

# %% [markdown]
# Or the caption varies, and all samples start from noise number 0.

# %%
colours = ["red", "orange", "yellow", "green", "blue", "purple", "black", "white"]


def in_all_colours(thing):
    return student.generate([f"{colour} {thing}" for colour in colours], steps=2, rows=[0] * 8, encoder=encoder)


grid({thing: in_all_colours(thing) for thing in ("heart", "circle", "square")})

# %% [markdown]
# ## Guidance
#
# The teacher needs guidance: it is evaluated with and without the caption, and the difference is enlarged. The student
# has learned the guided velocity, so it needs one evaluation per step instead of two. Below, the teacher takes 25 steps
# at several scales. Guidance ends at time 0.7, because near the data the caption adds no information.


# %%
def teacher_images(scale):
    model = PretrainedModel(str(WEIGHTS / "teacher"), Guidance(scale, interval=(0.0, 0.7)))
    field, shape = model.models()["teacher"], student.sample_shape
    x = samplers.generate(field, samplers.euler, encoder(captions), steps=25, shape=shape, rows=range(6))
    return [to_pil(image) for image in to_uint8(student.recorded_coder.decode(x))]


by_scale = {scale: teacher_images(scale) for scale in (1.0, 2.5, 5.0)}
rows = {f"teacher, scale {scale:g}": images for scale, images in by_scale.items()}
grid(rows | {"student, 2 steps": student.generate(captions, steps=2, encoder=encoder)})

# %% [markdown]
# ## A training step on captions
#
# A batch consists of latents and encoded captions. Here are 16 emoji with their names; for your own pairs use
# `data.TextImagePairs`, which encodes images and captions once and stores them. The student in training starts from the
# teacher's weights, with one loss for each edge of the triangle.

# %%
emoji = read_emoji()[:1600:100]
texts = [caption(item.words, 0) for item in emoji]
images = torch.stack([pixels_of(item.file, 64) for item in emoji])
batch = Batch(student.recorded_coder.encode(images / 127.5 - 1), encoder(texts))

teacher = PretrainedTeacher(str(WEIGHTS / "teacher"))
guidance = Guidance(2.5, interval=(0.0, 0.7))
distiller = Distiller(teacher, objective=losses.paper(batch_fractions=(0.5, 0.25, 0.25)), guidance=guidance)
trainer = L.Trainer(accelerator="cpu", max_steps=1, **QUIET)
trainer.fit(distiller, DataLoader([batch], batch_size=None))

print(losses.cost(distiller.objective, guidance.passes))
first = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("loss/")}
for name, value in first.items():
    print(f"{name:22} {value:.3f}")
grid({"": [to_pil(image) for image in images[:8]], " ": [to_pil(image) for image in images[8:]]}, side=40)

# %% [markdown]
# FreeFlow's objective starts every step at noise, so it needs a teacher and captions, but no images.

# %%
Path("captions.txt").write_text("\n".join(captions))
without_images = Distiller(teacher, objective=losses.free_flow(), guidance=guidance)
trainer = L.Trainer(accelerator="cpu", max_steps=1, **QUIET)
trainer.fit(without_images, Conditions(prompts="captions.txt", batch_size=6))
print(f"loss/predictor         {trainer.callback_metrics['loss/predictor']:.3f}")

# %% [markdown]
# Next steps:
#
# - `decm fit --config configs/emoji/decm.yaml` trains the student on all emoji. docs/text-to-image.md explains how to
#   train on your own pairs.
# - `decm sample-prompts weights/emoji/student --prompts captions.txt --steps '[1, 4]' --out emoji.png` generates from a
#   file of captions.
# - `configs/sd35.yaml` distills SD3.5 into a LoRA student; it needs a GPU.
