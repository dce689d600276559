"""A density for each class: trained, sampled class by class, and judged by Bayes' rule."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tqdm")

import mintnet_triton as mint
from mintnet_triton.__main__ import main
from mintnet_triton.recipes import figures
from mintnet_triton.recipes.data import NO_LABEL, ImageSet
from mintnet_triton.recipes.evaluation import classify_by_density, evaluate, evaluate_inversion
from mintnet_triton.recipes.objectives import Density, make_objective
from mintnet_triton.recipes.recipe import read_experiment
from mintnet_triton.recipes.runs import RunFolder
from tests.tiny_run import random_data

OBJECTIVE = Density(levels=17, logit_lambda=0.01, classes=3)
SMALL = ["--set", "steps=3", "--set", "pairs=2", "--set", "hidden=4", "--set", "batch_size=8"]


class Means(nn.Module):
    """z = x less a mean of the class: its density is largest near that."""

    def __init__(self, means: tuple[float, ...] = (-2.0, 0.0, 2.0)) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means))
        self.given: list[Tensor] = []

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        self.given.append(context)
        mean = torch.where(context > 0, self.means, 0).sum(1)
        return x - mean[:, None, None, None], torch.zeros(len(x))


class Sharp(Means):
    """Of a density that is infinite for the first class."""

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = super().forward(x, context)
        return z, torch.where(context[:, 0] > 0, torch.inf, 0.0)


def split_of(*values: int) -> ImageSet:
    """Images of one value each, labelled by their place."""
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    return ImageSet(images, torch.arange(len(values)) % 3)


def test_the_label_is_the_context() -> None:
    model, split = Means(), split_of(1, 8, 15, 1)
    evaluation = evaluate(model, split, OBJECTIVE)
    (context,) = model.given
    assert torch.equal(context, torch.eye(3)[[0, 1, 2, 0]])
    plain = Density(17, 0.01)
    for label, mean in enumerate((-2.0, 0.0, 2.0)):
        same = evaluate(Shifted(mean), ImageSet(split.images, split.labels), plain)
        own = split.labels == label
        torch.testing.assert_close(evaluation.metric[:, own], same.metric[:, own])
    for wrong in (NO_LABEL, 3):
        with pytest.raises(ValueError, match=f"labels must be from 0 to 2, got {wrong}"):
            evaluate(model, ImageSet(split.images, torch.full((4,), wrong)), OBJECTIVE)
    with pytest.raises(ValueError, match="classes must be at least 1"):
        Density(classes=0)


class Shifted(nn.Module):
    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x - self.mean, torch.zeros(len(x))


def test_bayes_rule() -> None:
    """The likeliest class is that of the nearest mean; one image in four is of another."""
    split = split_of(1, 8, 15, 1, 8, 15, 1, 15)
    found = classify_by_density(Means(), split, OBJECTIVE, draws=2, batch_size=3)
    assert found["images"] == 8
    assert found["accuracy"] == pytest.approx(7 / 8)
    assert found["standard_error"] == pytest.approx((7 / 64 / 7) ** 0.5)
    swapped = classify_by_density(Means((2.0, 0.0, -2.0)), split, OBJECTIVE)
    assert swapped["accuracy"] == pytest.approx(2 / 8)
    never = classify_by_density(Means((float("nan"), 0.0, 2.0)), split, OBJECTIVE)
    assert never["accuracy"] == pytest.approx(4 / 8)
    assert classify_by_density(Sharp(), split, OBJECTIVE)["accuracy"] == pytest.approx(4 / 8)
    none = classify_by_density(Means((float("nan"),) * 3), split, OBJECTIVE)
    assert none["accuracy"] == 0
    with pytest.raises(ValueError, match="one for all classes"):
        classify_by_density(Means(), split, Density(17, 0.01))


def test_an_inversion_is_given_the_labels() -> None:
    torch.manual_seed(0)
    flow = mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1, context=3)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "context" in name:
                parameter.normal_()
    data = random_data(6).test
    assert isinstance(data, ImageSet)
    report = evaluate_inversion(flow, data.images, OBJECTIVE, labels=data.labels)
    assert report["converged"] == report["recovered"] == 6
    assert report["largest_error"] < 1e-3


def test_the_recipe() -> None:
    experiment = read_experiment("digits", "density", {"condition": True})
    assert experiment.condition
    assert "context" not in experiment.model
    asked = experiment.for_classes(10)
    assert (asked.model["context"], asked.data["classes"]) == (10, 10)
    assert make_objective("density", asked.data) == Density(17, 0.01, 10)
    plain = read_experiment("digits", "density", {"condition": False})
    assert plain == read_experiment("digits", "density")
    assert plain.for_classes(10) == plain
    with pytest.raises(TypeError, match="condition must be true or false, got 'yes'"):
        read_experiment("digits", "density", {"condition": "yes"})
    with pytest.raises(ValueError, match="nothing is called 'condition'"):
        read_experiment("digits", "classify", {"condition": True})
    with pytest.raises(ValueError, match=r"nothing is called 'colour'.*condition"):
        read_experiment("digits", "density", {"colour": True})


def test_a_sheet_has_a_row_for_each_class() -> None:
    images, labels = torch.randint(0, 17, (8, 1, 4, 4)), OBJECTIVE.labels(8)
    assert labels is not None
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    sheet = figures.sample_sheet(images, labels, OBJECTIVE)
    titles = [part.get_suptitle() for part in sheet.subfigs]
    assert titles == ["class 0", "class 1", "class 2"]
    shown = [[bool(axis.images) for axis in part.axes] for part in sheet.subfigs]
    assert shown == [[True] * 3, [True] * 3, [True, True, False]]


def test_corners_of_an_interpolation_keep_their_context() -> None:
    torch.manual_seed(0)
    flow = mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1, context=3).double()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "context" in name:
                parameter.normal_()
    corners, context = torch.randn(4, 1, 4, 4).double(), torch.eye(3)[[0, 2, 1, 1]].double()
    between = figures.interpolation(flow, corners, 3, context)
    torch.testing.assert_close(between[[0, 2, 6, 8]], corners)


def test_from_training_to_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train = ["train", "density", "--preset", "digits", "--out", str(out), *SMALL]
    train += ["--set", "condition=true"]
    assert main([*train, "--max-minutes", "1e-9"]) == 0
    assert main([*train, "--resume"]) == 0
    described: dict[str, Any] = RunFolder(out).description()
    assert described["model"]["context"] == described["objective"]["classes"] == 10
    flow = mint.load(out / "model.safetensors")
    assert isinstance(flow, mint.MintNet)
    assert flow.context == 10
    weight = flow.get_parameter("layers.0.0.context_network.weight")
    assert weight.any()

    assert main(["evaluate", str(out), "--draws", "1", "--inversions", "3"]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert report["inversion"]["converged"] == 3
    assert report["classification"]["images"] == 360
    assert 0 <= report["classification"]["accuracy"] <= 1
    assert "classification accuracy" in capsys.readouterr().out

    assert main(["sample", str(out), "--number", "12", "--seed", "2"]) == 0
    labels = np.load(out / "labels.npy")
    assert labels.tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    latents = torch.randn(12, *flow.latent_shape, generator=torch.Generator().manual_seed(2))
    x = flow.inverse(latents, context=torch.eye(10)[torch.from_numpy(labels)])[0]
    expected = mint.ImagePreprocess(17, 0.01).to_images(x.detach())
    assert np.array_equal(np.load(out / "samples.npy"), expected.numpy())

    assert main(["figures", str(out)]) == 0
    for name in ("samples", "reconstruction_error", "reconstructions", "interpolation"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_classes_says_nothing_of_them(tmp_path: Path) -> None:
    """So that runs of before can be resumed."""
    out = tmp_path / "run"
    assert main(["train", "density", "--preset", "digits", "--out", str(out), *SMALL]) == 0
    described = RunFolder(out).description()
    assert set(described["objective"]) == {"task", "levels", "logit_lambda"}
    assert "context" not in described["model"]
