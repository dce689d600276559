"""Scores of single samples against densities that are known, and latents between samples."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, Uniform

import mintnet_triton as mint

SHAPE = (2, 3, 4)
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


def normal(mean: float = 0.0, scale: float = 1.0) -> Distribution:
    ones = torch.ones(SHAPE, dtype=torch.float64)
    return Independent(Normal(mean * ones, scale * ones), 3)


def make_flow() -> mint.MintNet:
    flow = mint.MintNet(2, (4, 4), pairs=2, hidden=4, squeezes=1).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 3), std=0.2)
    return flow


# ---------------------------------------------------------------- scores


def test_scores_of_normal_distributions() -> None:
    x = torch.randn(7, *SHAPE, dtype=torch.float64)
    squares = x.flatten(1).square().sum(1)
    log_p = -0.5 * squares - 24 * HALF_LOG_2_PI
    torch.testing.assert_close(mint.log_prob_per_dim(normal(), x), log_p / 24)

    entropy = 24 * (HALF_LOG_2_PI + 0.5)  # of the standard normal distribution
    torch.testing.assert_close(mint.typicality(normal(), x, entropy), (0.5 * (squares - 24)).abs())
    samples = normal().sample((40_000,))
    estimate = mint.entropy_estimate(normal(), samples)
    assert estimate.shape == ()
    # The standard deviation of -log p is sqrt(24 / 2).
    assert abs(float(estimate) - entropy) < 5 * math.sqrt(12 / 40_000)
    # The mode is most likely, and not typical.
    mode = torch.zeros(1, *SHAPE, dtype=torch.float64)
    assert bool((mint.log_prob_per_dim(normal(), mode) > log_p / 24).all())
    assert float(mint.typicality(normal(), mode, estimate)) == pytest.approx(12, abs=0.1)

    mean, scale = 0.3, 2.0
    log_q = -0.5 * ((x.flatten(1) - mean) / scale).square().sum(1)
    log_q -= 24 * (HALF_LOG_2_PI + math.log(scale))
    torch.testing.assert_close(
        mint.likelihood_ratio(normal(), normal(mean, scale), x), log_p - log_q
    )


def test_scores_of_a_flow_and_their_gradients() -> None:
    flow, other = make_flow(), make_flow()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mint.log_prob_per_dim(flow, x), flow.log_prob(x) / 32)
    ratio = mint.likelihood_ratio(flow, other, x)
    expected = flow.log_prob(x) - other.log_prob(x)
    torch.testing.assert_close(ratio, expected)
    weight = torch.randn(3, dtype=torch.float64)
    found, wanted = (torch.autograd.grad(one, x, weight)[0] for one in (ratio, expected))
    torch.testing.assert_close(found, wanted)
    entropy = mint.entropy_estimate(flow, x)
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy, -flow.log_prob(x).mean().detach())
    score = mint.typicality(flow, x, entropy)
    torch.testing.assert_close(score, (flow.log_prob(x) + entropy).abs())
    assert mint.typicality(flow, x[:0], entropy).shape == (0,)


def test_what_is_no_density_is_refused() -> None:
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    apart = Normal(torch.zeros(SHAPE).double(), 1.0)
    with pytest.raises(ValueError, match=r"log_prob of model .* shape \(5,\), got \(5, 2, 3, 4\)"):
        mint.log_prob_per_dim(apart, x)
    with pytest.raises(ValueError, match=r"log_prob of background .* got \(5, 2, 3, 4\)"):
        mint.likelihood_ratio(normal(), apart, x)
    with pytest.raises(TypeError, match="model must have a method log_prob, got Linear"):
        mint.log_prob_per_dim(torch.nn.Linear(2, 2), x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        mint.log_prob_per_dim(normal(), [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got a scalar"):
        mint.log_prob_per_dim(normal(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="x must hold at least one sample"):
        mint.entropy_estimate(make_flow(), torch.zeros(0, 2, 4, 4).double())
    with pytest.raises(ValueError, match="entropy must be finite, got nan"):
        mint.typicality(normal(), x, math.nan)
    with pytest.raises(TypeError, match="entropy must be a number, got 'a'"):
        mint.typicality(normal(), x, "a")  # type: ignore[arg-type]


def test_nan_is_reported_and_infinity_is_not() -> None:
    class Broken:
        def log_prob(self, x: Tensor) -> Tensor:
            return x.flatten(1).sum(1)

    x = torch.zeros(4, 3)
    x[2, 1] = math.nan
    with pytest.raises(
        mint.NonFiniteError, match=r"log_prob of model is NaN for 1 samples, e\.g\. 2"
    ):
        mint.log_prob_per_dim(Broken(), x)
    unit = Independent(Uniform(torch.zeros(3), torch.ones(3), validate_args=False), 1)
    unit._validate_args = False
    outside = torch.full((2, 3), 2.0)
    assert mint.log_prob_per_dim(unit, outside).tolist() == [-math.inf] * 2
    assert mint.typicality(unit, outside, 0.0).tolist() == [math.inf] * 2
    with pytest.raises(mint.NonFiniteError, match=r"log p - log p_background is NaN for 2 samples"):
        mint.likelihood_ratio(unit, unit, outside)


# ---------------------------------------------------------------- latents


@pytest.mark.parametrize("sides", [1, 2, 3])
def test_latents_between_corners(sides: int) -> None:
    flow, steps = make_flow(), 4
    corners = torch.randn(2**sides, 2, 4, 4, dtype=torch.float64)
    z = flow(corners)[0].detach()
    found = flow(mint.interpolate(flow, corners, steps))[0].detach()
    assert len(found) == steps**sides
    angles = [math.pi / 2 * step / (steps - 1) for step in range(steps)]
    for row, chosen in enumerate(itertools.product(angles, repeat=sides)):
        expected = torch.zeros_like(z[0])
        for corner, bits in enumerate(itertools.product((0, 1), repeat=sides)):
            weight = math.prod(
                math.sin(a) if bit else math.cos(a) for a, bit in zip(chosen, bits, strict=True)
            )
            expected += weight * z[corner]
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mint.interpolate(flow, corners, 2), corners)
    assert not found.requires_grad


def test_reconstructions_say_how_they_went() -> None:
    flow, x = make_flow(), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    result = mint.reconstruct(flow, x)
    assert bool(result.converged.all())
    torch.testing.assert_close(result.x, x)
    torch.testing.assert_close(result.log_det, -flow(x)[1].detach())
    poor = mint.reconstruct(flow, x, mint.FixedPoint(0.1, 1, tolerance=1e-9))
    assert not bool(poor.converged.any())
    layer = flow.layers[0][0]  # type: ignore[index]
    torch.testing.assert_close(mint.reconstruct(layer, x).x, x)
    with pytest.raises(mint.NotConvergedError):
        mint.interpolate(flow, x[:2], 3, mint.FixedPoint(0.1, 1, tolerance=1e-9))


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_corners_are_a_power_of_two(count: int) -> None:
    with pytest.raises(ValueError, match=f"corners must be 2, 4, 8, ... samples, got {count}"):
        mint.interpolate(make_flow(), torch.randn(count, 2, 4, 4, dtype=torch.float64))


def test_bad_arguments_of_interpolations() -> None:
    with pytest.raises(TypeError, match=r"corners must be a torch\.Tensor, got list"):
        mint.interpolate(make_flow(), [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        mint.interpolate(make_flow(), torch.zeros(2, 2, 4, 4).double(), steps=0)


def test_contexts_are_handed_on() -> None:
    flow, other = (
        mint.MintNet(2, (4, 4), pairs=2, hidden=4, squeezes=1, context=3).double() for _ in range(2)
    )
    for parameter in (*flow.parameters(), *other.parameters()):
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 3), std=0.2)
    x, context = torch.randn(4, 2, 4, 4).double(), torch.randn(4, 3).double()
    log_p, log_q = flow.log_prob(x, context), other.log_prob(x, context)
    assert not torch.allclose(log_p, flow.log_prob(x, context.flip(0)))
    torch.testing.assert_close(mint.log_prob_per_dim(flow, x, context), log_p / 32)
    torch.testing.assert_close(mint.likelihood_ratio(flow, other, x, context), log_p - log_q)
    entropy = mint.entropy_estimate(flow, x, context)
    torch.testing.assert_close(entropy, -log_p.mean().detach())
    torch.testing.assert_close(mint.typicality(flow, x, entropy, context), (log_p + entropy).abs())
    result = mint.reconstruct(flow, x, context=context)
    assert bool(result.converged.all())
    torch.testing.assert_close(result.x, x)

    found = mint.interpolate(flow, x, 3, context=context)
    torch.testing.assert_close(found[[0, 2, 6, 8]], x)
    # Half way between the first two, whose contexts count half each.
    half = context[:2].mean(0, keepdim=True)
    z = flow(x, context)[0][:2].sum(0, keepdim=True) / math.sqrt(2)
    torch.testing.assert_close(flow(found[1:2], half)[0], z)


# ---------------------------------------------------------------- telling outliers, in a report


def test_areas_under_the_curve_count_pairs() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    from mintnet_triton.recipes.batches import generator
    from mintnet_triton.recipes.data import ImageSet
    from mintnet_triton.recipes.evaluation import evaluate_outliers
    from mintnet_triton.recipes.objectives import Density
    from tests.tiny_run import random_data

    class Shift(torch.nn.Module):
        """Independent normal logits of a mean; the determinant is that of a scale."""

        def __init__(self, mean: float, scale: float) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor(mean))
            self.scale = scale

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x - self.mean) / self.scale, x.new_full((len(x),), -16 * math.log(self.scale))

    data, objective = random_data(13), Density(17, 0.01)
    train = random_data(30)
    assert isinstance(data.test, ImageSet)
    assert isinstance(train.train, ImageSet)
    test = data.test
    data = replace(data, train=train.train)
    flow, background = Shift(0.2, 1.5), Shift(-0.4, 2.5)
    outliers = torch.randint(5, 17, (9, 1, 4, 4), dtype=torch.uint8)
    report = evaluate_outliers(
        flow, data, {"bright": outliers}, objective, background, seed=4, batch_size=5
    )

    def log_prob(model: Shift, images: Tensor, draw: int) -> list[float]:
        values = []
        for index, image in enumerate(images):
            noise = generator(4, "evaluation", draw, index).random((1, 4, 4), "float32")
            p = 0.01 + 0.98 * (image.double() + torch.from_numpy(noise).double()) / 17
            mean = model.mean.item()
            log_normal = Normal(torch.tensor(mean).double(), model.scale).log_prob(torch.logit(p))
            values.append(float((log_normal + math.log(0.98 / 17) - (p * (1 - p)).log()).sum()))
        return values

    known = log_prob(flow, train.train.images, 1)
    entropy = -sum(known) / len(known)
    ours, theirs = log_prob(flow, test.images, 0), log_prob(flow, outliers, 2)
    before, after = log_prob(background, test.images, 0), log_prob(background, outliers, 2)
    expected = {
        "bright_log_prob": (ours, theirs),
        "bright_typicality": tuple(
            [-abs(-value - entropy) for value in side] for side in (ours, theirs)
        ),
        "bright_likelihood_ratio": (
            [p - q for p, q in zip(ours, before, strict=True)],
            [p - q for p, q in zip(theirs, after, strict=True)],
        ),
    }
    assert report.keys() == expected.keys()
    for name, (inside, outside) in expected.items():
        larger = [float(a > b) for a in inside for b in outside]
        assert 0 < sum(larger) < len(larger)
        assert report[name] == pytest.approx(sum(larger) / len(larger), abs=1e-6), name

    class Conditional(Shift):
        """Shifted by its context, which tells a class."""

        def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x - 0.5 * context[:, :1, None, None])

    mixture = Conditional(0.2, 1.5)
    of_classes = evaluate_outliers(
        mixture, data, {"bright": outliers}, replace(objective, classes=2), seed=4
    )

    def mean(images: Tensor, draw: int) -> list[float]:
        each = [log_prob(Shift(0.2 + shift, 1.5), images, draw) for shift in (0.5, 0.0)]
        return [math.log((math.exp(a) + math.exp(b)) / 2) for a, b in zip(*each, strict=True)]

    pairs = [float(a > b) for a in mean(test.images, 0) for b in mean(outliers, 2)]
    assert of_classes["bright_log_prob"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)

    alone = evaluate_outliers(flow, data, {"bright": outliers}, objective, seed=4)
    assert alone == {key: report[key] for key in list(expected)[:2]}
    with pytest.raises(ValueError, match=r"outliers 'wide' must be of shape \(N, 1, 4, 4\)"):
        evaluate_outliers(flow, data, {"wide": outliers.repeat(1, 1, 1, 2)}, objective)


def test_reduced_images() -> None:
    pytest.importorskip("sklearn")
    from mintnet_triton.recipes.data import reduced

    images = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(4 * 6).view(2, 1, 4, 6)
    images[0, 0, :2, :2] = torch.tensor([[255, 255], [0, 0]], dtype=torch.uint8)
    small = reduced(images, 256, (1, 2, 3), 17)
    assert small.dtype == torch.uint8
    assert small.tolist() == [[[[8, 0, 0], [0, 0, 0]]], [[[16, 16, 16], [16, 16, 16]]]]
    assert torch.equal(reduced(images, 256, (1, 4, 6), 256), images)
    for shape in ((3, 2, 2), (1, 5, 6), (1, 4, 7)):
        with pytest.raises(ValueError, match=r"images of \(1, 4, 6\) .* cannot be reduced to"):
            reduced(images, 256, shape, 17)


def test_values_replaced_at_random() -> None:
    pytest.importorskip("sklearn")
    import numpy as np

    from mintnet_triton.recipes.batches import augment, training_batches
    from tests.tiny_run import random_data

    image = torch.full((3, 100, 100), 20, dtype=torch.uint8)  # of no level
    found = augment(image, np.random.default_rng(0), False, 0, replaced=0.2, levels=17)
    assert found.dtype == torch.uint8
    new = found[found != 20]
    share, deviation = len(new) / 30_000, math.sqrt(0.2 * 0.8 / 30_000)
    assert abs(share - 0.2) < 4 * deviation
    counts = new.bincount(minlength=17)
    assert len(counts) == 17
    assert float((counts / len(new) - 1 / 17).abs().max()) < 4 * math.sqrt(1 / 17 / len(new))
    # Nothing is drawn where nothing is replaced: the noise is what it was before.
    rng = np.random.default_rng(0)
    assert augment(image, rng, False, 0) is image
    assert rng.random() == np.random.default_rng(0).random()
    split = random_data().train
    for share, same in ((0.0, True), (0.5, False)):
        first, second = (
            next(training_batches(split, 8, 0, replaced=value, levels=17)) for value in (0.0, share)
        )
        assert torch.equal(first.images, second.images) is same
        assert int(second.images.max()) <= 16


def test_a_report_with_outliers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for needed in ("sklearn", "matplotlib", "mlxtend", "tqdm"):
        pytest.importorskip(needed)
    from mintnet_triton.__main__ import main

    small = ["pairs=1", "hidden=4", "squeezes=0", "steps=2", "batch_size=16"]
    sets = [argument for change in small for argument in ("--set", change)]
    runs: dict[str, Any] = {}
    for name, more in (("run", []), ("background", ["--set", "replaced=0.2"])):
        runs[name] = str(tmp_path / name)
        train = ["train", "density", "--preset", "digits", "--out", runs[name]]
        assert main([*train, *sets, *more]) == 0
    recipe = json.loads((tmp_path / "background" / "run.json").read_text())["recipe"]
    assert recipe["replaced"] == 0.2
    evaluate = ["evaluate", runs["run"], "--draws", "1", "--inversions", "0"]
    outliers = ["--outliers", "mnist5k"]
    assert main([*evaluate, *outliers, "--background", runs["background"]]) == 0
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())["outliers_auroc"]
    assert list(report) == [
        f"{kind}_{score}"
        for kind in ("mnist5k", "noise")
        for score in ("log_prob", "typicality", "likelihood_ratio")
    ]
    assert all(0 <= value <= 1 for value in report.values())
    assert "| outliers auroc noise log prob |" in (tmp_path / "run" / "evaluation.md").read_text()
    capsys.readouterr()
    assert main([*evaluate, "--background", runs["background"]]) == 1
    assert "give outliers, too" in capsys.readouterr().err
    assert main([*train, "--set", "replaced=2"]) == 1
    assert "replaced must be from 0 to 1, got 2.0" in capsys.readouterr().err
