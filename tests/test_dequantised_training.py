"""Training and judging by learnt noise: what is called by which name, and what it is."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import mintnet_triton as mint
from mintnet_triton.__main__ import main
from mintnet_triton.recipes.batches import generator
from mintnet_triton.recipes.data import ImageSet
from mintnet_triton.recipes.evaluation import (
    as_table,
    classify_by_density,
    evaluate,
    evaluate_outliers,
)
from mintnet_triton.recipes.figures import learning_curve
from mintnet_triton.recipes.objectives import Density, dequantising, metric_of
from mintnet_triton.recipes.recipe import Recipe
from mintnet_triton.recipes.runs import RunFolder
from mintnet_triton.recipes.training import train
from tests.test_dequantiser import scatter
from tests.tiny_run import random_data

NATS = 16 * math.log(2)  # of a bit per dimension


def flow_and_objective(classes: int | None = None) -> tuple[mint.MintNet, Density]:
    flow = mint.MintNet(1, 4, 2, 4, 1, context=classes, dequantiser=2)
    scatter(flow, 0.2)
    return flow.eval(), Density(levels=17, logit_lambda=0.01, classes=classes)


def some_values(objective: Density) -> tuple[Tensor, Tensor]:
    split = random_data(6).test
    assert isinstance(split, ImageSet)
    rngs = [generator(0, "evaluation", 0, index) for index in range(6)]
    return objective.inputs(split.images, rngs), split.labels


@torch.no_grad()
@pytest.mark.parametrize("classes", [None, 3])
def test_the_loss_is_the_bound_with_the_noise_of_the_flow(classes: int | None) -> None:
    flow, objective = flow_and_objective(classes)
    values, labels = some_values(objective)
    context = objective.context(labels, values)
    other, log_det = flow.dequantise(values, 17, context)
    there = objective.scores(flow, other, labels, uniform=True).loss
    expected = there - log_det / NATS
    for model in (flow, AveragedModel(flow)):
        assert dequantising(model) is not None
        scores = objective.scores(model, values, labels)
        torch.testing.assert_close(scores.loss, expected)
        assert torch.equal(scores.metric, scores.loss)
        assert metric_of(objective, model) == "bits_bound"
    given = () if context is None else (context,)
    x, preprocess_log_det = objective.logits(values, values)
    exact = -(flow.log_prob(x, *given) + preprocess_log_det) / NATS
    torch.testing.assert_close(objective.scores(flow, values, labels, uniform=True).loss, exact)
    assert not torch.allclose(exact, expected, atol=0.01)


def test_three_measures_have_three_names() -> None:
    flow, objective = flow_and_objective()
    split = random_data(6).test
    assert isinstance(split, ImageSet)
    plain = mint.MintNet(1, 4, 2, 4, 1)
    plain.load_state_dict(
        {n: v for n, v in flow.state_dict().items() if not n.startswith("dequantiser.")}
    )
    ours, theirs = (evaluate(model, split, objective, 4, seed=1) for model in (flow, plain))
    assert torch.equal(ours.metric, theirs.metric)
    assert theirs.bound is None
    report, usual = ours.summary(), theirs.summary()
    assert {name: report[name] for name in usual} == usual
    beyond = ("bits_bound", "bits_bound_standard_error", "bits_importance")
    assert report.keys() - usual.keys() == set(beyond)
    assert ours.bound is not None
    assert ours.bound.shape == (4, 6)
    for index in range(6):  # draw 2 of every image, by itself
        noise = objective.inputs(
            split.images[index : index + 1], [generator(1, "evaluation", 2, index)]
        )
        with torch.no_grad():
            loss = objective.scores(flow, noise, split.labels[index : index + 1]).loss
        assert float(ours.bound[2, index]) == pytest.approx(float(loss), rel=1e-5)
    assert report["bits_bound"] == pytest.approx(float(ours.bound.mean()))
    weighted = -(2 ** (-16 * ours.bound)).mean(0).log2().mean() / 16
    assert report["bits_importance"] == pytest.approx(float(weighted))
    assert report["bits_importance"] < report["bits_bound"]
    once = evaluate(flow, split, objective, 1, seed=1).summary()
    assert once["bits_importance"] == pytest.approx(once["bits_bound"])
    assert "| bits importance |" in as_table(report)
    bad = replace(ours, bound=torch.where(torch.arange(6) == 2, math.nan, ours.bound))
    assert bad.summary()["not_finite"] == 4


def test_images_and_classes_are_told_apart_by_exact_bits() -> None:
    flow, objective = flow_and_objective(3)
    data = random_data(6)
    strange = {"noise": torch.randint(0, 17, (24, 1, 4, 4), dtype=torch.uint8)}

    def told() -> list[dict[str, float]]:
        return [
            classify_by_density(flow, data.test, objective, 2),
            evaluate_outliers(flow, data, strange, objective),
        ]

    with_noise = told()
    flow.dequantiser = None
    assert told() == with_noise


def test_a_run_is_trained_and_chosen_by_the_bound(tmp_path: Path) -> None:
    torch.manual_seed(2)
    flow = mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1, dequantiser=2)
    assert flow.dequantiser is not None
    before = {name: value.clone() for name, value in flow.dequantiser.named_parameters()}
    objective = Density(levels=17, logit_lambda=0.01)
    recipe = Recipe(steps=6, batch_size=4, learning_rate=1e-2, validation=3)
    data = random_data()
    train(flow, data, objective, recipe, tmp_path, {}, checkpoint_every=3)
    rows = RunFolder(tmp_path).rows()
    names = set().union(*rows)
    assert {"bits_bound", "validation_bits_bound"} <= names
    assert not {"bits_per_dim", "validation_bits_per_dim"} & names
    (axis,) = learning_curve(rows, metric_of(objective, flow)).axes
    assert axis.get_ylabel() == "bits per dimension, bound"
    assert [len(np.asarray(line.get_xdata())) for line in axis.get_lines()] == [2, 2]
    held_out = evaluate(flow, data.hold_out(3)[1], objective)
    assert held_out.bound is not None
    last = [row for row in rows if "validation_loss" in row][-1]
    assert last["validation_loss"] == pytest.approx(float(held_out.bound.mean()), rel=1e-6)
    moved = {
        name
        for name, value in flow.dequantiser.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert moved == before.keys()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["train", "density", "--preset", "digits", "--device", "cpu", "--out", str(out)]
    for change in ("pairs=1", "hidden=4", "squeezes=0", "steps=2", "batch_size=8"):
        command += ["--set", change]
    assert main([*command, "--set", "dequantiser=2", "--set", "condition=true"]) == 0
    assert main(["evaluate", str(out), "--draws", "2", "--inversions", "2", "--device", "cpu"]) == 0
    assert "| test bits bound |" in capsys.readouterr().out
    test = json.loads((out / "evaluation.json").read_text())["test"]
    assert test["draws"] == 2
    assert test["bits_importance"] < test["bits_bound"]
    assert test["bits_bound"] == pytest.approx(test["bits_per_dim"], rel=0.01)
    flow = mint.load(out / "model.safetensors")
    assert flow.arguments["dequantiser"] == 2
