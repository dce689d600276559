"""Stages that start from data: what leaves them is standardised."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import mintnet_triton as mint
from mintnet_triton.parts import (
    ActNorm,
    InvertibleSequential,
    LogisticMixture,
    PointwiseConv,
)
from tests.stages import (
    assert_same,
    moved,
    nan_in,
    small_flow,
)


@pytest.mark.parametrize(
    ("layer", "pooled"),
    [
        (ActNorm(3), (0, 2, 3)),
        (ActNorm(3, 4), (0,)),
        (ActNorm(3, (1, 1)), (0,)),
        (ActNorm(3, axes=1), (0, 2)),
        (ActNorm(3, (1, 5)), (0,)),
        (ActNorm(3, axes=3), (0, 2, 3, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_leaves_an_actnorm_is_standardised(
    layer: ActNorm, pooled: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    axes = layer.shift.ndim - 1
    size = [side or 4 for side in layer.input_shape[1:]]
    spread = torch.tensor([1e-3, 1.0, 50.0], dtype=dtype).view(-1, *[1] * axes)
    x = 7 + spread * torch.randn(300, 3, *size, dtype=dtype)
    layer.initialise(x)
    deviation, mean = torch.std_mean(layer(x)[0].detach().double(), pooled, correction=0)
    close = 1e-9 if dtype == torch.float64 else 1e-3
    assert_same(mean, torch.zeros_like(mean), close)
    assert_same(deviation, torch.ones_like(deviation), close)
    assert all(one.grad is None and one.requires_grad for one in layer.parameters())


def test_quantiles_of_a_mixture() -> None:
    layer = LogisticMixture(2, (3,), 4)
    x = torch.cat([torch.randn(4000, 2, 3) / 10 - 3, torch.randn(4000, 2, 3) + 4])
    layer.initialise(x)
    expected = torch.quantile(x.double(), torch.tensor([1, 3, 5, 7]).double() / 8, 0)
    assert_same(layer.mean.detach(), expected.movedim(0, -1).float())
    y = layer(x)[0].detach()
    assert float(y.mean().abs()) < 0.5  # two humps have become one of deviation below 1
    assert float(y.std()) < 1


def test_constant_channels_stay_finite() -> None:
    x = torch.randn(64, 2, 4, 4)
    x[:, 0] = 1234.567
    x[:, 1, 0, 0] = -3
    flow = small_flow(4, 4)
    flow.initialise(x)
    assert all(bool(one.isfinite().all()) for one in flow.parameters())
    assert bool(flow.log_prob(x).isfinite().all())
    layer = ActNorm(2)
    layer.initialise(x)
    assert float(layer.log_scale[0].detach()) == 0
    assert float(layer(x)[0][:, 0].detach().abs().max()) < 1e-3


@pytest.mark.parametrize("size", [(4, 4), (8,), (2, 2, 4)], ids=str)
def test_every_actnorm_of_a_flow_starts(size: tuple[int, ...]) -> None:
    flow = small_flow(*size, channels=1, pairs=2, squeezes=1)
    x = 3 + 2 * torch.randn(200, 1, *size)
    before = [copy.deepcopy(one.state_dict()) for one in flow.modules()
              if isinstance(one, mint.MintLayer)]  # fmt: skip
    flow.initialise(x)
    after = [one.state_dict() for one in flow.modules() if isinstance(one, mint.MintLayer)]
    assert_same(after, before, 0)
    norms = [one for one in flow.modules() if isinstance(one, ActNorm)]
    assert len(norms) == 3
    seen: list[Tensor] = []
    for norm in norms[:-1]:  # the last acts on each variable
        norm.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    z, _ = flow(x)
    for y in seen:
        deviation, mean = torch.std_mean(y, [0, *range(2, y.ndim)], correction=0)
        assert_same((mean, deviation), (torch.zeros_like(mean), torch.ones_like(mean)), 1e-4)
    deviation, mean = torch.std_mean(z, 0, correction=0)
    assert_same((mean, deviation), (torch.zeros_like(mean), torch.ones_like(mean)), 1e-4)
    assert all(one.grad is None and one.requires_grad for one in flow.parameters())


def test_where_nothing_starts_from_data_nothing_is_done() -> None:
    flow = mint.MintNet(1, 4, pairs=2, hidden=8, squeezes=1, mixing=True, factor_out=True)
    before = copy.deepcopy(flow.state_dict())
    flow.initialise(torch.randn(1, 1, 4, 4))  # however few samples
    flow.initialise(torch.randn(0, 1, 4, 4))
    assert_same(flow.state_dict(), before, 0)


def test_a_start_that_cannot_be_is_refused() -> None:
    flow = small_flow(4, 4)
    with pytest.raises(ValueError, match=r"x must have at least two samples.*got 1"):
        flow.initialise(torch.randn(1, 2, 4, 4))
    with pytest.raises(ValueError, match="dimension 1 is 3, expected 2"):
        flow.initialise(torch.randn(2, 3, 4, 4))
    with pytest.raises(mint.NonFiniteError, match="x holds 1 NaN"):
        flow.initialise(nan_in(torch.randn(2, 2, 4, 4)))
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        flow.initialise(torch.randn(2, 2, 4, 4).double())
    with pytest.raises(TypeError, match="context"):
        flow.initialise(torch.randn(2, 2, 4, 4), torch.randn(2, 3))
    norm = ActNorm(2)
    parametrize.register_parametrization(norm, "shift", nn.Identity())
    pruned = LogisticMixture(2, 4)
    prune.identity(pruned, "mean")
    for one in (norm, pruned, InvertibleSequential(PointwiseConv(2), norm)):
        with pytest.raises(TypeError, match=r"has parameters that are computed.*initialise it"):
            one.initialise(torch.randn(3, 2, 4, 4))


def test_conditional_flows_start() -> None:
    flow = small_flow(4, 4, context=3)
    moved(flow, torch.float32)
    x, context = torch.randn(50, 2, 4, 4), torch.randn(50, 3)
    flow.initialise(x, context)
    z, _ = flow(x, context)
    deviation, mean = torch.std_mean(z, 0, correction=0)
    assert_same((mean, deviation), (torch.zeros_like(mean), torch.ones_like(mean)), 1e-3)
    maps = torch.randn(3, 3, 4, 4)
    for given in (context[:3], maps):
        back, _ = flow.inverse(flow(x[:3], given)[0].detach(), context=given)
        assert_same(back.detach(), x[:3], 1e-3)
    assert mint.verify(flow.double(), x[:1].double(), context[:1].double()).ok
    with pytest.raises((TypeError, ValueError), match="context"):
        flow.initialise(x.double())
