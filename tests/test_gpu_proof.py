"""benchmarks.gpu_proof writes the result of every stage, also of those that fail, and computes its marks."""

import json
import math
import sys
from argparse import Namespace

import pytest

from benchmarks import gpu_proof
from benchmarks.gpu_proof import STAGES, main, marks, reason_to_skip, run, summary, write_images


def numbers(value):
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, int | float) else []


def dry_run(monkeypatch, out, *options):
    monkeypatch.setattr(sys, "argv", ["gpu_proof", "--dry-run", "--out", str(out), *options])
    main()
    return {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}


@pytest.mark.slow
def test_a_dry_run_measures_every_stage(monkeypatch, tmp_path):
    results = dry_run(monkeypatch, tmp_path / "out")
    assert set(results) == set(STAGES)
    for name, result in results.items():
        assert result["status"] == "done", (name, result["reason"])
        assert numbers(result["values"])
        assert all(map(math.isfinite, numbers(result["values"]))), name
        assert "failure" not in json.dumps(result["values"]), name
    assert results["tests"]["values"]["passed"] > 10
    assert "failed" not in results["tests"]["values"]
    rows = results["fashion"]["values"]["quality"]["rows"]
    assert [(row["model"], row["steps"]) for row in rows] == [("teacher", 2), ("student", 1)]
    assert all(results["fashion"]["values"][role]["steps"] > 3 for role in ("teacher", "student"))
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000
    assert all(value is not None for name, value in marks(results).items() if "consistency" not in name)


def test_a_stage_that_is_stopped_or_fails_stops_no_other(monkeypatch, tmp_path):
    monkeypatch.setitem(STAGES, "attention", gpu_proof.Stage(0.25))
    results = dry_run(monkeypatch, tmp_path / "out", "--stages", "attention", "arithmetic")
    assert results["attention"]["status"] == "timed out"
    assert results["arithmetic"]["status"] == "done"
    assert results["arithmetic"]["values"]["matmul 64 x 64 x 64"]["TFLOP/s"] > 0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| attention | timed out |" in text
    assert "not measured" in text


def test_a_failed_stage_keeps_its_values_and_its_last_line(tmp_path):
    """The files are in the format of IDX, but too short: the stage starts, and fails after its first value."""
    data = tmp_path / "images"
    write_images(data)
    for file in data.iterdir():
        file.write_bytes(b"no images")
    result = run("fashion", 120, Namespace(out=tmp_path, work=tmp_path, data=data, dry_run=True))
    assert result == json.loads((tmp_path / "fashion.json").read_text())
    assert result["status"] == "failed"
    assert "ubyte" in result["reason"]
    assert result["values"]["training"]["batch"] == 32


def test_missing_data_and_packages_are_one_line(monkeypatch, tmp_path):
    assert "t10k-labels-idx1-ubyte" in reason_to_skip("fashion", tmp_path)
    write_images(tmp_path)
    assert not reason_to_skip("fashion", tmp_path)
    monkeypatch.setitem(STAGES, "step", gpu_proof.Stage(10, ("no_such_package",)))
    reason = reason_to_skip("step", tmp_path)
    assert reason.endswith("no_such_package")
    result = run("step", 10, Namespace(out=tmp_path, work=tmp_path, data=tmp_path, dry_run=True))
    assert (result["status"], result["reason"]) == ("skipped", reason)
    assert f"| step | skipped | 0.0 | 10 | {reason} |" in summary({}, {"step": result}, True)


def test_marks_compare_the_best_and_the_same_batch():
    values = {
        "largest": {"decm": {"batch": 100}, "facm": {"batch": 40}},
        "step": {
            "decm, batch 64": {"images/s": 90.0},
            "decm, batch 64, compiled": {"images/s": 120.0},
            "decm, batch 32": {"images/s": 80.0},
            "facm, batch 64": {"failure": "OutOfMemoryError"},
            "facm, batch 32": {"images/s": 50.0},
        },
        "arithmetic": {"matmul 1 x 1 x 1": {"TFLOP/s": 0.5}, "decm": {"GFLOP per sample": 2.0}},
    }
    found = marks({name: {"values": each} for name, each in values.items()})
    assert found["largest batch, DE-CM's step / FACM's"] == 2.5
    assert found["images/s, DE-CM's step / FACM's"] == 2.4
    assert found["images/s at the same batch, DE-CM's step / FACM's"] == 1.6
    assert found["share of the matrix products' TFLOP/s, DE-CM's step"] == pytest.approx(120 * 2e-3 / 0.5)
    assert found["images/s, consistency step, ours / FACM's"] is None


def test_without_a_gpu_a_full_run_ends_with_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_proof, "_has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_proof", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    assert "--dry-run" in capsys.readouterr().err
