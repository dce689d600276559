import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("zuko")
pytest.importorskip("normflows")
pytest.importorskip("FrEIA")

from bench import table2
from bench.peers import PEERS
from mintnet_triton.recipes.data import load_images
from mintnet_triton.recipes.evaluation import evaluate as judge
from mintnet_triton.recipes.objectives import make_objective
from mintnet_triton.recipes.recipe import read_experiment
from mintnet_triton.recipes.training import DivergedError


def test_all_models_make_a_run_and_none_is_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table2, "DRAWS", 1)
    path = tmp_path / "new" / "table2.json"
    arguments = ["--minutes", "1e-9", "--seeds", "0", "--rates", "1e-3", "--out", str(path)]
    table2.main([*arguments, "--models", "mintnet", "nice"])
    table2.main(arguments)
    results = json.loads(path.read_text())
    assert [made["model"] for made in results["runs"]] == [
        "mintnet",
        "nice",
        *(name for name in PEERS if name != "nice"),
    ]
    size = results["runs"][0]["parameters"]
    for made in results["runs"]:
        assert abs(made["parameters"] - size) <= 0.1 * size
        assert made["steps"] == 1
        assert 0 < made["test_bits"] < 100
        assert "diverged" not in made
    rows = capsys.readouterr().out.splitlines()
    assert sum(row.startswith("| MintNet |") for row in rows) == 2
    monkeypatch.setattr(table2, "run", None)
    table2.main(arguments)
    with pytest.raises(table2.OtherTermsError, match=r"has minutes=1e-09, not 2\.0"):
        table2.main([*arguments, "--minutes", "2"])


def test_a_run_starts_from_its_seed() -> None:
    runs = []
    for seed in (0, 0, 1):
        experiment = read_experiment(
            "digits", "density", {"seed": seed, "steps": 1, "schedule": "cosine"}
        )
        model = table2.build("freia", experiment)
        runs.append(torch.cat([weight.flatten() for weight in model.state_dict().values()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_best_checkpoint_is_judged_by_the_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []

    def evaluate(model: nn.Module, split: Any, *arguments: Any) -> Any:
        judged.append(copy.deepcopy(model))
        return judge(model, split, *arguments)

    monkeypatch.setattr(table2, "evaluate", evaluate)
    monkeypatch.setattr(table2, "CHECKPOINT_EVERY", 1)
    monkeypatch.setitem(table2.TERMS, "steps", 12)
    # At such a rate, the last of a few steps is not the best.
    results = table2.run_all("digits", 1.0, [3], [0.02], ["nice"], tmp_path / "table2.json")
    (made,) = results["runs"]
    assert made["best_step"] < made["steps"] == 12
    (model,) = judged
    data = load_images("digits")
    experiment = read_experiment("digits", "density")
    objective = make_objective("density", experiment.data)
    _, held_out = data.hold_out(results["terms"]["validation"])
    bits = judge(model, held_out, objective, seed=3).metric.mean()
    assert float(bits) == pytest.approx(made["validation_bits"], rel=1e-6)
    bits = judge(model, data.test, objective, 5).metric.mean()
    assert float(bits) == pytest.approx(made["test_bits"], rel=1e-6)


def test_a_diverged_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*arguments: Any, **options: Any) -> None:
        raise DivergedError("at step 3")

    monkeypatch.setattr(table2, "train", diverge)
    path = tmp_path / "table2.json"
    results = table2.run_all("digits", 1.0, [0], [1e-3], ["nice"], path)
    assert json.loads(path.read_text()) == results
    assert results["runs"][0]["diverged"] == "at step 3"
    assert "| - | 1 | - | - | 1 of 1 |" in table2.table(results)


def entry(model: str, rate: float, seed: int, validation: float, test: float) -> dict[str, Any]:
    return {
        "model": model,
        "rate": rate,
        "seed": seed,
        "parameters": 100,
        "validation_bits": validation,
        "test_bits": test,
        "steps": 50,
        "seconds": 2.0,
    }


def test_held_out_images_choose_the_rate_and_the_best_model_comes_first() -> None:
    broken = {**entry("glow", 1e-2, 0, 0.5, 0.5), "diverged": "at step 3", "test_bits": None}
    runs = [
        entry("glow", 1e-3, 0, 2.0, 2.6),
        entry("glow", 1e-3, 1, 2.0, 2.4),
        entry("glow", 3e-3, 0, 2.2, 1.0),
        entry("glow", 3e-3, 1, 2.2, 1.0),
        broken,
        entry("glow", 1e-2, 1, 0.5, 0.5),
        entry("mintnet", 1e-3, 0, 1.9, 2.1),
    ]
    results = {"data": "digits", "levels": 17, "minutes": 5.0, "runs": runs}
    lines = table2.table(results).splitlines()
    assert "4.087 bits for uniform noise; 5 minutes a run" in lines[0]
    spread = math.sqrt(2 * 0.1**2)
    assert lines[4:] == [
        "| MintNet | this one | 100 | 0.001 | 2.100 | 1 | 50 | 40 | 0 of 1 |",
        f"| Glow | normflows | 100 | 0.001 | 2.500 ± {spread:.3f} | 2 | 50 | 40 | 1 of 6 |",
    ]
