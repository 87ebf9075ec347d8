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
# # Compare two methods
#
# DE-CM and MeanFlow distill the same digits teacher, with the same number of network evaluations. `decm compare` then
# puts both runs into one report. The runs take less than a minute on one core, so this is a comparison at the start of
# training. docs/results.md has longer ones.

# %%
import io
import os
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["TQDM_DISABLE"] = "1"  # no progress bars

import torch
import yaml
from IPython import display

import decm_lightning
from decm_lightning import Guidance, losses
from decm_lightning.cli import main

torch.set_num_threads(1)
ROOT = Path(decm_lightning.__file__).parents[2]
STEPS = int(os.environ.get("DECM_NOTEBOOK_STEPS", 75))


def decm(*arguments):
    """Run a command of the command line, and hide its output."""
    sys.argv, output = ["decm", *arguments], io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        assert main() == 0, output.getvalue()


# %% [markdown]
# ## Equal cost
#
# The methods need different numbers of network evaluations per training step. `losses.cost` counts them in forward
# passes per sample, where a backward pass counts 2. Each run gets the number of steps that spends the same budget.

# %%
guidance = Guidance(1.25)
fractions = {"batch_fractions": [0.5, 0.25, 0.25]}
objectives = {"de-cm": losses.paper(**fractions), "mean-flow": losses.mean_flow()}

steps = {}
for name, objective in objectives.items():
    passes = losses.cost(objective, guidance.passes)
    steps[name] = round(6 * STEPS / passes.total)
    print(f"{name:10} {steps[name]:4} steps of {passes}")

# %% [markdown]
# ## Two runs
#
# Both runs use the shipped config of digits, with another objective and fewer samples. The learning rate is not tuned
# for either. `decm fit` trains, and `decm test` writes the table of a run.

# %%
config = yaml.safe_load((ROOT / "configs/digits/decm.yaml").read_text())
trainer, model, callbacks = config["trainer"], config["model"]["init_args"], config["trainer"]["callbacks"]
by_class = {callback["class_path"].rpartition(".")[2]: callback for callback in callbacks}
by_class["Evaluation"]["init_args"] |= {
    "test_specs": [f"teacher/euler/{n}" for n in (1, 2, 4)]
    + [f"student/{sampler}/{n}" for sampler in ("mix", "consistency") for n in (1, 2, 4)],
    "test_samples": 200,
}
trainer |= {"callbacks": [by_class[name] for name in ("ModelCheckpoint", "GradientNorms", "Evaluation")]}
trainer |= {"accelerator": "cpu", "limit_val_batches": 0, "log_every_n_steps": 1}
trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
model["teacher"]["init_args"]["path"] = str(ROOT / "weights/digits/teacher")
config["data"]["init_args"]["batch_size"] = 64


def run(name, class_name, arguments):
    """Train and test a student."""
    trainer["max_steps"] = steps[name]
    trainer["logger"]["init_args"] |= {"name": name, "version": ""}
    model["objective"] = {"class_path": f"decm_lightning.losses.{class_name}", "init_args": arguments}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
    decm("fit", "--config", f"{name}.yaml")
    decm("test", "--config", f"{name}.yaml", "--ckpt_path", f"runs/{name}/checkpoints/last.ckpt")


run("de-cm", "paper", fractions)

# %%
run("mean-flow", "mean_flow", {})

# %% [markdown]
# ## The report
#
# `decm compare runs/de-cm runs/mean-flow --out report.html` writes one page. With `report.md` it writes Markdown with
# the figures next to it, which the cells below show.

# %%
decm("compare", "runs/de-cm", "runs/mean-flow", "--out", "report.md")
sections = dict(part.split("\n", 1) for part in Path("report.md").read_text().split("\n## "))


def table(heading):
    """Show a section of the report without its figures."""
    return display.Markdown("\n\n".join(part for part in sections[heading].split("\n\n") if "![" not in part))


display.SVG("report-fd.svg")

# %%
table("Quality: fd")

# %% [markdown]
# A student needs one evaluation per step, and the guided teacher two. Both students are far ahead of the teacher at one
# step, and DE-CM learns it faster than MeanFlow. The cost of the two runs:

# %%
table("Cost")

# %% [markdown]
# Samples at 1, 2 and 4 steps (from top to bottom), from the same noise: DE-CM, then MeanFlow.

# %%
for name in steps:
    display.display(display.Image(f"report-{name}-samples.png", width=500))

# %% [markdown]
# ## Where is a student accurate?
#
# The maps show the error of $u(x_t, t, s)$ against the teacher's trajectories, for every start time $t$ and end time
# $s$: DE-CM, then MeanFlow. DE-CM trains on the edges of the triangle, and MeanFlow on the whole triangle and its
# diagonal.

# %%
for name in steps:
    display.display(display.SVG(f"report-{name}-error-on-the-triangle.svg"))

# %%
table("Error on the triangle")

# %% [markdown]
# The gradient norm of each training step. The methods normalize their losses differently, so the spread of a curve
# matters, not its height.

# %%
display.SVG("report-norms.svg")

# %% [markdown]
# What the runs share, and in which settings they differ:

# %%
table("Differences")
