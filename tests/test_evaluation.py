"""What is reported of a trained model, against numbers worked out by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tqdm")

import mintnet_triton as mint
from mintnet_triton.recipes.batches import generator
from mintnet_triton.recipes.data import ImageSet
from mintnet_triton.recipes.evaluation import as_json, as_table, evaluate, evaluate_inversion
from mintnet_triton.recipes.objectives import Classification, Density
from tests.tiny_run import random_data

DENSITY = Density(levels=17, logit_lambda=0.01)


class Shift(nn.Module):
    """z = x + b; NaN, or an error, for images whose first pixel is a given one."""

    def __init__(self, raises: bool = False) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(0.3))
        self.bad: float | None = None
        self.raises = raises

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros(len(x))
        if self.bad is not None:
            bad = x[:, 0, 0, 0] > self.bad
            if self.raises and bool(bad.any()):
                raise mint.NonFiniteError("x holds 1 NaN")
            log_det[bad] = math.nan
        return x + self.b, log_det


def split() -> ImageSet:
    data = random_data(11).test
    assert isinstance(data, ImageSet)
    return data


def test_bits_of_every_image_and_draw() -> None:
    evaluation = evaluate(Shift(), split(), DENSITY, draws=3, seed=5, batch_size=4)
    assert evaluation.metric.shape == (3, 11)
    images = split().images
    for draw in range(3):
        for index in range(11):
            noise = generator(5, "evaluation", draw, index).random((1, 4, 4), "float32")
            p = 0.01 + 0.98 * (images[index].double() + torch.from_numpy(noise).double()) / 17
            z = torch.logit(p) + 0.3
            log_normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
            log_density = (log_normal + math.log(0.98 / 17) - (p * (1 - p)).log()).sum()
            expected = -float(log_density) / (16 * math.log(2))
            assert float(evaluation.metric[draw, index]) == pytest.approx(expected, rel=1e-5)
    summary = evaluation.summary()
    bits = evaluation.metric
    assert summary["images"] == 11
    assert summary["not_finite"] == 0
    assert summary["bits_per_dim"] == pytest.approx(float(bits.mean()))
    over_images = [float(x) for x in bits.mean(0)]
    mean = sum(over_images) / 11
    variance = sum((x - mean) ** 2 for x in over_images) / 10
    assert summary["standard_error"] == pytest.approx(math.sqrt(variance / 11))
    per_draw = [float(x) for x in bits.mean(1)]
    variance = sum((x - mean) ** 2 for x in per_draw) / 2
    assert summary["standard_error_of_draws"] == pytest.approx(math.sqrt(variance / 3))
    average = (2 ** (-16 * bits)).mean(0).log2() / -16
    bound = summary["importance_weighted_bits_per_dim"]
    assert bound == pytest.approx(float(average.mean()))
    assert bound < summary["bits_per_dim"]


def test_results_do_not_depend_on_the_batch_size() -> None:
    flow = mint.MintNet(1, 4, pairs=1, hidden=2, squeezes=0).double()
    results = [evaluate(flow, split(), DENSITY, 2, batch_size=size).metric for size in (1, 3, 256)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=0)
    assert evaluate(flow, split(), DENSITY).summary()["standard_error_of_draws"] is None
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        evaluate(flow, split(), DENSITY, draws=0)


@pytest.mark.parametrize("raises", [False, True])
def test_what_is_not_finite_is_counted_and_not_left_out(raises: bool) -> None:
    model = Shift(raises)
    model.bad = 0.0  # logits above 0: pixels in the brighter half
    bright = (split().images[:, 0, 0, 0] > 8).sum() + (split().images[:, 0, 0, 0] == 8).sum() // 2
    evaluation = evaluate(model, split(), DENSITY)
    summary = evaluation.summary()
    bad = int(evaluation.metric.isnan().sum())
    assert summary["not_finite"] == bad > 0
    assert abs(bad - int(bright)) <= 1
    assert math.isnan(summary["bits_per_dim"])
    assert as_json({"test": summary})["test"]["bits_per_dim"] is None
    json.dumps(as_json(summary), allow_nan=False)
    assert f"| not finite | {bad} |" in as_table(summary)


def test_accuracy_and_its_error() -> None:
    class Knows(nn.Module):
        """The label of images 0 to 5, which are bright; of the others, class 0."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return torch.log_softmax(10 * x.mean((2, 3)) * torch.tensor([[1.0, 0.0]]), 1)

    images = torch.zeros(8, 1, 2, 2, dtype=torch.uint8)
    images[:6] = 4
    data = ImageSet(images, torch.tensor([0] * 5 + [1] * 3))
    evaluation = evaluate(Knows(), data, Classification(levels=5), batch_size=3)
    summary = evaluation.summary()
    # Bright ones are 5 + 1 of class 0, dark ones two of class 1.
    assert summary["accuracy"] == pytest.approx(7 / 8)
    assert summary["standard_error"] == pytest.approx(math.sqrt(7 / 8 * 1 / 8 / 7))
    # x is +1 or -1, so that the logits are 10 or -10 beside 0.
    right, wrong = math.log1p(math.exp(-10)), 10 + math.log1p(math.exp(-10))
    assert summary["loss"] == pytest.approx((7 * right + wrong) / 8, rel=1e-5)


def test_inversion_of_a_flow() -> None:
    flow = mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1)
    report = evaluate_inversion(flow, split().images, DENSITY)
    assert report["converged"] == report["images"] == report["recovered"] == 11
    assert report["not_finite"] == 0
    assert 0 < report["mean_error"] <= report["largest_error"] < 1e-4
    # Too few iterations for the images to come back.
    poor = evaluate_inversion(
        flow, split().images, DENSITY, solver=mint.FixedPoint(0.1, 1, tolerance=1e-9)
    )
    assert poor["converged"] < 11
    assert poor["largest_error"] > 0.1
    assert poor["recovered"] < 11


def test_a_latent_that_is_not_finite_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = mint.MintNet(1, 4, pairs=1, hidden=4, squeezes=0)
    forward = flow.forward

    def broken(x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = forward(x)
        z[3] = math.inf
        return z, log_det

    monkeypatch.setattr(flow, "forward", broken)
    report = evaluate_inversion(flow, split().images, DENSITY)
    assert (report["not_finite"], report["converged"]) == (1, 10)


def test_tables_and_json(tmp_path: Path) -> None:
    values = {"data": "digits", "test": {"bits_per_dim": 1.23456789, "images": 3}}
    assert as_table(values) == (
        "| what | value |\n| --- | --- |\n| data | digits |\n"
        "| test bits per dim | 1.2346 |\n| test images | 3 |\n"
    )
    assert as_json({"a": {"b": math.inf}, "c": 1}) == {"a": {"b": None}, "c": 1}
