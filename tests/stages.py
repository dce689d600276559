"""Stages beyond the paper, and flows of them, to be tested."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mintnet_triton as mint
from mintnet_triton.conv import MaskedConv
from mintnet_triton.parts import (
    ActNorm,
    ConditionalPrior,
    FactorOut,
    InvertibleSequential,
    LevelSpline,
    LogisticMixture,
    PointwiseConv,
)
from mintnet_triton.position import PositionBias

ALL: dict[str, Any] = {
    "level_spline": 5,
    "position_bias": 2,
    "mixture": 2,
    "actnorm": True,
    "mixing": True,
    "factor_out": True,
    "conditional_prior": 3,
    "learned_base": True,
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def small_flow(*size: int, **changes: Any) -> mint.MintNet:
    arguments = {"channels": 2, "pairs": 2, "hidden": 8, "squeezes": 1, **ALL, **changes}
    return mint.MintNet(image_size=size, **arguments)


#: of samples (2, 4, 4)
ON_IMAGES: dict[str, Callable[[], mint.Invertible]] = {
    "actnorm": lambda: ActNorm(2),
    "actnorm of variables": lambda: ActNorm(2, 4),
    "pointwise": lambda: PointwiseConv(2),
    "spline": lambda: LevelSpline(2, 5),
    "position bias": lambda: mint.MintPair(2, 4, 3, position_bias=3),
    "mixture": lambda: LogisticMixture(2, 4, 3),
    "prior": lambda: ConditionalPrior(2, 1, 3),
    "factor out": lambda: FactorOut(
        InvertibleSequential(mint.MintPair(1, 4, 2), mint.Squeeze(), PointwiseConv(4)), 1
    ),
    "flow": lambda: small_flow(4, 4),
}
KINDS: dict[str, tuple[Callable[[], mint.Invertible], tuple[int, ...]]] = {
    **{name: (made, (2, 4, 4)) for name, made in ON_IMAGES.items()},
    "series: actnorm": (lambda: ActNorm(3, axes=1), (3, 5)),
    "series: pointwise": (lambda: PointwiseConv(3, 1), (3, 5)),
    "series: spline": (lambda: LevelSpline(1, 256, 1), (1, 5)),
    "series: mixture": (lambda: LogisticMixture(1, (5,), 1), (1, 5)),
    "series: prior": (lambda: ConditionalPrior(3, 2, 2, axes=1), (3, 5)),
    "series: flow": (lambda: small_flow(8, channels=1, pairs=3, squeezes=2), (1, 8)),
    "volume: actnorm": (lambda: ActNorm(2, axes=3), (2, 2, 1, 3)),
    "volume: pointwise": (lambda: PointwiseConv(2, 3), (2, 2, 1, 3)),
    "volume: spline": (lambda: LevelSpline(2, 3, axes=3), (2, 2, 1, 3)),
    "volume: mixture": (lambda: LogisticMixture(2, (2, 1, 3)), (2, 2, 1, 3)),
    "volume: prior": (lambda: ConditionalPrior(2, 1, 2, axes=3), (2, 2, 1, 3)),
    "volume: flow": (lambda: small_flow(2, 2, 4, channels=1), (1, 2, 2, 4)),
}

some_kinds = pytest.mark.parametrize("kind", ON_IMAGES)


def moved(module: mint.Invertible, dtype: torch.dtype = torch.float64) -> mint.Invertible:
    """Far from where it starts; Mint layers less so, which would make an ill-conditioned flow."""
    for layer in module.modules():
        stiff = MaskedConv | mint.MintLayer | LevelSpline
        scale = 0.1 if isinstance(layer, stiff) else 0.4
        scale = 0.02 if isinstance(layer, PositionBias) else scale
        for parameter in layer.parameters(recurse=False):
            parameter.data += scale * torch.randn_like(parameter)
    return module.to(dtype).eval()


def make(kind: str, dtype: torch.dtype = torch.float64, batch: int = 3) -> Any:
    """A map, and samples for it."""
    made, shape = KINDS[kind]
    return moved(made(), dtype), torch.randn(batch, *shape).to(dtype)


def assert_same(computed: Any, expected: Any, tolerance: float | None = None) -> None:
    torch.testing.assert_close(computed, expected, rtol=tolerance, atol=tolerance)


def total(results: tuple[Tensor, ...]) -> Tensor:
    """A number that depends on all results, each value with a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(one.shape, generator=generator).to(one) for one in results]
    terms = [(one * weight).sum().double() for one, weight in zip(results, weights, strict=True)]
    return torch.stack(terms).sum()


def gradients(module: nn.Module, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    module.zero_grad()
    total(results).backward()
    found = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items()}


def nan_in(x: Tensor) -> Tensor:
    x[0, 0, 0, 0] = math.nan
    return x
