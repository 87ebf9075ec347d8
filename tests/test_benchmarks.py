"""The benchmarks run and end with the line that docs/benchmarks.md describes."""

import pytest

from benchmarks import golden, largest, loader
from benchmarks.step import main


def test_the_benchmark_ends_with_its_ratios(tmp_path, capsys):
    main(network="tiny", batch=2, rounds=1, compiled=[False], threads=1, out=tmp_path)
    ratios = dict(pair.split("=") for pair in capsys.readouterr().out.splitlines()[-1].split())
    assert {"time_vs_jvp", "memory_vs_jvp", "memory_vs_fm", "step_vs_facm", "error"} <= set(ratios)
    assert float(ratios["memory_vs_jvp"]) < 0.8
    assert float(ratios["error"]) < 1e-5
    table = (tmp_path / "tiny-2-fp32-cpu.md").read_text()
    assert table.count("| fails: ") == 2, "torch.func.jvp with a graph cannot be checkpointed"
    assert (tmp_path / "tiny-2-fp32-cpu.png").stat().st_size > 10_000


def test_the_largest_batch_follows_from_what_samples_and_blocks_cost(capsys):
    """Memory is affine in batch size and depth, so it predicts a measurement that was not fitted."""
    largest.main(network="tiny", memory=1.0, batches=(32, 64), check=(3, 48), variants=["jvp", "dual"], threads=1)
    lines = capsys.readouterr().out.splitlines()
    for line in lines[3:5]:
        each, _, check, count = (float(cell) for cell in line.split("|")[2:6])
        assert 0.97 < check < 1.03
        assert 0.9 * 1024 < each * count < 1.1 * 1024
    assert float(lines[-1].partition("=")[2]) > 1.5


def test_latents_are_read_at_a_fraction_of_the_speed_of_a_memory_map(capsys):
    """The ratio is 0.3 to 0.5 with scaling and labels; it was 0.05 to 0.1 with one memory map per row."""
    loader.main(shards=3, rows=200, batch=128, batches=4, rounds=9)
    assert float(capsys.readouterr().out.splitlines()[-1].partition("=")[2]) > 0.15


def test_golden_numbers_are_the_same_twice_and_differ_with_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "PRESETS", {"paper": golden.PRESETS["paper"]})
    monkeypatch.setattr(golden, "SPECS", ["student/mix/1"])
    golden.main(tmp_path / "a.json", steps=2, samples=10)
    golden.main(tmp_path / "b.json", tmp_path / "a.json", steps=2, samples=10)
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    with pytest.raises(SystemExit, match="paper"):
        golden.main(tmp_path / "c.json", tmp_path / "a.json", steps=3, samples=10)
