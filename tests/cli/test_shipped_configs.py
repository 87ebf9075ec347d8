"""The configs of the package: found by name, listed and copied; the missing weights of a shipped config."""

import subprocess
import sys
from pathlib import Path

import pytest

from decm_lightning import cli
from decm_lightning.cli.shipped_configs import shipped_names, with_shipped_configs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def decm(tmp_path, monkeypatch, capsys):
    """A function that runs one command in an empty folder: (exit code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        return code, *capsys.readouterr()

    return run


def test_the_list_has_every_config_that_needs_no_benchmarks(decm):
    code, out, _ = decm("configs")
    files = {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT / "configs").as_posix() for path in files}
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} == {
        name for name in expected if not name.startswith(("compare/", "rehearsal/"))
    }
    assert "Fashion-MNIST" in next(line for line in out.splitlines() if line.startswith("fashion/teacher.yaml "))


@pytest.mark.parametrize("name", ["digits/decm.yaml", "configs/digits/decm.yaml"])
def test_a_copy_is_the_config_and_goes_before_it(name, decm):
    assert decm("configs", name, "emoji/captions.txt", "--out", ".")[:2] == (
        0,
        "wrote digits/decm.yaml\nwrote emoji/captions.txt\n",
    )
    assert Path("digits/decm.yaml").read_bytes() == (ROOT / "configs/digits/decm.yaml").read_bytes()
    assert with_shipped_configs(["--config", "digits/decm.yaml"]) == ["--config", "digits/decm.yaml"]


def test_no_file_is_replaced(decm):
    Path("digits").mkdir()
    Path("digits/decm.yaml").write_text("mine")
    code, _, err = decm("configs", "digits/teacher.yaml", "digits/decm.yaml")
    assert (code, "digits/decm.yaml" in err) == (2, True)
    assert Path("digits/decm.yaml").read_text() == "mine"
    assert not Path("digits/teacher.yaml").exists()


def test_a_misspelled_name_is_answered_by_the_closest(decm):
    code, _, err = decm("configs", "digits/dcm.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith("did you mean digits/decm.yaml?\n")


@pytest.mark.parametrize("option", [["--config", "{}"], ["-c", "{}"], ["--config={}"], ["-c={}"]])
@pytest.mark.parametrize("name", ["digits/decm.yaml", "configs/digits/decm.yaml"])
def test_a_config_is_found_by_its_name(option, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = with_shipped_configs([word.format(name) for word in option])
    assert Path(resolved[-1].removeprefix("--config=").removeprefix("-c=")).samefile(ROOT / "configs/digits/decm.yaml")


@pytest.mark.parametrize(
    "argv", [["--config", "gone.yaml"], ["--config"], ["--out", "digits/decm.yaml"], ["sd35.yaml"]]
)
def test_all_else_stays(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_shipped_configs(argv) == argv


def test_missing_weights_of_a_shipped_config_come_with_the_remedy(decm):
    code, _, err = decm("fit", "--config", "digits/decm.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "weights/digits/teacher" in err
    assert "decm fit --config digits/teacher.yaml" in err
    assert "--model.init_args.teacher.init_args.path" in err


def test_other_missing_weights_do_not(decm):
    arguments = ["--config", "digits/decm.yaml", "--model.init_args.teacher.init_args.path", "my/own/teacher"]
    code, _, err = decm("fit", *arguments)
    assert (code, "my/own/teacher" in err, "digits/teacher.yaml" in err) == (2, True, False)


def test_names_are_those_of_files():
    assert all((ROOT / "configs" / name).is_file() for name in shipped_names())


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "decm_lightning", "--help"], capture_output=True, text=True, check=True
    )
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
