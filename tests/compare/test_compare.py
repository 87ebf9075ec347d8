"""decm compare on real runs of a tiny digits network: its page, its numbers, and what it refuses."""

import json
import logging
import re
import shutil
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from decm_lightning import cli, losses, samplers
from decm_lightning.compare import measure
from decm_lightning.compare.runs import Run, read_runs
from decm_lightning.networks import DiT, load, save
from decm_lightning.networks.record import Record
from tests.compare.browser import CHROMIUM, Browser

CONFIG = Path(__file__).parents[2] / "configs/digits/decm.yaml"
SPECS = ["teacher/euler/1", "teacher/euler/2", "student/mix/1", "student/mix/2", "student/consistency/2"]
NAMES = ("model", "sampler", "steps", "options", "nfe")
TABLE = "checkpoints/last.quality.json"
QUICK = ("--triangle", "false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a teacher and two trained and tested runs, runs/paper and runs/facm."""
    place = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    teacher = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    for parameter in teacher.parameters():
        # The last layer begins at 0.
        parameter.data += 0.1 * torch.randn_like(parameter)
    save(teacher, place / "teacher")
    config = yaml.safe_load(CONFIG.read_text())
    trainer, model = config["trainer"], config["model"]["init_args"]
    trainer |= {"max_steps": 12, "log_every_n_steps": 1, "enable_progress_bar": False}
    trainer["callbacks"][-1]["init_args"] |= {"test_specs": SPECS, "test_samples": 20}
    trainer["logger"]["init_args"] |= {"version": ""}
    model["teacher"]["init_args"]["path"] = str(place / "teacher")
    config["data"]["init_args"] |= {"batch_size": 16, "reference_size": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(logging, "raiseExceptions", False)
        for name in ("paper", "facm"):
            model["objective"] = {"class_path": f"decm_lightning.losses.{name}"}
            trainer["logger"]["init_args"]["name"] = name
            Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
            for argv in (["fit"], ["test", "--ckpt_path", f"runs/{name}/checkpoints/last.ckpt"]):
                patch.setattr(sys, "argv", ["decm", argv[0], "--config", f"{name}.yaml", *argv[1:]])
                assert cli.main() == 0
    return place


@pytest.fixture(scope="module")
def page(trained):
    """The page of both runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        patch.setattr(sys, "argv", ["decm", "compare", "runs/paper", "runs/facm", "--out", "report.html"])
        assert cli.main() == 0
    return trained / "report.html"


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """The working directory, with copies of the runs."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def decm(place, monkeypatch, capsys):
    """A function that compares both runs, or other folders: (exit code, out, err)."""

    def run(*argv: str, runs: tuple[str, ...] = ("runs/paper", "runs/facm")) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", "compare", *runs, *argv])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class Tables(HTMLParser):
    """Reads the tables of a page, {heading: [rows of texts]}."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.heading, self.tag = "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_data(self, data):
        if self.tag == "h2":
            self.heading += data.strip()
        if self.tag in ("td", "th"):
            self.tables[self.heading][-1][-1] += data.strip()

    def handle_endtag(self, tag):
        self.tag = ""


def change(run: str, name: str, value: object) -> None:
    file = Path("runs", run, TABLE)
    quality = json.loads(file.read_text())
    if value is None:
        del quality["protocol"][name]
    else:
        quality["protocol"][name] = value
    file.write_text(json.dumps(quality))


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(image)).convert("L"))


def rows_of(run: Path) -> dict[str, dict]:
    rows = json.loads((run / TABLE).read_text())["rows"]
    return {f"{row['model']}/{row['sampler']}/{row['steps']}": row for row in rows}


def test_a_stored_student_has_the_protocol_of_a_new_run(trained):
    """Otherwise a new run cannot be compared with it: run decm test on it again."""
    new, stored = (
        json.loads(path.read_text())["protocol"]
        for path in (trained / "runs/paper" / TABLE, CONFIG.parents[2] / "weights/digits/student/quality.json")
    )
    assert list(stored) == list(new)


def test_every_number_of_the_tables_is_in_the_page(page):
    tables = Tables(page.read_text()).tables
    measured = {name: rows_of(page.parent / "runs" / name) for name in ("paper", "facm")}
    found = {}
    for heading, (head, *rows) in tables.items():
        if heading.startswith("Quality"):
            for spec, nfe, *values in rows:
                assert nfe == f"{measured['paper'][spec]['nfe']:.4g}"
                found |= {(name, spec, heading.split()[1]): v for name, v in zip(head[2:], values, strict=True)}
    expected = {
        (name, spec, metric): f"{value:.4g}"
        for name, rows in measured.items()
        for spec, row in rows.items()
        for metric, value in row.items()
        if metric not in NAMES
    }
    # fd, kid, and the two paired columns.
    assert len(expected) == 2 * len(SPECS) * 4
    assert found == expected
    tested = [json.loads((page.parent / "runs" / name / TABLE).read_text()) for name in measured]
    floors = [row for content in tested for row in content["floors"]]
    assert [row[3] for row in tables["Floors"][1:]] == [f"{row['fd']:.4g}" for row in floors]


def test_the_page_has_each_part_and_no_reference_to_another_file(page):
    text = page.read_text()
    tables = Tables(text).tables
    assert [row[0] for row in tables["Gradient norms"][1:]] == ["paper", "facm"]
    assert [row[2] for row in tables["Cost"][1:]] == ["12", "12"]
    assert dict(map(tuple, tables["Protocol of all runs"]))["generated images"] == "20"
    settings = {row[0]: row[1:] for row in tables["Differences"]}
    assert settings["model.objective"] == ["decm_lightning.losses.paper", "decm_lightning.losses.facm"]
    assert "seed_everything" not in settings
    assert text.count("data:image/svg+xml;base64,") == 7
    assert text.count("data:image/png;base64,") == 2
    assert not re.findall(r"(?:src|href)=.(?!data:)|url\(|@import|<script", text)
    assert "not measured" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_fits_a_desktop_and_a_phone_in_light_and_dark_mode(page, tmp_path):
    browser = Browser(tmp_path)
    try:
        colors = {}
        for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
            browser.open(page, width, scheme)
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("[...document.images].every(image => image.naturalWidth > 0)")
            assert browser.value("[...document.images].every(image => image.clientWidth > 250)")
            colors[scheme] = pixels(browser.screenshot())
            assert browser.complaints() == []
            assert {url.partition(":")[0] for url in browser.requests()} == {"file", "data"}
            assert [url for url in browser.requests() if url.startswith("file")] == [page.as_uri()]
        # The background, and the text of the page and of its plots.
        assert colors["light"].max() == 255
        assert np.median(colors["light"]) > 240
        assert np.median(colors["dark"]) < 40
        # A phone scrolls the tables, not the page.
        assert browser.value(
            "[...document.querySelectorAll('table')].some(each => each.scrollWidth > each.clientWidth)"
        )
    finally:
        browser.close()


def test_markdown_links_files_next_to_it(decm):
    code, out, _ = decm("--out", "docs/report.md")
    assert code == 0
    text = Path("docs/report.md").read_text()
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(links) == 9
    assert {str(Path("docs", link)) for link in links} < set(out.removeprefix("wrote ").strip().split(", "))
    for link in links:
        content = Path("docs", link).read_bytes()
        assert b"prefers-color-scheme" in content if link.endswith("svg") else Image.open(BytesIO(content)).size[0]
    for row in rows_of(Path("runs/facm")).values():
        assert f"{row['fd']:.4g} |" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 7),
        ("generated images", 21),
        ("feature network", "another"),
        ("guidance", "none"),
        ("pixels", None),
        ("paired", "the teacher of another day"),
        ("reference sha256", "00ff"),
        ("times (t -> s)", "student/mix/2: 0 -> 0.6, 0.6 -> 1"),
    ],
)
def test_other_protocols_are_refused(name, value, decm):
    change("facm", name, value)
    code, _, err = decm(*QUICK)
    assert code == 2
    assert name.partition(" (")[0] in err
    assert str(value if value is not None else "not given").partition(": ")[2] in err
    assert "facm" in err
    assert err.count("\n") == 1
    assert not Path("report.html").exists()


def test_what_does_not_change_the_values_may_differ(decm):
    for name, value in (("device", "cuda (H100)"), ("versions", "torch 9"), ("processes", 8), ("weights sha256", "00")):
        change("facm", name, value)
    shutil.move("runs/facm", "moved")
    code, out, _ = decm(*QUICK, "--out", "new/report.html", runs=("runs/paper", "moved"))
    assert (code, out) == (0, "wrote new/report.html\n")
    settings = {row[0]: row[1:] for row in Tables(Path("new/report.html").read_text()).tables["Differences"]}
    assert settings["versions"][1] == "torch 9"
    assert "cuda (H100)" in settings["device"]


def test_runs_with_other_specs_are_compared(decm):
    """A line of the protocol about a spec or the teacher only concerns runs that measured it."""
    file = Path("runs/facm", TABLE)
    quality = json.loads(file.read_text())
    quality["rows"] = [row for row in quality["rows"] if row["sampler"] == "mix"]
    del quality["protocol"]["paired"]
    quality["protocol"] |= {"guidance": "none", "times (t -> s)": "student/mix/1: 0 -> 1; student/mix/9: 0 -> 1"}
    file.write_text(json.dumps(quality))
    assert decm(*QUICK)[0] == 0
    table = Tables(Path("report.html").read_text()).tables["Quality: kid"]
    assert [row[3] for row in table if row[0] == "teacher/euler/1"] == ["-"]


@pytest.mark.parametrize(
    ("runs", "named"),
    [
        (("runs/paper",), ["two", "runs/paper"]),
        (("runs/paper", "runs/paper/"), ["different"]),
        (("runs/paper", "runs/none"), ["runs/none"]),
        (("runs/paper", "runs"), ["runs", "config.yaml", "config.json"]),
        (("runs/paper", "untested"), ["untested", "quality.json", "decm test untested/checkpoints/last.ckpt"]),
        (("runs/paper", "damaged"), ["damaged/checkpoints/last.quality.json"]),
        (("runs/paper", "empty"), ["empty", "quality.json", "rows"]),
        (("runs/paper", "bare"), ["bare/checkpoints/last.ckpt"]),
        (("runs/paper", "student"), ["student", "quality.json", "decm test student"]),
    ],
)
def test_other_folders_are_refused_in_one_line(runs, named, decm):
    for name in ("untested", "damaged", "empty", "bare"):
        shutil.copytree("runs/facm", name)
    Path("untested", TABLE).unlink()
    shutil.rmtree("bare/checkpoints")
    Path("damaged", TABLE).write_text('{"protocol": ')
    Path("empty", TABLE).write_text('{"protocol": {}, "rows": []}')
    network = load("runs/facm/checkpoints/last.ckpt")
    network.record = None
    save(network, "student")
    code, _, err = decm(*QUICK, runs=runs)
    assert code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in named)


@pytest.mark.parametrize("argv", [["--out", "report.pdf"], ["--device", "quantum"]])
def test_invalid_options_are_refused(argv, decm):
    code, _, err = decm(*argv)
    assert (code, err.count("\n")) == (2, 1)
    assert argv[1] in err


def test_an_exported_folder_is_compared_by_its_record(decm):
    save(load("runs/facm/checkpoints/last.ckpt"), "student")
    assert decm(runs=("runs/facm", "student"))[0] == 0
    text = Path("report.html").read_text()
    tables = Tables(text).tables
    for name in ("Cost", "Error on the triangle"):
        assert tables[name][-2][1:] == tables[name][-1][1:]
    assert re.findall("student: not measured, because .*", text)[0].count("grad_norm") == 1
    images = re.findall(r"png;base64,([^\"]+)", text)
    assert images[0] == images[1]


def test_the_last_tested_checkpoint_of_a_run_is_compared(decm):
    place = Path("runs/facm/checkpoints")
    for name in ("ckpt", "quality.json"):
        (place / f"last.{name}").rename(place / f"step=12.{name}")
    assert decm(*QUICK)[0] == 0
    assert Tables(Path("report.html").read_text()).tables["Quality: fd"][0][3] == "facm"


def test_what_cannot_be_measured_has_a_reason(decm):
    file = Path("runs/facm/config.yaml")
    config = yaml.safe_load(file.read_text())
    config["model"]["init_args"]["teacher"]["init_args"]["path"] = "nowhere"
    sys.modules.pop("antigravity", None)
    config["model"]["init_args"]["objective"] = {"class_path": "antigravity.fly"}
    file.write_text(yaml.safe_dump(config))
    for events in Path("runs/facm").glob("events*"):
        events.unlink()
    assert decm()[0] == 0
    text = Path("report.html").read_text()
    reasons = re.findall("facm: not measured, because (.*?)</p>", text)
    assert len(reasons) == 3
    assert all(
        word in reason for word, reason in zip(("GradientNorms", "antigravity", "nowhere"), reasons, strict=True)
    )
    # A file must not decide which code runs.
    assert "antigravity" not in sys.modules
    assert text.count("data:image/png;base64,") == 2


def run_of(folder: str) -> Run:
    return read_runs([folder, "runs/facm"])[0]


def test_samples_are_those_of_the_network(place):
    found = np.asarray(Image.open(BytesIO(measure.samples(run_of("runs/paper"))[0])))
    network = load("runs/paper/checkpoints/last.ckpt")
    rows = [
        np.hstack([np.pad(i, 1, constant_values=128) for i in network.generate(steps=n, sampler="mix")])
        for n in (1, 2, 4)
    ]
    assert np.array_equal(found, np.vstack(rows))


def test_the_cost_is_that_of_the_objective(place):
    guided = losses.cost(losses.paper().for_run(12), 2.0).total
    assert measure.cost(run_of("runs/paper"))[1]["passes per step"] == pytest.approx(guided)
    config = yaml.safe_load(Path("runs/paper/config.yaml").read_text())
    config["model"]["init_args"]["teacher"] = None
    Path("runs/paper/config.yaml").write_text(yaml.safe_dump(config))
    free = losses.cost(losses.paper().for_run(12), 2.0)
    assert measure.cost(run_of("runs/paper"))[1]["passes per step"] == pytest.approx(guided - free.teacher)


def test_gradient_norms_are_those_of_the_events(place):
    for events in Path("runs/paper").glob("events*"):
        events.unlink()
    for first in (0, 500):
        # A resumed run has several files.
        with SummaryWriter("runs/paper") as writer:
            for step in range(first, first + 500):
                writer.add_scalar("grad_norm/total", 50.0 if step == 333 else 1.0, step)
    points = measure.gradient_norms(run_of("runs/paper"))
    assert [step for step, _ in points] == list(range(1000))
    assert [point for point in points if point[1] != 1] == [(333, 50)]


def test_the_error_on_the_triangle_is_zero_where_the_student_is_exact(place, trained):
    """Without guidance, the teacher as a student is exact on the diagonal. Elsewhere Euler steps give its error."""
    config = yaml.safe_load(Path("runs/paper/config.yaml").read_text())
    config["model"]["init_args"]["guidance"]["scale"] = 1.0
    quality = json.loads(Path("runs/paper", TABLE).read_text())
    network = load(trained / "teacher")
    network.record = Record(steps=1, quality=quality, config=config)
    save(network, "copy")
    errors = measure.triangle_error(run_of("copy"))
    assert errors.isfinite().sum() == 10 * 11 // 2 + 10
    assert errors.diagonal()[:-1].max() < 1e-6
    rows = range(measure.ROWS)
    labels = torch.tensor(rows) % 10
    options = {"shape": network.sample_shape, "rows": rows}
    fine, one = (samplers.generate(network, samplers.euler, labels, n, **options) for n in (500, 1))
    assert errors[0, -1].item() == pytest.approx((one - fine).square().mean().sqrt().item(), rel=0.02)
