"""The benchmarks run and end with the line that docs/benchmarks.md describes."""

import json
from functools import partial

import lightning as L
import pytest
import torch
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks import averages, curve, golden, gradient_noise, largest, loader
from benchmarks.step import main
from decm_lightning import Distiller
from decm_lightning.data import Digits
from decm_lightning.losses import FlowMapLoss, Objective
from decm_lightning.networks import DiT, load
from decm_lightning.triangle import Diagonal


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


def test_a_curve_tells_the_power_of_the_training_steps(tmp_path, monkeypatch, capsys):
    for step in (100, 1000, 20, 200):
        torch.save({"global_step": step}, tmp_path / f"weights-{step}.ckpt")

    def measured(config, checkpoint, out, specs):
        step = int(checkpoint.stem.partition("-")[2])
        # The first half is not on the line.
        return {1: 7 * step**-0.25 if step > 50 else 1.0, 4: 0.5}

    monkeypatch.setattr(curve, "measured", measured)
    auto_cli(curve.main, args=["config.yaml", str(tmp_path), str(tmp_path), "--goal=0.4"], as_positional=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| 20", "| 100", "| 200", "| 1,000"]
    assert lines[6] == "| power of the training steps | -0.25 | 0.00 |"
    assert (tmp_path / "curve.md").read_text() == "\n".join(lines[:7]) + "\n"
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="found 0 in"):
        curve.main("config.yaml", tmp_path / "nothing", tmp_path)


def test_equal_losses_have_equal_noise_whatever_their_rows_and_ask_for_equal_fractions(tmp_path):
    torch.manual_seed(0)
    fractions = {"many": 0.75, "few": 0.25}
    same = {name: FlowMapLoss(Diagonal(), batch_fraction=fraction) for name, fraction in fractions.items()}
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10, end_time=True)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.5)
    # Constant weights, so that windows differ by their rows alone.
    still = partial(torch.optim.AdamW, lr=0.0)
    module = Distiller(None, network, Objective(same), optimizer=still)
    noise = gradient_noise.GradientNoise(every_n_steps=300, window=250)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(
        accelerator="cpu",
        max_steps=300,
        limit_val_batches=0,
        enable_checkpointing=False,
        callbacks=[noise],
        default_root_dir=tmp_path,
        **quiet,
    )
    run.fit(module, Digits(batch_size=64))
    (window,) = json.loads((tmp_path / "gradient_noise.json").read_text())
    assert window["step"] == 300
    assert window["sigma"]["many"] == pytest.approx(window["sigma"]["few"], rel=0.05)
    assert sum(window["batch_fractions"].values()) == pytest.approx(1)


def test_the_power_8_is_the_ramp_of_the_average_and_the_largest_power_the_last_weights(tmp_path, monkeypatch, capsys):
    ramp, steps = 0.0, range(1, 2001)
    for step in steps:
        ramp += 9 / (10 + step) * (step - ramp)
    weights = {step: {"w": torch.tensor(float(step))} for step in steps}
    assert averages.average(weights, 8)["w"].item() == pytest.approx(ramp, rel=1e-3)
    assert averages.average(weights, 6)["w"].item() != pytest.approx(ramp, rel=1e-2)

    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10, end_time=True)
    kept = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1, save_weights_only=True)
    run = L.Trainer(accelerator="cpu", max_steps=4, limit_val_batches=0, callbacks=[kept], logger=False)
    run.fit(Distiller(None, network, "mean_flow"), Digits(batch_size=16))
    tested = {}

    def measured(config, place, out, specs):
        tested[place.name] = load(place).state_dict()
        return {1: float(len(tested)), 4: 0.5}

    monkeypatch.setattr(averages, "measured", measured)
    out = tmp_path / "out"
    auto_cli(averages.main, args=["config.yaml", str(tmp_path / "kept"), str(out), "--powers=[2]"], as_positional=True)
    (path,) = (tmp_path / "kept").glob("*step=4.ckpt")
    last = load(path, weights="model").state_dict()
    assert all(torch.equal(value, last[name]) for name, value in tested["power_inf"].items())
    assert any(not torch.equal(value, last[name]) for name, value in tested["power_2"].items())
    assert (out / "averages.md").read_text().splitlines()[2:] == [
        "| 2 | 1.000 | 0.500 |",
        "| inf | 2.000 | 0.500 |",
    ]
    with pytest.raises(SystemExit, match="no checkpoints in"):
        averages.main("config.yaml", tmp_path / "nothing", tmp_path)
