import copy
import json
import math
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("zuko")
pytest.importorskip("normflows")
pytest.importorskip("FrEIA")
pytest.importorskip("torchflows")

from bench import plus, tables
from bench.measure import timing
from bench.peers import PEERS, BudgetError, count_parameters
from bench.show.learning import learning
from mintnet_triton.recipes.data import load_images
from mintnet_triton.recipes.evaluation import evaluate as judge
from mintnet_triton.recipes.objectives import make_objective
from mintnet_triton.recipes.recipe import read_experiment
from mintnet_triton.recipes.training import DivergedError
from tests.tiny_run import random_data


@pytest.fixture
def pool() -> Iterator[Executor]:
    """In this process, where what a test replaces is replaced."""
    with ThreadPoolExecutor(1) as threads:
        yield threads


def make(path: Path, pool: Executor, **changes: Any) -> dict[str, Any]:
    """A short contest of the density of digits, as changed."""
    options: dict[str, Any] = {
        "minutes": 1e-9,
        "seeds": [0],
        "rates": [1e-3],
        "models": tables.CONTESTS["density"].models,
        **changes,
    }
    return tables.run_all("density", "digits", path, pool, **options)


def test_all_flows_make_a_run_and_none_is_made_twice(
    tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "load_images", lambda name, folder: random_data(100, (1, 8, 8)))
    path = tmp_path / "new" / "density.json"
    make(path, pool, models=["mint", "nice"])
    results = make(path, pool, pictures=tmp_path / "pictures")
    assert [one.name for one in (tmp_path / "pictures").iterdir()] == ["digits_mint+_0.001_0.png"]
    assert json.loads(path.read_text()) == results
    assert [made["model"] for made in results["runs"]] == [
        "mint",
        "nice",
        "mint+",
        *(name for name in PEERS if name != "nice"),
    ]
    size = results["runs"][0]["parameters"]
    for made in results["runs"]:
        assert abs(made["parameters"] - size) <= 0.1 * size
        assert made["steps"] == 1
        assert 0 < made["bits_per_dim"] < 100
        assert "diverged" not in made
        if made["model"] == "mint+":
            assert made["samples"]["converged"] == made["samples"]["certified"] == 64
            assert made["samples"]["residual"] < 1e-5
            assert 0 < made["samples"]["error_bound"] < 1e-2
    monkeypatch.setattr(tables, "run", None)
    assert make(path, pool) == results
    with pytest.raises(tables.OtherTermsError, match=r"has minutes=1e-09, not 2\.0"):
        make(path, pool, minutes=2.0)


def test_what_cannot_be_so_small_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(name: str, experiment: Any) -> nn.Module:
        assert experiment.data["image_size"] == 32
        if name == "naf":
            raise BudgetError("NAF is too large")
        return nn.Identity()

    monkeypatch.setattr(tables, "build", build)
    found = tables.entrants("density", "patches")
    assert found == ["mint", *(name for name in PEERS if name != "naf")]
    no_plus, too_large = capsys.readouterr().out.splitlines()
    assert no_plus.startswith("left out: mint+: name must be one of the presets")
    assert too_large == "left out: naf: NAF is too large"


def job(model: str, **changes: Any) -> tables.Job:
    contest = tables.CONTESTS["ablation"]
    return tables.Job("ablation", "digits", model, 1e-2, 3, 5.0, {**contest.changes, **changes})


def test_an_ablation_is_of_models_of_one_size() -> None:
    plain = tables.read(job("mint"))
    size = count_parameters(tables.build("mint", plain))
    for name in ("mint+depth", "mint+prior"):  # searching a size makes many models
        beyond = tables.VARIANTS[name]
        variant = tables.read(job(name))
        merged = {**variant.data, **variant.model, **asdict(variant.recipe)}
        assert beyond.items() <= merged.items()
        assert (variant.recipe.seed, variant.recipe.batch_size) == (3, 64)
        assert abs(count_parameters(tables.build(name, variant)) - size) <= 0.05 * size


@pytest.mark.parametrize(("data", "levels"), [("digits", 17), ("mnist5k", 256)])
def test_a_spline_has_the_levels_of_the_data(data: Any, levels: int) -> None:
    found = tables.read(job("mint+spline")._replace(data=data))
    assert (found.model["level_spline"], found.data["logit_lambda"]) == (levels, 1e-6)
    assert found.model["hidden"] >= 4 ** found.model["squeezes"]  # or it could not be made


def test_what_a_plus_changes_stands_above_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    plus = tables.read(job("mint+"))
    own = read_experiment("digits+", "density")
    assert (plus.data, plus.model["pairs"]) == (own.data, own.model["pairs"])
    assert plus.recipe.average == 0.99  # of the contest, for the preset says nothing of it
    monkeypatch.setattr(tables, "_beyond", lambda *_: {"average": 0.5})
    assert tables.read(job("mint+")).recipe.average == 0.5


def test_learnt_noise_has_bounds_beside_exact_bits(tmp_path: Path, pool: Executor) -> None:
    plain = make(tmp_path / "plain.json", pool, models=["mint"])
    assert tables.bounds(plain) == ""
    for name in ("mint+dequantiser", "mint++dequantiser"):
        found = tables.read(job(name))
        assert (found.model["dequantiser"], "level_spline" in found.model) == (4, "++" in name)
    results = make(tmp_path / "learnt.json", pool, models=["mint++dequantiser"])
    (made,) = results["runs"]
    exact, bound, weighted = (
        made[name] for name in ("bits_per_dim", "bits_bound", "bits_importance")
    )
    assert weighted < bound != exact
    row = f"| MintNet+, `dequantiser=4` | {exact:.3f} | {bound:.3f} | {weighted:.3f} | 1 |"
    assert tables.bounds(results).splitlines()[2:] == [row]


def test_samples_are_told_of_by_what_is_sure_of_them() -> None:
    drawn = {"number": 64, "converged": 64, "certified": 64, "residual": 4e-8}
    first = {**drawn, "error_bound": 2e-6, "seconds": 2.0}
    second = {**drawn, "certified": 0, "error_bound": None, "seconds": 3.0}
    diverged = {"model": "mint+", "rate": 1e-3, "seed": 1, "diverged": "nan"}
    runs = [
        entry("mint", 1e-2, 0, 1.0, 2.0) | {"samples": {**first, "seconds": 9.0}},
        entry("mint", 1e-3, 0, 0.5, 2.0) | {"samples": first},
        diverged,
        entry("mint+", 1e-3, 0, 0.5, 2.0) | {"samples": second},
        entry("mint+logit", 1e-2, 0, 1.0, 2.0) | {"samples": first},
        entry("mint+logit", 1e-3, 0, 0.5, 2.0),  # its best, of which none were drawn
        entry("glow", 1e-3, 0, 0.5, 2.0),
    ]
    assert tables.samples({"task": "density", "runs": runs}).splitlines()[2:] == [
        "| MintNet | 64 | 64 | 64 | 4e-08 | 2e-06 | 1.00 |",
        "| MintNet+ | 64 | 64 | 0 | 4e-08 | - | 1.50 |",
    ]
    assert tables.samples({"task": "density", "runs": runs[4:]}) == ""


def test_a_step_beyond_the_paper_is_of_a_model_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plus, "DATA", ("digits",))
    monkeypatch.setattr(plus, "Clock", lambda device, **_: timing.Clock(device, once=True))
    found = plus.run(0)["data"]["digits"]
    assert found["parameters"]["mint+"] == pytest.approx(found["parameters"]["mint"], rel=0.1)
    times = {"mint": [2.0, 2.0, 5.0], "mint+": [2.0, 3.0, 6.0]}
    assert found["ms"].keys() == times.keys()
    result = {"data": {"digits": {"parameters": {"mint": 9, "mint+": 8}, "ms": times}}}
    assert plus.table(result).splitlines()[2] == "| digits | 8 of 9 | 1.20 | 1.10 to 1.35 |"


def test_variants_are_known_to_contests_of_densities_alone(tmp_path: Path, pool: Any) -> None:
    arguments: dict[str, Any] = {"minutes": 1e-9, "seeds": [0], "rates": [1e-3]}
    with pytest.raises(ValueError, match=r"models must be among .* got .mint\+spline."):
        tables.run_all(
            "classify", "digits", tmp_path / "a.json", pool, models=["mint+spline"], **arguments
        )


def test_the_command_makes_runs_in_processes_of_one_thread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "classify.json"
    arguments = ["classify", "--minutes", "1e-9", "--seeds", "0", "--rates", "1e-3"]
    tables.main([*arguments, "--processes", "2", "--out", str(path)])
    runs = json.loads(path.read_text())["runs"]
    assert sorted((made["model"], made["seed"]) for made in runs) == [("mint", 0), ("resnet", 0)]
    for made in runs:
        assert made["steps"] == 1
        assert 0 <= made["accuracy"] < 0.5
    size = {made["model"]: made["parameters"] for made in runs}
    assert abs(size["resnet"] - size["mint"]) <= 0.1 * size["mint"]
    assert f"written to {path}" in capsys.readouterr().out
    picture = path.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_other_seeds_are_tried_at_the_best_rate_alone(
    tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(job: tables.Job) -> dict[str, Any]:
        # The second seed would prefer another rate.
        loss = abs(job.rate - (3e-3 if job.seed == 5 else 1e-3))
        return entry(job.model, job.rate, job.seed, loss, loss)

    monkeypatch.setattr(tables, "run", run)
    options = {"seeds": [5, 6, 7], "rates": [1e-3, 3e-3, 1e-2], "models": ["mint", "glow"]}
    runs = make(tmp_path / "density.json", pool, **options)["runs"]
    tried = [(made["seed"], made["rate"]) for made in runs if made["model"] == "glow"]
    assert sorted(tried) == [(5, 1e-3), (5, 3e-3), (5, 1e-2), (6, 3e-3), (7, 3e-3)]


def test_a_run_starts_from_its_seed() -> None:
    runs = []
    for seed in (0, 0, 1):
        experiment = read_experiment(
            "digits", "density", {"seed": seed, "steps": 1, "schedule": "cosine"}
        )
        model = tables.build("freia", experiment)
        runs.append(torch.cat([weight.flatten() for weight in model.state_dict().values()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_best_checkpoint_is_judged_by_the_test_images(
    tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []

    def evaluate(model: nn.Module, split: Any, *arguments: Any) -> Any:
        judged.append(copy.deepcopy(model))
        return judge(model, split, *arguments)

    monkeypatch.setattr(tables, "evaluate", evaluate)
    monkeypatch.setattr(tables, "CHECKPOINT_EVERY", 1)
    monkeypatch.setitem(tables.CONTESTS["density"].changes, "steps", 12)
    # At such a rate, the last of a few steps is not the best.
    path = tmp_path / "density.json"
    results = make(path, pool, minutes=1.0, seeds=[3], rates=[0.02], models=["nice"])
    (made,) = results["runs"]
    assert made["best_step"] < made["steps"] == 12
    (model,) = judged
    data = load_images("digits")
    experiment = read_experiment("digits", "density")
    objective = make_objective("density", experiment.data)
    _, held_out = data.hold_out(results["changes"]["validation"])
    bits = judge(model, held_out, objective, seed=3).metric.mean()
    assert float(bits) == pytest.approx(made["validation_loss"], rel=1e-6)
    seconds, losses = zip(*made["curve"], strict=True)
    assert (list(seconds), len(losses)) == (sorted(seconds), 12)
    assert min(losses) == losses[made["best_step"] - 1] == round(made["validation_loss"], 4)
    bits = judge(model, data.test, objective, 5).metric.mean()
    assert float(bits) == pytest.approx(made["bits_per_dim"], rel=1e-6)


def test_curves_are_drawn_of_runs_that_have_some() -> None:
    curve = [[6.0, 9.0], [60.0, 3.0], [120.0, 2.0]]
    figure = learning({"MintNet": {"curve": curve}, "old": {}}, "bits")
    assert figure is not None
    (axis,) = figure.axes
    (line,) = axis.lines
    assert line.get_label() == "MintNet"
    assert np.array(line.get_data()).tolist() == [[0.1, 1.0, 2.0], [9.0, 3.0, 2.0]]
    assert axis.get_ylim() == pytest.approx((1.95, 3.05))  # the first look is beyond it
    assert learning({"old": {}}, "bits") is None
    many = learning({str(number): {"curve": curve} for number in range(14)}, "bits")
    assert many is not None
    looks = {(one.get_color(), one.get_linestyle()) for one in many.axes[0].lines}
    assert len(looks) == 14


def test_a_diverged_run_is_recorded(
    tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*arguments: Any, **options: Any) -> None:
        raise DivergedError("at step 3. The last good checkpoint is gone")

    monkeypatch.setattr(tables, "train", diverge)
    path = tmp_path / "density.json"
    results = make(path, pool, models=["nice"])
    assert json.loads(path.read_text()) == results
    assert results["runs"][0]["diverged"] == "at step 3"
    assert "| - | 1 | - | 1 of 1 runs |" in tables.table(results)


def entry(
    model: str, rate: float, seed: int, loss: float, score: float, metric: str = "bits_per_dim"
) -> dict[str, Any]:
    return {
        "model": model,
        "rate": rate,
        "seed": seed,
        "parameters": 100,
        "validation_loss": loss,
        metric: score,
        "steps": 50,
    }


def test_held_out_images_choose_the_rate_and_the_best_model_comes_first() -> None:
    broken = {**entry("glow", 1e-2, 0, 0.5, 0.5), "diverged": "at step 3"}
    runs = [
        entry("glow", 1e-3, 0, 2.0, 2.6),
        entry("glow", 3e-3, 0, 2.2, 1.0),
        broken,
        entry("mint", 1e-3, 0, 1.9, 2.1),
        entry("glow", 1e-3, 1, 2.0, 2.4),
    ]
    terms = {"data": "digits", "levels": 17, "minutes": 5.0}
    lines = tables.table({**terms, "task": "density", "runs": runs}).splitlines()
    spread = math.sqrt(2 * 0.1**2)
    assert lines[2:] == [
        "| MintNet | this one | 100 | 0.001 | 2.100 | 1 | 50 | 0 of 1 runs |",
        f"| Glow | normflows | 100 | 0.001 | 2.500 ± {spread:.3f} | 2 | 50 | 1 of 4 runs |",
    ]
    runs = [
        entry("resnet", 1e-3, 0, 0.1, 0.98, "accuracy"),
        entry("mint", 1e-3, 0, 0.2, 0.99, "accuracy"),
    ]
    lines = tables.table({**terms, "task": "classify", "runs": runs}).splitlines()
    assert lines[2].startswith("| MintClassifier | this one | 100 | 0.001 | 99.000 | 1 |")
    assert lines[3].startswith("| ResNet | bench.peers | 100 | 0.001 | 98.000 | 1 |")
