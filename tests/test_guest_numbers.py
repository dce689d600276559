"""What other people bring along: integers and numbers of every kind."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mintnet_triton as mint
from mintnet_triton.checks import check_number
from mintnet_triton.recipes.objectives import Density
from mintnet_triton.recipes.recipe import Recipe

INTEGERS = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)


@pytest.mark.parametrize("levels", [2, 17, 256, 1000, 2**16, 2**20])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_images_of_every_integer_dtype(dtype: torch.dtype, levels: int) -> None:
    most = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    exact = torch.randint(0, min(levels, most + 1), (20, 2, 4, 4))
    exact[0, 0, 0, 0] = top = min(levels - 1, most)
    images, preprocess = exact.to(dtype), mint.ImagePreprocess(levels)
    x, _ = preprocess(images, dtype=torch.float64)
    assert torch.equal(preprocess.to_images(x), exact)
    values = preprocess.dequantise(images)
    assert torch.equal(values.floor().long(), exact)
    noise = preprocess.dequantise(torch.full((1, 1, 40, 40), top).to(dtype)) - top
    # Rounded to 8 bits it would leave 256.
    assert len(noise.unique()) > 1500
    x, log_det = preprocess(images)
    assert x.dtype == log_det.dtype == torch.float32
    if most >= levels:
        with pytest.raises(ValueError, match=rf"within 0 and {levels - 1}.* to {levels}"):
            preprocess(torch.full((1, 1, 1, 1), levels).to(dtype))
    if dtype.is_signed:
        with pytest.raises(ValueError, match="values from -1 to -1"):
            preprocess(torch.full((1, 1, 1, 1), -1).to(dtype))


def test_values_beyond_64_bits_with_a_sign_do_not_wrap() -> None:
    images = torch.full((1, 1, 1, 1), 2**64 - 1, dtype=torch.uint64)
    with pytest.raises(ValueError, match="values from 1844674407"):
        mint.ImagePreprocess(17)(images)


def test_bits_per_dim_of_16_bits_are_those_of_int64() -> None:
    flow = mint.MintNet(1, 4, pairs=1, hidden=2, squeezes=0)
    images = torch.randint(0, 2**16, (3, 1, 4, 4))
    bits = [
        mint.bits_per_dim(flow, images.to(dtype), 2**16, generator=torch.Generator().manual_seed(1))
        for dtype in (torch.int64, torch.uint16)
    ]
    assert torch.equal(*bits)
    objective = Density(2**16)
    rngs = [np.random.default_rng(i) for i in range(3)]
    inputs = objective.inputs(images.to(torch.uint16), rngs)
    assert torch.equal(inputs.floor().long(), images)
    scores = objective.scores(flow, inputs, torch.zeros(3))
    torch.testing.assert_close(scores.loss, bits[0], rtol=0, atol=0.5)  # another draw of the noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [256, 2**16, 2**30])
def test_logits_of_any_dtype_become_images_by_the_formula(dtype: torch.dtype, levels: int) -> None:
    x = torch.linspace(-2.9, 2.9, 999).to(dtype).view(1, 1, 27, 37)
    p = 1 / (1 + np.exp(-x.double().numpy()))
    truth = np.floor((p - 0.05) / 0.9 * levels)
    # Where float64 itself is in doubt, by rounding at the edge of a level.
    error = np.abs(mint.ImagePreprocess(levels).to_images(x).numpy() - truth)
    assert error.max() <= 1
    assert (error > 0).mean() < 0.01


def test_where_there_is_no_room_for_noise() -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch.float64 for levels=257.*float32"):
        mint.ImagePreprocess(257).dequantise(torch.zeros(1, 1, 1, 1).int(), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 .*got torch.bfloat16"):
        mint.ImagePreprocess(256).dequantise(torch.zeros(1, 1, 1, 1).int(), dtype=torch.bfloat16)
    mint.ImagePreprocess(2**37)
    with pytest.raises(ValueError, match=r"levels must be at most 2\*\*37"):
        mint.ImagePreprocess(2**37 + 1)


class Three:
    def __index__(self) -> int:
        return 3


THREES = [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), Three()]


@pytest.mark.parametrize("three", THREES)
def test_whatever_is_an_integer_is_stored_as_one(three: Any, tmp_path: Path) -> None:
    layer = mint.MintLayer(three, three, three, kernel_size=three)
    assert [type(value) for value in (layer.channels, *layer.size, layer.hidden)] == [int] * 4
    conv = mint.MaskedConv2d(three, three, three, colours=three)
    assert conv.weight.shape == (3, 3, 3, 3)
    none: Any = np.int64(0)
    flow = mint.MintNet(three, three, three, three, squeezes=none, zero_init_start=three)
    network = mint.MintClassifier(three, 6, three, pairs=three, hidden=three, squeezes=none)
    for model in (flow, network):
        assert json.loads(json.dumps(model.arguments))["pairs"] == 3
        mint.save(model, tmp_path / "model.safetensors")
        assert mint.load(tmp_path / "model.safetensors").arguments == model.arguments
    assert flow._latents(three, None, 1.0).shape == (3, 3, 3, 3)
    assert type(mint.ImagePreprocess(three).levels) is int
    assert type(mint.FixedPoint(iterations=three).iterations) is int
    recipe = Recipe(steps=three, batch_size=three, milestones=(three,), seed=three)
    assert json.loads(json.dumps(recipe.__dict__))["milestones"] == [3]


@pytest.mark.parametrize(
    "size",
    [[4, 8], (np.int64(4), 8), torch.Size([4, 8]), np.array([4, 8]), torch.tensor([4, 8])],
)
def test_sizes_of_every_sequence(size: Any) -> None:
    layer = mint.MintLayer(1, size, 2)
    assert layer.size == (4, 8)
    assert [type(side) for side in layer.size] == [int, int]
    assert mint.MintNet(1, size, 1, 2, 0).arguments["image_size"] == (4, 8)
    odd: Any = np.array([3, 1, 5])
    sides = mint.MintNet(1, 4, 1, 2, 0, kernel_size=odd).arguments["kernel_size"]
    assert sides == (3, 1, 5)
    assert {type(side) for side in sides} == {int}


NO_INTEGERS = [True, np.True_, torch.tensor(True), 2.0, np.float64(2), torch.tensor(2.0), 2j]
NO_SCALARS = ["2", None, [2], np.array([2]), torch.tensor([2])]


@pytest.mark.parametrize("value", NO_INTEGERS + NO_SCALARS)
def test_what_is_no_integer(value: Any) -> None:
    for make in (
        lambda: mint.MintLayer(value, 4, 4),
        lambda: mint.MintNet(2, 4, value, 4),
        lambda: mint.MintClassifier(2, 4, classes=value),
        lambda: mint.ImagePreprocess(value),
        lambda: mint.FixedPoint(iterations=value),
        lambda: Recipe(steps=3, batch_size=value),
    ):
        with pytest.raises(TypeError, match="must be an integer, got"):
            make()


@pytest.mark.parametrize(
    "half",
    [np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2), 0.5],
)
def test_whatever_is_a_number_is_stored_as_one(half: Any) -> None:
    solver = mint.FixedPoint(alpha=half, tolerance=half)
    density = Density(logit_lambda=half / 2)
    recipe = Recipe(steps=1, learning_rate=half, betas=(half, half), clip=half)
    values = [solver.alpha, solver.tolerance, density.logit_lambda, recipe.learning_rate]
    assert values == [0.5, 0.5, 0.25, 0.5]
    assert {type(value) for value in (*values, *recipe.betas, recipe.clip)} == {float}
    flow = mint.MintNet(1, 2, 1, 2, 0)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(flow._latents(2, seeds[0], half), flow._latents(2, seeds[1], 0.5))


@pytest.mark.parametrize(
    "value", [True, np.True_, 1j, *NO_SCALARS, torch.tensor(1.0, requires_grad=True)]
)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="alpha must be a number, got"):
        check_number("alpha", value)
    with pytest.raises(TypeError, match="alpha must be a number, got"):
        mint.FixedPoint(alpha=value)
    with pytest.raises(TypeError, match="logit_lambda must be a number, got"):
        mint.ImagePreprocess(17, value)
