"""Study files: every method's objective can be built, and has equal counted network evaluations."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.samplers import euler_first
from benchmarks.study import Run, Study, built
from benchmarks.study_table import Ranked, by_steps, plot, table
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.flows import Gaussian
from decm_lightning.guidance import Guidance
from decm_lightning.losses import cost

FILES = sorted(Path("configs/compare").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_methods_have_equal_cost_and_known_specs(file, tmp_path):
    """Steps times the cost of a step is the budget, to half a step."""
    study = Study(file, tmp_path, tmp_path)
    assert len(study.settings["methods"]) >= (2 if file.stem.startswith("lab-") else 13)
    for method in study.settings["methods"]:
        run = Run(method, 1e-3, 0, study.settings["passes"])
        guided = Guidance(**study.guidance(run)).passes
        passes = cost(built(study.objective(run)).for_run(10_000), guided).total
        if corrector := study.settings["methods"][method].get("corrector"):
            # Student and v_fake with their backward passes, and the teacher.
            passes += corrector["batch_fraction"] * (2 * 3 + guided)
        assert abs(study.steps(run) * passes - run.passes) <= passes / 2
    for spec in (*study.settings["teacher"], *study.settings["specs"]):
        SamplingSpec.parse(spec)


def test_methods_change_the_optimizer_and_the_model_alone(tmp_path):
    study = Study(Path("configs/compare/lab-training.yaml"), tmp_path, tmp_path)
    plain, slow = (Run(name, 2e-3, 0, 100) for name in ("ema_0.9999", "beta2_0.95"))
    assert study.objective(plain) == study.objective(slow)
    assert study.optimizer(plain)["init_args"] == {"lr": 2e-3, "weight_decay": 0.0}
    assert study.optimizer(slow)["init_args"] == {"lr": 2e-3, "weight_decay": 0.0, "betas": [0.9, 0.95]}


def test_only_the_first_ranking_seed_is_paired(tmp_path):
    """Also after runs that are not, and only the first method measures the teacher and the floors."""
    study = Study(Path("configs/compare/digits.yaml"), tmp_path, tmp_path)
    measured = []
    for method, seed in (("facm", 0), ("de_cm", 1), ("facm", 1), ("facm", 2)):
        callbacks = study.callbacks(Run(method, 3e-3, seed, 8600))
        options = next(c["init_args"] for c in callbacks if c["class_path"].endswith("Evaluation"))
        measured.append((options["paired"] is not None, options["floors"], "teacher/euler/50" in options["test_specs"]))
    assert measured == [(False, False, False), (True, True, True), (True, False, False), (False, False, False)]


@pytest.mark.parametrize(
    ("best", "runs"),
    [(1e-3, [3e-3, 6e-3, 1e-3, 3e-4]), (3e-3, [3e-3, 6e-3, 1e-3]), (1.2e-2, [3e-3, 6e-3, 1.2e-2, 2.4e-2])],
)
def test_the_search_for_the_rate_ends_between_worse_neighbors(best, runs, tmp_path, monkeypatch):
    """The distance is smallest at one rate; only neighbors on the way to it are run."""
    study, ran = Study(Path("configs/compare/digits.yaml"), tmp_path, tmp_path), []

    def quality(run):
        ran.append(run.rate)
        return {"rows": [{"model": "student", "sampler": "mix", "steps": 1, "fd": abs(math.log(run.rate / best)) + 1}]}

    monkeypatch.setattr(study, "quality", quality)
    del study.settings["methods"]["alpha_flow"]["rate"]
    assert study.rate("alpha_flow") == best
    assert set(ran) == set(runs)
    study.settings["methods"]["alpha_flow"]["rate"] = 5e-4
    assert study.rate("alpha_flow") == 5e-4
    assert study.objective(Run("alpha_flow", 5e-4, 0, 1)) == {"class_path": "decm_lightning.losses.alpha_flow"}


def test_a_method_may_be_chosen_by_its_own_numbers_of_steps(monkeypatch):
    study = Study(Path("configs/compare/digits.yaml"), Path("unused"), Path("unused"))
    rows = [{"model": "student", "sampler": "mix", "steps": steps, "fd": fd} for steps, fd in ((1, 2.0), (2, 3.0))]
    monkeypatch.setattr(study, "quality", lambda run: {"rows": rows})
    assert study.score("free_flow", 3e-3) == math.log(2)
    assert study.score("facm", 3e-3) == math.log(2) + math.log(3)


def test_the_best_sampler_of_each_number_of_steps():
    """Only finite distances of the model count."""
    rows = [("student", "mix", 2, 0.3), ("student", "euler", 2, 0.2), ("teacher", "euler", 2, 0.1)]
    rows.append(("student", "euler", 4, float("nan")))
    quality = {"rows": [dict(zip(("model", "sampler", "steps", "fd"), row, strict=True)) for row in rows]}
    assert by_steps(quality) == {2: (0.2, "euler")}
    assert by_steps(quality, "teacher") == {2: (0.1, "euler")}


def test_euler_first_ends_with_a_step_to_data():
    """For the exact flow map one step is exact, and more steps converge with the Euler steps."""
    flow = Gaussian(mean=1.0, std=0.5)
    x_0 = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero, one = torch.zeros(64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    exact = flow.flow_map(x_0, zero, one)
    errors = [(euler_first(flow, x_0, None, steps) - exact).abs().max().item() for steps in (1, 9, 17, 33)]
    assert errors[0] < 1e-6
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.2)
    assert errors[2] / errors[3] == pytest.approx(2, rel=0.2)


def quality(offset: float) -> dict:
    """A measured run: the student's distance is 1 / steps + offset with Mix, more with Euler; the teacher's 2."""
    steps = (1, 2, 4, 8, 50)
    rows = [{"model": "student", "sampler": "mix", "steps": n, "fd": 1 / n + offset} for n in steps]
    rows += [{"model": "student", "sampler": "euler", "steps": n, "fd": 1 / n + offset + 1} for n in steps]
    return {"rows": [*rows, *({"model": "teacher", "sampler": "euler", "steps": n, "fd": 2.0} for n in steps)]}


def test_the_table_has_means_and_spreads_over_seeds(tmp_path):
    results = {
        "ours": Ranked(6e-3, 1496, 5.75, [quality(0.0), quality(0.2)]),
        "theirs": Ranked(3e-3, 956, 9.0, [quality(1.0)]),
    }
    lines = table(results).splitlines()
    assert lines[2] == "| teacher, guided | | | | 2.000 | 2.000 | 2.000 | 2.000 | 2.000 |"
    assert lines[3].startswith("| ours | 0.006 | 5.75 | 1,496 | 1.100 ± 0.141 (mix) | 0.600 ± 0.141 (mix) | ")
    assert lines[4].startswith("| theirs | 0.003 | 9.00 | 956 | 2.000 (mix) | 1.500 (mix) | ")
    plot(results, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_a_study_goes_on_from_its_kept_tables(tmp_path):
    """On a machine without the runs: nothing is trained."""
    study = Study(Path("configs/compare/digits.yaml"), tmp_path / "runs", tmp_path / "tables")
    run = Run("facm", 3e-3, 1, 8600)
    (tmp_path / "tables/digits").mkdir(parents=True)
    (tmp_path / "tables/digits/facm-0.003-seed1-8600.json").write_text(json.dumps(quality(0.0)))
    assert study.quality(run) == quality(0.0)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_ends_the_study_with_one_line(tmp_path):
    """The line names the run, its exit code and its log."""
    study = Study(Path("configs/compare/paper.yaml"), tmp_path, tmp_path)
    study.config = str(tmp_path / "missing.yaml")
    with pytest.raises(SystemExit, match=r"^fit all_three-0\.003-seed0-7400 ended with exit code 2: see .*log\.txt; "):
        study.quality(Run("all_three", 3e-3, 0, 7400))
