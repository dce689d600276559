"""What every adapter is tested with: maps far from the identity, digits, and a few steps."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import mintnet_triton as mint

Module = TypeVar("Module", bound=nn.Module)

#: of a sample of the small maps; more rows than columns, so that no transposition goes unseen
SHAPE = (2, 4, 2)


def moved(module: Module, deviation: float = 0.2) -> Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 3), std=deviation)
    return module


def make_layer() -> mint.MintLayer:
    return moved(mint.MintLayer(SHAPE[0], SHAPE[1:], 3)).double()


def make_flow() -> mint.MintNet:
    """With latents (8, 2, 1), and with stages beyond the paper."""
    flow = mint.MintNet(
        SHAPE[0],
        SHAPE[1:],
        pairs=2,
        hidden=4,
        squeezes=1,
        level_spline=17,
        position_bias=2,
        actnorm=True,
        mixing=True,
        factor_out=True,
        conditional_prior=2,
        learned_base=True,
    )
    return moved(flow).double()


def make_conditional_flow() -> mint.MintNet:
    """Of a context of 3 channels, with latents (8, 2, 1)."""
    flow = mint.MintNet(SHAPE[0], SHAPE[1:], pairs=2, hidden=4, squeezes=1, context=3)
    return moved(flow).double()


def samples(*batch: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(*batch, *shape, dtype=torch.float64)


def exact_log_det(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """log|det| of a function's Jacobian at one sample, or at each of a batch."""
    if at.ndim > len(SHAPE):
        return torch.stack([exact_log_det(function, one) for one in at])
    matrix: Any = torch.autograd.functional.jacobian(function, at)
    log_det: Tensor = torch.linalg.slogdet(matrix.reshape(at.numel(), at.numel()))[1]
    return log_det


@cache
def digits(count: int = 128) -> Tensor:
    """Logits (count, 1, 8, 8) of handwritten digits, float32."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.as_tensor(data.images[:count]).long()[:, None]
    noise = torch.Generator().manual_seed(0)
    return torch.as_tensor(mint.ImagePreprocess(17, 0.05)(images, noise)[0])


def digit_pair() -> mint.MintPair:
    return mint.MintPair(1, 8, 4)


def assert_trains(
    loss: Callable[[], Tensor], parameters: Iterable[Tensor], rate: float = 1e-2, steps: int = 12
) -> None:
    """A few steps lower the loss, and move all parameters."""
    parameters = [one for one in parameters if one.requires_grad and one.numel()]
    assert parameters
    before = [one.detach().clone() for one in parameters]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    losses = []
    for _ in range(steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert all(math.isfinite(value) for value in losses)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.01 * abs(losses[0])
    assert all(not torch.equal(*pair) for pair in zip(before, parameters, strict=True))


@contextmanager
def counted(model: mint.Invertible) -> Iterator[dict[str, int]]:
    """How often a map is computed, and inverted."""
    counts = {"forward": 0, "inverse": 0}
    forward, inverse = model.forward, model.inverse

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            counts[name] += 1
            return method(*arguments, **more)

        return call

    with (
        patch.object(model, "forward", counting("forward", forward)),
        patch.object(model, "inverse", counting("inverse", inverse)),
    ):
        yield counts
