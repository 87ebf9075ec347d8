"""The README's commands run as they stand, on configs made short."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from decm_lightning import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = {
    r"(max_steps: (&steps )?)\d+": r"\g<1>2",
    r"every_n_train_steps: \d+": "every_n_train_steps: 1",
    r"val_check_interval: \d+": "val_check_interval: 1000",
    r"samples: \d+": "samples: 20",
    r"batch_size: \d+": "batch_size: 16",
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder that looks like a clone, with short configs."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for config in (tmp_path / "configs").rglob("*.yaml"):
        text = config.read_text()
        for pattern, replacement in SHORT.items():
            text = re.sub(pattern, replacement, text)
        config.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_decm_command_runs_in_the_order_of_the_page(workplace, monkeypatch):
    commands = re.findall(r"^ {4}\.venv/bin/(decm .*)$", README, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        assert cli.main() == 0, command
    assert {"digits.png", "shoes.png", "my-teacher"} <= {path.name for path in workplace.iterdir()}


def test_the_python_of_the_page_runs(workplace):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        assert [image.size for image in names["images"]] == [(8, 8)] * 3


def test_every_make_target_of_the_page_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_every_link_of_the_page_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
