"""The wheel: small, and complete without the checkout."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIT = ["--config", "digits/teacher.yaml", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
FIT += [
    "--trainer.limit_val_batches",
    "0",
    "--data.init_args.batch_size",
    "16",
    "--trainer.enable_progress_bar",
    "false",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout's tracked files: building leaves files in its source."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        f"git ls-files -z src configs pyproject.toml README.md LICENSE | xargs -0 cp -d --parents -t {folder}",
        shell=True, check=True, cwd=ROOT,
    )  # fmt: skip
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist"]
    subprocess.run(pip, check=True, cwd=folder)
    (file,) = (folder / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """An environment with the wheel, and with the packages of this environment except for this one."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # pip must not see these packages. Their own .pth files, such as that of an editable install, have no effect here.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(clean, folder, *argv):
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.run(
        [clean / "bin" / argv[0], *argv[1:]], capture_output=True, text=True, check=False, cwd=folder, env=environment
    )


@pytest.mark.slow
def test_the_wheel_is_under_a_megabyte(wheel):
    assert wheel.stat().st_size < 1_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert {"decm_lightning/py.typed", "decm_lightning/configs/digits/decm.yaml"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "decm_lightning/configs/compare"))]


@pytest.mark.slow
def test_the_installed_package_works_without_a_checkout(clean, tmp_path):
    where = run(clean, tmp_path, "python", "-c", "import decm_lightning; print(decm_lightning.__file__)")
    assert where.stdout.startswith(str(clean)), where
    version = run(clean, tmp_path, "decm", "--version")
    assert version.stdout == run(clean, tmp_path, "python", "-m", "decm_lightning", "--version").stdout != ""
    assert "digits/teacher.yaml" in run(clean, tmp_path, "decm", "configs").stdout
    assert "complete" in run(clean, tmp_path, "decm", "completion", "bash").stdout
    fit = run(clean, tmp_path, "decm", "fit", *FIT)
    assert fit.returncode == 0, fit.stderr
    assert list(tmp_path.glob("runs/**/last.ckpt"))
