"""`decm test` and `decm tune-guidance` on a checkpoint, an exported folder, a public file and a model of diffusers."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

from decm_lightning import cli
from decm_lightning.networks import DiT, load, save

ROOT = Path(__file__).parents[2]
SPECS = ["teacher/euler/2", "student/mix/1", "student/mix/2"]
GUIDED = {"scale": 2.0}


def config() -> dict:
    evaluation = {"features": "decm_lightning.demo.DigitsFeatures", "specs": SPECS, "samples": 20}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
        {"class_path": "decm_lightning.evaluation.Evaluation", "init_args": evaluation},
    ]
    teacher = {"class_path": "decm_lightning.teachers.PretrainedTeacher", "init_args": {"path": "teacher"}}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return {
        "trainer": {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "callbacks": callbacks, **quiet},
        "model": {
            "class_path": "decm_lightning.Distiller",
            "init_args": {"teacher": teacher, "guidance": GUIDED, "objective": "decm_lightning.losses.end_identity"},
        },
        "data": {"class_path": "decm_lightning.data.Digits", "init_args": {"batch_size": 16, "reference_size": 64}},
    }


def run(*argv: object) -> int:
    before = sys.argv
    sys.argv = ["decm", *map(str, argv)]
    try:
        return cli.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A folder with config.yaml, a random teacher, and the run of a student of one step."""
    folder = tmp_path_factory.mktemp("any")
    torch.manual_seed(0)
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10, end_time=False)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save(network, folder / "teacher")
    (folder / "config.yaml").write_text(yaml.safe_dump(config()))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run("fit", "--config", "config.yaml") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(run_folder, monkeypatch) -> Path:
    monkeypatch.chdir(run_folder)
    # Lightning's log handler keeps the standard error of the first test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    return run_folder


CHECKPOINT = "lightning_logs/version_0/checkpoints/last.ckpt"


def rows(place: str, name: str = "quality.json") -> dict[str, dict]:
    content = json.loads((Path(place) / name).read_text())
    return {f"{row['model']}/{row['sampler']}/{row['steps']}": row for row in content["rows"]}


def protocol(place: str) -> dict:
    return json.loads((Path(place) / "quality.json").read_text())["protocol"]


@pytest.fixture
def expected(folder, tmp_path) -> dict[str, dict]:
    """The table of the checkpoint with the config and path on the command line."""
    assert run("test", "--config", "config.yaml", "--ckpt_path", CHECKPOINT, "--out", tmp_path / "long") == 0
    return rows(tmp_path / "long")


def test_a_checkpoint_alone_has_the_table_of_its_config_next_to_it(folder, expected, capsys):
    before = set(Path().rglob("*"))
    capsys.readouterr()
    assert run("test", CHECKPOINT) == 0
    out = capsys.readouterr().out
    place = Path(CHECKPOINT).parent
    assert rows(place, "last.quality.json") == expected
    assert set(expected) == set(SPECS)
    written = {"last.quality.md", "last.quality.json", "last.samples.png"}
    assert {file.name for file in set(Path().rglob("*")) - before} == written
    assert (out.count("| fd "), "Test metric" in out) == (1, False)


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_evaluating_a_checkpoint_begins_no_run(command, folder, tmp_path, capsys):
    """Lightning's logger would get a new folder with the config and nothing else."""
    before = set(Path().rglob("*"))
    writer = [
        *("--trainer.callbacks+", "decm_lightning.evaluation.SampleWriter", "--trainer.callbacks.samples", 3),
        *("--trainer.callbacks.folder", tmp_path, "--trainer.callbacks.spec", "student/mix/1"),
    ]
    options = writer if command == "predict" else ("--trainer.limit_val_batches", 1)
    assert run(command, "--config", "config.yaml", "--ckpt_path", CHECKPOINT, *options) == 0
    assert set(Path().rglob("*")) == before
    assert len(list(tmp_path.glob("*.png"))) == (3 if command == "predict" else 0)


def test_a_checkpoint_takes_overrides_and_another_folder(folder, tmp_path):
    options = ("--data.init_args.reference_size", 50, "--guidance", "{scale: 1}", "--out", tmp_path / "out")
    assert run("test", CHECKPOINT, *options) == 0
    found = protocol(tmp_path / "out")
    assert (found["real images"], found["guidance"]) == (50, "none")
    assert rows(tmp_path / "out")["teacher/euler/2"]["nfe"] == 2


def test_an_exported_student_needs_its_record_alone(folder, expected, tmp_path):
    student = load(CHECKPOINT)
    save(student, tmp_path / "student")
    content = torch.load(CHECKPOINT, weights_only=True)
    record = {"config": yaml.safe_load(content["config"]), "steps": 1}
    # The teacher is not needed.
    record["config"]["model"]["init_args"]["teacher"]["init_args"]["path"] = "gone"
    (tmp_path / "student/record.json").write_text(json.dumps(record))
    assert run("test", tmp_path / "student") == 0
    assert rows(tmp_path / "student") == {name: row for name, row in expected.items() if "student" in name}
    assert protocol(tmp_path / "student")["weights"] == "student: as loaded"
    assert protocol(tmp_path / "student")["weights sha256"] == student.identity()


def test_a_model_may_be_named_by_ckpt_path(folder, expected, tmp_path):
    save(load(CHECKPOINT), tmp_path / "student")
    assert run("test", "--config", "config.yaml", "--ckpt_path", tmp_path / "student") == 0
    assert rows(tmp_path / "student") == expected


def test_an_exported_student_is_measured_next_to_its_recorded_teacher_if_that_is_unchanged(folder, expected, tmp_path):
    student = load(CHECKPOINT)
    save(student, tmp_path / "student")
    content = torch.load(CHECKPOINT, weights_only=True)
    record = content["record"] | {"config": yaml.safe_load(content["config"])}
    assert record["teacher"]["name"] == "teacher"
    (tmp_path / "student/record.json").write_text(json.dumps(record))
    assert run("test", tmp_path / "student") == 0
    assert rows(tmp_path / "student") == expected
    record["teacher"]["identity"] = "0" * 16
    (tmp_path / "student/record.json").write_text(json.dumps(record))
    assert run("test", tmp_path / "student") == 0
    assert rows(tmp_path / "student") == {name: row for name, row in expected.items() if "student" in name}


def test_a_teacher_is_measured_with_the_guidance_of_the_command_line(folder, expected, tmp_path):
    tables = {}
    for name, options in {"config": (), "none": ("--guidance", "{scale: 1.0}")}.items():
        assert run("test", "teacher", "--config", "config.yaml", "--out", tmp_path / name, *options) == 0
        tables[name] = rows(tmp_path / name)
    assert tables["config"] == {"teacher/euler/2": expected["teacher/euler/2"]}
    assert tables["config"]["teacher/euler/2"]["nfe"] == 4
    assert tables["none"]["teacher/euler/2"]["nfe"] == 2
    assert tables["none"]["teacher/euler/2"]["fd"] != tables["config"]["teacher/euler/2"]["fd"]
    assert protocol(tmp_path / "none")["guidance"] == "none"


def test_a_public_file_has_the_table_of_the_same_network(folder, expected, tmp_path):
    torch.save({"ema": load("teacher").state_dict()}, tmp_path / "public.pt")
    assert run("test", tmp_path / "public.pt", "--config", "config.yaml") == 0
    assert rows(tmp_path, "public.quality.json")["teacher/euler/2"]["fd"] == pytest.approx(
        expected["teacher/euler/2"]["fd"], abs=1e-6
    )


def test_a_model_of_diffusers_is_guided(folder, tmp_path):
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "norm_num_groups": 2}
    model = DiTTransformer2DModel(
        **sizes, sample_size=8, patch_size=4, in_channels=1, out_channels=1, num_embeds_ada_norm=10
    )
    model.save_pretrained(tmp_path / "model")
    assert run("test", tmp_path / "model", "--config", "config.yaml", "--guidance", "{scale: 1.5, limit: 0.1}") == 0
    assert rows(tmp_path / "model")["teacher/euler/2"]["nfe"] == 4
    assert "limit 0.1" in protocol(tmp_path / "model")["guidance"]


def test_classes_of_other_packages_are_imported_only_if_trusted(folder, tmp_path, capsys):
    (folder / "own_data.py").write_text(
        "from decm_lightning.data import Digits\n\nprint('imported')\n\n\nclass Own(Digits):\n    pass\n"
    )
    content = torch.load(CHECKPOINT, weights_only=True)
    saved = yaml.safe_load(content["config"])
    saved["data"]["class_path"] = "own_data.Own"
    torch.save(content | {"config": yaml.safe_dump(saved)}, tmp_path / "own.ckpt")
    capsys.readouterr()
    assert run("test", tmp_path / "own.ckpt") == 2
    said = capsys.readouterr()
    assert ("own_data.Own" in said.err, "--trust" in said.err, said.out) == (True, True, "")
    assert run("test", tmp_path / "own.ckpt", "--trust", "true") == 0
    assert "imported" in capsys.readouterr().out
    # The user's own config needs no trust.
    (folder / "own.yaml").write_text(yaml.safe_dump(saved))
    assert run("test", CHECKPOINT, "--config", "own.yaml", "--out", tmp_path / "out") == 0


def test_specs_of_other_models_are_replaced_by_the_defaults(folder, tmp_path):
    options = (
        "--trainer.callbacks",
        "decm_lightning.evaluation.Evaluation",
        "--trainer.callbacks.specs",
        "[student/mix/1]",
    )
    options += ("--trainer.callbacks.features", "decm_lightning.demo.DigitsFeatures")
    options += ("--trainer.callbacks.samples", 10, "--out", tmp_path)
    assert run("test", "teacher", "--config", "config.yaml", *options) == 0
    assert set(rows(tmp_path)) == {"teacher/euler/50"}


TUNE = ("--config", "config.yaml", "--samples", 20, "--steps", 2)


def test_the_best_guidance_is_found_and_a_search_resumes(folder, tmp_path, monkeypatch, capsys):
    from decm_lightning.evaluation import guidance_search

    monkeypatch.setattr(guidance_search.GuidanceSearch, "_measured", counted := _Counting())
    options = ("--out", tmp_path, "--scales", "[1, 2]", "--limits", "[null, 0.3]")
    counted.stop_at = 2
    with pytest.raises(KeyError):
        run("tune-guidance", "teacher", *TUNE, *options)
    cells = json.loads((tmp_path / "guidance.json").read_text())["cells"]
    assert [cell["scale"] for cell in cells] == [1, 2]
    counted.stop_at = None
    capsys.readouterr()
    assert run("tune-guidance", "teacher", *TUNE, *options) == 0
    assert counted.measured == [(1, None), (2, None), (2, 0.3)]
    cells = json.loads((tmp_path / "guidance.json").read_text())["cells"]
    best = min(cells, key=lambda cell: cell["fd"])
    limit = "null" if best["limit"] is None else best["limit"]
    line = f"guidance: {{scale: {best['scale']}, limit: {limit}, interval: [0.0, 1.0]}}"
    out = capsys.readouterr().out
    assert (line in out, out.count("| fd ")) == (True, 1)
    assert yaml.safe_load(line)["guidance"]["scale"] == best["scale"]
    assert line in (tmp_path / "guidance.md").read_text()
    assert (tmp_path / "guidance.png").stat().st_size > 1000
    # A cell has the value of `decm test` with its guidance.
    test = ("--trainer.callbacks.samples", 20, "--guidance", "{scale: 2, limit: 0.3}", "--out", tmp_path / "test")
    assert run("test", "teacher", "--config", "config.yaml", *test) == 0
    assert rows(tmp_path / "test")["teacher/euler/2"]["fd"] == pytest.approx(cells[2]["fd"], abs=1e-9)


class _Counting:
    """Measures cells until one is reached, and records them."""

    def __init__(self) -> None:
        from decm_lightning.evaluation.guidance_search import GuidanceSearch

        self.plain = GuidanceSearch._measured
        self.measured: list[tuple] = []
        self.stop_at: int | None = None

    def __get__(self, search, cls):
        def measured(trainer, guidance):
            if len(self.measured) == self.stop_at:
                raise KeyError("stopped")
            self.measured.append((guidance.scale, guidance.limit))
            return self.plain(search, trainer, guidance)

        return measured


@pytest.fixture
def bad(folder, tmp_path) -> Path:
    content = torch.load(CHECKPOINT, weights_only=True)

    def write(name: str, changed: dict | None) -> None:
        changed_content = {key: value for key, value in content.items() if key != "config"}
        if changed is not None:
            changed_content["config"] = yaml.safe_dump(yaml.safe_load(content["config"]) | changed)
        torch.save(changed_content, tmp_path / name)

    latents = {"class_path": "decm_lightning.data.ImageNetLatents", "init_args": {"folder": "/gone/latents"}}
    write("latents.ckpt", {"data": latents})
    write("foreign.ckpt", {"data": {"class_path": "somewhere.Data"}})
    write("plain.ckpt", None)
    student = load(CHECKPOINT)
    student.record = None
    save(student, tmp_path / "student")
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured/guidance.json").write_text(json.dumps({"settings": {"samples": 7}, "cells": []}))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/guidance.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["test", "{bad}/latents.ckpt"], ["gone/latents", "data.init_args.folder"]),
        (["test", "{bad}/foreign.ckpt"], ["somewhere.Data"]),
        (["test", "{bad}/plain.ckpt"], ["plain.ckpt", "--config"]),
        (["test", "{bad}/student"], ["student", "--config"]),
        (["test", "gone.ckpt"], ["gone.ckpt"]),
        (["test", "{bad}/student", "--config", "config.yaml", "--guidance", "{scale: 2}"], ["student", "--guidance"]),
        (["test", "teacher", "--config", "config.yaml", "--guidance", "{scale: -1}"], ["-1"]),
        (["test"], ["--config"]),
        (["tune-guidance", "{bad}/student", *TUNE], ["student", "teacher"]),
        (["tune-guidance", CHECKPOINT, *TUNE], ["last.ckpt", "student"]),
        (["tune-guidance", "--config", "config.yaml"], ["teacher"]),
        (["tune-guidance", "teacher", *TUNE, "--scales", "[]", "--out", "{bad}/x"], ["scale"]),
        (["tune-guidance", "teacher", *TUNE, "--limits", "[0]", "--out", "{bad}/x"], ["limit", "0"]),
        (["tune-guidance", "teacher", *TUNE, "--samples", "1", "--out", "{bad}/x"], ["samples", "1"]),
        (["tune-guidance", "teacher", *TUNE, "--out", "{bad}/measured"], ["guidance.json", "7", "20"]),
        (["tune-guidance", "teacher", *TUNE, "--out", "{bad}/damaged"], ["guidance.json", "damaged"]),
    ],
)
def test_bad_input_is_one_line(argv, said, bad, capsys):
    capsys.readouterr()
    assert run(*(str(part).replace("{bad}", str(bad)) for part in argv)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("decm: error")]
    assert all(word in line for word in said), line


@pytest.mark.parametrize(
    ("size", "classes", "said"),
    [(4, 10, ["(1, 4, 4)", "(1, 8, 8)"]), (8, 3, ["3 classes", "have 10"])],
    ids=["shape", "classes"],
)
def test_a_model_of_other_data_is_refused(size, classes, said, folder, tmp_path, capsys):
    """Inception and EfficientNet resize images, so a table of unlike images would not show it."""
    save(DiT(size, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=classes), tmp_path / "other")
    assert run("test", tmp_path / "other", "--config", "config.yaml") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert all(part in line for part in said), line
