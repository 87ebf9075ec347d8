"""The README's commands run as they stand, on configs made short."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from decm_lightning import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")} | {"README.md": README}
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


@pytest.mark.parametrize(
    ("page", "count", "written"),
    [
        ("README.md", 4, {"digits.png", "shoes.png", "runs"}),
        ("training.md", 4, {"my-teacher", "runs"}),
        ("text-to-image.md", 1, {"emoji.png"}),
    ],
)
def test_every_indented_decm_command_runs_in_the_order_of_the_page(page, count, written, workplace, monkeypatch):
    commands = re.findall(r"^ {4}(?:\.venv/bin/)?(decm .*)$", PAGES[page], re.MULTILINE)
    # tests/cli/test_new.py runs the commands of an own folder of images.
    commands = [command for command in commands if "my-run" not in command]
    assert len(commands) == count
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        assert cli.main() == 0, command
    assert written <= {path.name for path in workplace.iterdir()}


@pytest.mark.parametrize("name", ["loss", "sampler", "data", "metric"])
def test_the_commands_in_an_example_run_next_to_it(name, workplace, monkeypatch):
    """`decm score` reads the folders that the last two lines make."""
    for file in (ROOT / "examples").glob("*.py"):
        shutil.copy(file, workplace)
    text = (ROOT / "examples" / f"extend_{name}.py").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^ {4}(decm .*)$", text, re.MULTILINE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    if name == "metric":
        for folder in ("real", "samples"):
            (workplace / folder).mkdir()
            for k in range(4):
                Image.effect_noise((8, 8), 20 * k).save(workplace / folder / f"{k}.png")
    assert cli.main() == 0
    expected = {"sampler": "samples.png", "metric": "samples-quality/quality.md"}.get(name, "runs")
    assert (workplace / expected).exists()


def test_the_python_of_the_page_runs(workplace):
    generate, train = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(generate, names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 3
    exec(re.sub(r"max_steps=\d+", "max_steps=2", train), names)
    assert names["distiller"].trainer.global_step == 2


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_of_a_page_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)|^ {4}make ([a-z-]+)", PAGES[page], re.MULTILINE)) - {("", "")} <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[page])
    assert all((folder / link).exists() for link in links), links
