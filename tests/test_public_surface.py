"""What `import decm_lightning` gives, when it is imported, and what a type checker knows of it."""

import ast
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest

import decm_lightning

PRESETS = [
    "alpha_flow",
    "ayf_emd",
    "ayf_lmd",
    "consistency_and_flow_matching",
    "consistency_only",
    "discrete_consistency",
    "end_identity",
    "facm",
    "flow_matching_only",
    "free_flow",
    "lagrangian",
    "mean_flow",
    "paper",
    "scm",
    "shortcut",
    "split_mean_flow",
    "whole_triangle",
]
TYPES = [
    "Batch",
    "Captions",
    "CorrectedDistiller",
    "Distiller",
    "Guidance",
    "Network",
    "Objective",
    "Teacher",
    "TeacherTraining",
]
NAMES = [*TYPES, *PRESETS, "load", "save", "euler", "consistency", "flow_map", "mix", "__version__"]
TYPED = """
from decm_lightning import Distiller, Network, __version__, load, mix, paper

student: Network = load("folder")
version: str = __version__
load(3)
mix(student)
paper(rate=2)
Distiller()
"""


def test_dir_lists_the_public_names_and_no_other():
    assert dir(decm_lightning) == sorted(NAMES)
    assert all(getattr(decm_lightning, name) is not None for name in NAMES)
    with pytest.raises(AttributeError, match="'sinus'"):
        decm_lightning.sinus  # noqa: B018


def test_the_version_is_that_of_the_installed_package():
    assert decm_lightning.__version__ == metadata.version("decm-lightning")


def test_a_type_checker_sees_the_same_objects():
    """The imports under TYPE_CHECKING lead to what the lazy access returns."""
    tree = ast.parse(Path(decm_lightning.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: getattr(import_module(node.module), alias.name) for node in imports for alias in node.names}
    assert sorted([*seen, "__version__"]) == sorted(NAMES)
    assert all(getattr(decm_lightning, name) is value for name, value in seen.items())


@pytest.mark.slow
def test_mypy_finds_wrong_arguments(tmp_path):
    """One error in each of the last four lines, and none before: nothing is Any. A minute without mypy's cache."""
    file = tmp_path / "typed.py"
    file.write_text(TYPED)
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-m", "mypy", "--strict", file], capture_output=True, text=True, cwd=root)
    lines = [line.split(":")[1] for line in found.stdout.splitlines() if ": error:" in line]
    assert lines == ["6", "7", "8", "9"], found.stdout


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import decm_lightning; dir(decm_lightning)", ["torch", "lightning", "diffusers"]),
        ("import decm_lightning; decm_lightning.__version__", ["torch", "lightning", "diffusers"]),
        ("from decm_lightning import load, save, Network, Batch, Captions, Guidance", ["lightning", "diffusers"]),
        ("from decm_lightning import Objective, Teacher, paper, mix", ["lightning", "diffusers"]),
        ("from decm_lightning.cli import sample, sample_prompts, app", ["lightning", "torchmetrics", "diffusers"]),
    ],
)
def test_imports_are_lazy(statement, absent):
    command = f"{statement}; import sys; print(*(name for name in {absent} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
