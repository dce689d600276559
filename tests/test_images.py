import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mintnet_triton as mint


@pytest.mark.parametrize(("levels", "logit_lambda"), [(256, 0.05), (256, 1e-6), (17, 0.01)])
def test_log_det_is_that_of_autograd(levels: int, logit_lambda: float) -> None:
    preprocess = mint.ImagePreprocess(levels, logit_lambda)
    values = levels * torch.rand(3, 2, 2, 3, dtype=torch.float64)
    x, log_det = preprocess.transform(values.requires_grad_())
    (slopes,) = torch.autograd.grad(x.sum(), values)
    torch.testing.assert_close(log_det, slopes.log().flatten(1).sum(1), rtol=1e-10, atol=1e-10)
    back, inverse_log_det = preprocess.inverse(x)
    torch.testing.assert_close(back, values, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_images_survive_the_noise() -> None:
    preprocess = mint.ImagePreprocess(17, 0.01)
    images = torch.arange(17).repeat(2, 1, 3, 1).to(torch.uint8)
    x, _ = preprocess(images, torch.Generator().manual_seed(0), torch.float64)
    assert torch.equal(preprocess.to_images(x), images.long())
    assert preprocess.to_images(torch.tensor([[[[-50.0, 50.0]]]])).tolist() == [[[[0, 16]]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_not_rounded_away(dtype: torch.dtype) -> None:
    preprocess = mint.ImagePreprocess()
    images = torch.full((1, 1, 1500, 1500), 255)
    values = preprocess.dequantise(images)
    assert float(values.max()) < 256
    x, _ = preprocess(torch.full((1, 1, 40, 40), 128), dtype=dtype)
    assert x.dtype == dtype
    assert len(x.unique()) > 20


def test_noise_is_uniform_and_repeatable() -> None:
    preprocess = mint.ImagePreprocess()
    images = torch.full((4, 1, 50, 50), 7)
    values = preprocess.dequantise(images, torch.Generator().manual_seed(1))
    assert torch.equal(values, preprocess.dequantise(images, torch.Generator().manual_seed(1)))
    noise = values - 7
    assert 0 <= float(noise.min()) < 0.01
    assert 0.99 < float(noise.max()) < 1
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "logit_lambda"), [("mnist", 1e-6), ("cifar10", 0.05), ("imagenet32", 0.05)]
)
def test_presets_are_the_papers(name: str, logit_lambda: float) -> None:
    preprocess = mint.ImagePreprocess.from_preset(name)
    assert (preprocess.levels, preprocess.logit_lambda) == (256, logit_lambda)


def test_extreme_images_stay_finite_in_float32() -> None:
    preprocess = mint.ImagePreprocess.from_preset("mnist")
    assert preprocess.logit_lambda == 1e-6
    values = torch.tensor([0.0, 1e-9, 255.99999, 256.0]).view(1, 1, 2, 2)
    x, log_det = preprocess.transform(values)
    assert x.isfinite().all()
    assert log_det.isfinite().all()


def test_bits_per_dim_is_the_authors_formula() -> None:
    """Images over 256, logit with lambda, and 8 bits for the unit cube."""
    flow = mint.MintNet(1, 4, pairs=2, hidden=3, squeezes=0).double()
    images = torch.randint(0, 256, (5, 1, 4, 4))
    bits = mint.bits_per_dim(flow, images, 256, 0.05, torch.Generator().manual_seed(2))

    noise = torch.rand(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    p = 0.05 + 0.9 * (images + noise) / 256
    x = p.log() - (1 - p).log()
    log_det_logit = (F.softplus(x) + F.softplus(-x) + math.log(0.9)).flatten(1).sum(1)
    z, log_det = flow(x)
    log_prob = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1) + log_det
    expected = -(log_prob + log_det_logit) / (16 * math.log(2)) + 8
    torch.testing.assert_close(bits, expected)


def test_uniform_images_cost_log2_of_the_levels() -> None:
    """A density of 1 on the unit cube: the logistic base, hence exactly log2(levels) bits."""
    preprocess = mint.ImagePreprocess(17, 1e-9)
    x, log_det = preprocess(torch.randint(0, 17, (4, 1, 8, 8)), dtype=torch.float64)
    logistic = (F.logsigmoid(x) + F.logsigmoid(-x)).flatten(1).sum(1)
    bits = -(logistic + log_det) / (64 * math.log(2))
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(17)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"levels": 1}, ValueError, "levels must be at least 2, got 1"),
        ({"levels": 2.0}, TypeError, "levels must be an integer"),
        ({"logit_lambda": 0.0}, ValueError, r"logit_lambda must be in \(0, 0.5\), got 0.0"),
        ({"logit_lambda": 0.5}, ValueError, "logit_lambda must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mint.ImagePreprocess(**arguments)


def test_bad_images() -> None:
    preprocess = mint.ImagePreprocess(17)
    with pytest.raises(TypeError, match="images must be a tensor of an integer dtype, got torch"):
        preprocess(torch.rand(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"images must be within 0 and 16.*from 0 to 17"):
        preprocess(torch.tensor([0, 17]).view(1, 1, 1, 2))
    with pytest.raises(ValueError, match=r"images must be \(batch, C, H, W\), got shape \(3, 2\)"):
        preprocess(torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="values must be within 0 and 17"):
        preprocess.transform(torch.full((1, 1, 2, 2), 17.5))
    with pytest.raises(mint.NonFiniteError, match="x holds 1 NaN"):
        preprocess.inverse(torch.tensor([0.0, float("nan")]).view(1, 1, 1, 2))
