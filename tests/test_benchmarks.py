"""The benchmark of a step runs, and its last line is what docs/benchmarks.md says."""

from benchmarks.step import main


def test_the_benchmark_ends_with_its_ratios(tmp_path, capsys):
    main(network="tiny", batch=2, rounds=1, compiled=[False], threads=1, out=tmp_path)
    ratios = dict(pair.split("=") for pair in capsys.readouterr().out.splitlines()[-1].split())
    assert {"time_vs_jvp", "memory_vs_jvp", "memory_vs_fm", "step_vs_facm", "error"} <= set(ratios)
    assert float(ratios["memory_vs_jvp"]) < 0.8
    assert float(ratios["error"]) < 1e-5
    table = (tmp_path / "tiny-2-fp32-cpu.md").read_text()
    assert table.count("fails: CheckpointError") == 2, "torch.func.jvp with a graph cannot be checkpointed"
    assert (tmp_path / "tiny-2-fp32-cpu.png").stat().st_size > 10_000
