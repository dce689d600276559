"""Stages beyond the paper, alone and inside flows: what is true of Mint layers is true of them."""

import copy
import math
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

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
from mintnet_triton.solvers import Evaluator, Solution, Solver
from tests import adversarial_parts
from tests.jacobian import BOTH, in_order, jacobian

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


# ---------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("kind", KINDS)
def test_log_det_is_that_of_autograds_jacobian(kind: str) -> None:
    module, x = make(kind)
    _, log_det = module(x)
    assert log_det.shape == (3,)
    for sample, computed in zip(x, log_det.detach(), strict=True):
        matrix = jacobian(module, sample)
        assert_same(computed, torch.linalg.slogdet(matrix)[1], 1e-9)
        if isinstance(module, mint.TriangularMap):
            assert all(in_order(matrix, one, sample.shape).triu(1).abs().max() == 0 for one in BOTH)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(kind: str, dtype: torch.dtype) -> None:
    module, x = make(kind, dtype)
    z, log_det = module(x)
    assert z.dtype == dtype
    assert z.shape[1:] == tuple(size or there for size, there in zip(
        module.output_shape, z.shape[1:], strict=True))  # fmt: skip
    result = mint.invert(module, z.detach())
    assert bool(result.converged.all())
    assert result.x.dtype == log_det.dtype == result.log_det.dtype == (
        dtype if dtype == torch.float64 else torch.float32
    )  # fmt: skip
    again, back = copy.deepcopy(module).to(result.x.dtype)(result.x)
    close = 1e-10 if dtype == torch.float64 else 1e-4
    assert_same(again, z.to(again.dtype), close)
    assert_same(-result.log_det, back, 10 * close)
    if dtype == torch.float64:
        assert_same(result.x, x, 1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_bound_of_the_error_holds(kind: str, dtype: torch.dtype) -> None:
    """Of a z that a known x gives, but for rounding in float64."""
    module, x = make(kind, dtype, batch=8)
    result = mint.invert(module, module(x)[0].detach(), certify=True)
    # What z is rounded to has another x: found in float64, from the z that is given.
    exact = copy.deepcopy(module).double()
    truth = exact.inverse(module(x)[0].detach().double())[0]
    error = (result.x.double() - truth).abs().flatten(1).amax(1)
    assert result.error_bound is not None
    bounded = result.error_bound.isfinite()
    assert bool((error[bounded] <= result.error_bound[bounded]).all())
    assert int(bounded.sum()) >= 6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_inverse(kind: str) -> None:
    """By z and all parameters, against differences along a direction; forward mode alike."""
    module, x = make(kind, batch=2)
    z = module(x)[0].detach().requires_grad_()
    variables = [z, *module.parameters()]
    found = torch.autograd.grad(total(module.inverse(z)), variables)
    for chosen in ([0], range(1, len(variables))):
        directions = {index: torch.randn_like(variables[index]) for index in chosen}
        ends, step = [], 1e-6
        for move in (step, -2 * step, step):  # and back
            with torch.no_grad():
                for index, direction in directions.items():
                    variables[index].add_(move * direction)
                ends.append(float(total(module.inverse(z.detach()))))
        slope = sum(float((found[index] * one).sum()) for index, one in directions.items())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-5)
    tangent = torch.randn_like(z)
    with torch.no_grad():
        along: Any = torch.func.jvp(module.inverse, (z.detach(),), (tangent,))[1]
    assert_same(total(along), (found[0] * tangent).sum(), 1e-7)


@some_kinds
def test_second_derivatives_of_the_inverse(kind: str) -> None:
    module, x = make(kind, batch=1)
    z = module(x)[0].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(module.inverse, z, fast_mode=True, atol=1e-3)


def test_a_mixture_far_from_its_components_and_between_them() -> None:
    """Slopes there are below what float32, or float64, can say; logarithms are not."""
    layer = LogisticMixture(1, (1,), 2)
    with torch.no_grad():
        layer.mean.copy_(torch.tensor([-1.0, 1.0]))
        layer.log_scale.fill_(-8)
    z = torch.tensor([0.0, 1e-5, -1e5, 3e30, 3e38, 2300.0]).view(-1, 1, 1)
    result = mint.invert(layer, z)
    assert result.converged.tolist() == [True] * 6
    assert bool(result.x.isfinite().all())
    assert float(result.log_det[0].detach()) > 200
    assert_same(-result.log_det[:3], layer(result.x[:3])[1].detach(), 1e-4)
    # In float64, too, and to the end of it.
    huge = mint.invert(
        layer.double(), torch.tensor([1e308, -1e300, 0], dtype=torch.float64).view(-1, 1, 1)
    )
    assert not bool(huge.x.isnan().any())
    assert huge.converged.tolist()[1:] == [True, True]


@pytest.mark.parametrize("levels", [3, 17, 256, 2**16])
def test_a_spline_starts_as_a_bump_for_each_end(levels: int) -> None:
    """At knots, it is the quantile of the mixture, with its slope; between, hardly less so."""
    layer = LevelSpline(1, levels, axes=1, dtype=torch.float64)

    def logit_of(y: Tensor) -> Tensor:
        """x by the mixture written out, from the lower tail for accuracy."""
        z = -y.abs() * 2
        bumps = torch.special.ndtr(z + 5) + torch.special.ndtr(z - 5)
        middle = torch.special.ndtr(z / 1.7)
        return -y.sign() * torch.logit(bumps / levels + (1 - 2 / levels) * middle)

    y = torch.linspace(-4.25, 4.25, 69, dtype=torch.float64)  # -8.5 to 8.5, halved
    y = y[y != 0].requires_grad_()
    x = logit_of(y)
    (slope,) = torch.autograd.grad(x.sum(), y)
    found = layer(x.detach().view(-1, 1, 1))
    assert_same(found[0].flatten(), y, 1e-9)
    assert_same(found[1].exp(), 1 / slope, 1e-9)
    between = torch.linspace(-4.2, 4.2, 1000, dtype=torch.float64)
    assert_same(layer(logit_of(between).view(-1, 1, 1))[0].flatten(), between, 2e-3)
    beyond = torch.tensor([-200.0, -100, 100, 200], dtype=torch.float64).view(-1, 1, 1)
    y, log_slope = layer(beyond)
    assert_same(log_slope[0], log_slope[1], 0)
    assert_same(y[0] - y[1], -100 * log_slope[0].exp().view(1, 1), 1e-9)
    assert_same(y[2:], -y[:2].flip(0), 1e-9)


def test_a_residual_is_that_of_float64() -> None:
    """W x cancels: in float32 what is left of z is rounding, which no x of float32 avoids."""
    layer = PointwiseConv(2)
    with torch.no_grad():
        layer.order.copy_(torch.arange(2))
        layer.sign.fill_(1)
        layer.lower.copy_(torch.tensor([[0.0, 0], [0.99999, 0]]))
        layer.upper.copy_(torch.tensor([[0.0, 1e4], [0, 0]]))
        layer.log_scale.copy_(torch.tensor([6.0, -6.0]))
    z = torch.randn(64, 2, 3, 3)
    result = mint.invert(layer, z, mint.FixedPoint())  # on a CPU, Auto solves in float64
    exact = copy.deepcopy(layer).double()
    truth = (exact(result.x.double())[0] - z).abs().flatten(1).amax(1)
    truth /= z.abs().flatten(1).amax(1).clamp(min=1)
    assert_same(result.residual.double(), truth.detach(), 1e-7)
    assert torch.equal(result.converged, truth <= 1e-5)


@pytest.mark.parametrize("kind", adversarial_parts.KINDS)
def test_no_answer_is_false_for_adversarial_stages(kind: str) -> None:
    """See there: ``python -m tests.adversarial_parts`` goes through as many as one likes."""
    counts = sum(
        (adversarial_parts.judge(adversarial_parts.make(seed, kind)) for seed in range(25)),
        Counter[str](),
    )
    assert counts["converged"] > 0.25 * counts["samples"]
    assert counts["bounded"] > 0.5 * counts["samples"]


@pytest.mark.parametrize("kind", KINDS)
def test_verify(kind: str) -> None:
    module, x = make(kind, batch=2)
    report = mint.verify(module, x)
    assert report.ok, str(report)
    assert ("  any" in str(report)) == any(
        isinstance(one, PointwiseConv | ConditionalPrior) for one in module.modules()
    )


class WrongNorm(ActNorm):
    """Planted fault: the shift depends on the neighbour."""

    def evaluator(self) -> Evaluator:
        sound = super().evaluator()
        return lambda x: (sound(x)[0] + 1e-6 * x.roll(1, 1), sound(x)[1])


class WrongConv(PointwiseConv):
    """Planted fault: one part in a million of the determinant is amiss."""

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super()._forward(x)
        return y, log_det + 1e-6


class WrongMixture(LogisticMixture):
    """Planted fault: weights that do not sum to 1 in the slope."""

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = super()._map(x)
        return y, log_slope + 1e-6


class WrongSpline(LevelSpline):
    """Planted fault: one part in a million of the slope on the right side is amiss."""

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = super()._map(x)
        return y, log_slope + 1e-6 * (x > 0)


class WrongPrior(ConditionalPrior):
    """Planted fault: the inverse forgets how wide the scale may be."""

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        mean, log_scale = self.network(z[:, self.kept :]).chunk(2, 1)
        x = torch.cat([z[:, : self.kept] * log_scale.exp() + mean, z[:, self.kept :]], 1)
        return self.solve_exactly(z, x, solver, trace=trace, reference=reference)


class WrongFactor(FactorOut):
    """Planted fault: what is set aside is changed, and the determinant keeps still."""

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super()._forward(x)
        return torch.cat([z[:, :1] * 1.001, z[:, 1:]], 1), log_det


@pytest.mark.parametrize(
    "module",
    [
        WrongNorm(2),
        WrongConv(2),
        WrongSpline(2, 5),
        WrongMixture(2, 4),
        WrongPrior(2, 1),
        WrongFactor(mint.MintPair(1, 4, 2), 1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_planted_faults_are_found(module: mint.Invertible) -> None:
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    for wrong in (moved(module), InvertibleSequential(module, ActNorm(2)).double()):
        assert not mint.verify(wrong, x).ok


# ---------------------------------------------------------------- starting from data


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


def nan_in(x: Tensor) -> Tensor:
    x[0, 0, 0, 0] = math.nan
    return x


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


# ---------------------------------------------------------------- copies and files


@some_kinds
def test_copies(kind: str) -> None:
    module, x = make(kind)
    expected = module(x)
    other, _ = make(kind)
    other.load_state_dict(module.state_dict())
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), other):
        assert_same(copied(x), expected, 0)
        assert_same(copied.inverse(expected[0].detach())[0], x, 1e-8)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
    assert_same(module(x), expected, 0)


@pytest.mark.parametrize("size", [(4, 4), (8,)], ids=str)
def test_saved_and_loaded(size: tuple[int, ...], tmp_path: Path) -> None:
    flow = small_flow(*size)
    x = torch.randn(5, 2, *size)
    flow.initialise(x)
    mint.save(flow, tmp_path / "flow.safetensors")
    loaded = mint.load(tmp_path / "flow.safetensors")
    assert isinstance(loaded, mint.MintNet)
    assert loaded.arguments == flow.arguments
    assert_same(loaded(x), flow(x), 0)
    assert_same(loaded.sample(2, torch.Generator().manual_seed(1)),
                flow.sample(2, torch.Generator().manual_seed(1)), 0)  # fmt: skip


# ---------------------------------------------------------------- what torch's own modules bear


@some_kinds
def test_batches_and_layouts(kind: str) -> None:
    module, x = make(kind)
    z, log_det = (one.detach() for one in module(x))
    for count in (0, 1):
        some, own = module(x[:count])
        assert_same((some, own), (z[:count], log_det[:count]), 1e-12)
        result = mint.invert(module, z[:count], certify=True)
        assert_same(result.x, x[:count], 1e-8)
        assert result.error_bound is not None
        assert result.error_bound.shape == result.converged.shape == (count,)
    assert all(bool((one == 0).all()) for one in gradients(module, module(x[:0])).values())
    assert_same(module.inverse(z[:0].requires_grad_())[1].sum().item(), 0.0)
    last = {"memory_format": torch.channels_last}
    for other in (
        x.contiguous(**last),
        x.mT.contiguous().mT,
        x.repeat(1, 2, 1, 1)[:, ::2][:, [0, 0]],
    ):
        plain = other.contiguous()
        assert_same(module(other), module(plain), 1e-12)
    for other in (z.contiguous(**last), z.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_same(module.inverse(other), module.inverse(z), 1e-8)
    assert_same(module.to(**last)(x), (z, log_det), 1e-12)


@pytest.mark.parametrize(
    "kind", [*list(ON_IMAGES)[:-1], pytest.param("flow", marks=pytest.mark.full)]
)
def test_compiled_exported_and_transformed(kind: str) -> None:
    module, x = make(kind)
    expected = module(x)
    compiled: Any = torch.compile(module, fullgraph=True, backend="eager")
    assert_same(compiled(x), expected)
    assert_same(gradients(module, compiled(x)), gradients(module, module(x)))
    exported = torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    assert_same(exported.module()(x[:2]), tuple(one[:2] for one in expected))
    found = torch.func.jacrev(lambda v: module(v[None])[0][0])(x[0])
    assert_same(found.reshape(32, 32), jacobian(module, x[0]))
    assert_same(torch.func.vmap(lambda v: module(v[None])[0][0])(x), expected[0])
    parameters = {name: one.detach() for name, one in module.named_parameters()}
    by_parameters = torch.func.grad(lambda given: total(functional_call(module, given, (x,))))
    found_by = by_parameters(parameters)
    assert_same(found_by, gradients(module, module(x)))
    single = x.float()
    with FakeTensorMode() as mode:
        ghost = ON_IMAGES[kind]()
        assert [one.shape for one in ghost(mode.from_tensor(single))] == [
            one.shape for one in expected
        ]


@some_kinds
def test_the_meta_device(kind: str) -> None:
    module, x = make(kind)
    expected = [one.shape for one in module(x)]
    with torch.device("meta"):
        made = ON_IMAGES[kind]().double()
    for ghost in (copy.deepcopy(module).to("meta"), made):
        assert [one.shape for one in ghost(x.to("meta"))] == expected
        with pytest.raises(NotImplementedError, match="z has no values"):
            ghost.inverse(ghost(x.to("meta"))[0])
    ghost.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_same(ghost(x), module(x), 0)


@some_kinds
def test_parameters_start_anew(kind: str) -> None:
    with torch.device("meta"):
        module = ON_IMAGES[kind]()
    module.to_empty(device="cpu")
    for one in module.modules():
        if callable(start := getattr(one, "reset_parameters", None)):
            start()
    x = torch.randn(2, 2, 4, 4)
    assert_same(module.inverse(module(x)[0].detach())[0], x, 1e-4)


@some_kinds
def test_autocast(kind: str) -> None:
    module, x = make(kind, torch.float32)
    exact, exact_log_det = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = module(x)
        assert log_det.dtype == torch.float32
        back, _ = module.inverse(exact.detach())
    assert back.dtype == torch.float32
    assert_same(back, x, 1e-2)
    assert_same(z.float(), exact, 0.3)
    assert_same(log_det, exact_log_det, 1.0)


@some_kinds
def test_parameters_that_are_not_trained(kind: str) -> None:
    module, x = make(kind)
    z = module(x)[0].detach()
    calls = ((module, x.requires_grad_()), (module.inverse, z.requires_grad_()))
    expected = [torch.autograd.grad(total(call(at)), at)[0] for call, at in calls]
    module.requires_grad_(False)
    for (call, at), gradient in zip(calls, expected, strict=True):
        assert_same(torch.autograd.grad(total(call(at)), at)[0], gradient, 1e-9)
    assert not module.inverse(z.detach())[0].requires_grad


@some_kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind: str, reentrant: bool) -> None:
    module, x = make(kind)
    expected = gradients(module, module(x.requires_grad_()))
    found = gradients(module, checkpoint(module, x, use_reentrant=reentrant))
    assert_same(found, expected, 1e-10)


class Counting(nn.Module):
    calls = 0

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        return value


@some_kinds
def test_computed_parameters(kind: str) -> None:
    """Parametrized: once a call, as torch's modules do; pruned: seen forward and backward."""
    module, x = make(kind)
    expected = module(x)
    z = expected[0].detach()
    counts = []
    for owner in list(module.modules()):
        for name, _ in list(owner.named_parameters(recurse=False)):
            counts.append(Counting())
            parametrize.register_parametrization(owner, name, counts[-1])
            counts[-1].calls = 0
    assert_same(module(x), expected, 1e-12)
    assert {count.calls for count in counts} == {1}
    assert_same(module.inverse(z)[0], x, 1e-8)
    assert {count.calls for count in counts} == {2}

    module, x = make(kind)
    for owner in list(module.modules()):
        if isinstance(owner, ActNorm | PointwiseConv | LevelSpline | LogisticMixture | nn.Conv2d):
            names = {nn.Conv2d: "weight", LevelSpline: "log_slope"}
            name = names.get(type(owner), "log_scale")
            prune.random_unstructured(owner, name, 0.5)
            with torch.no_grad():
                owner.get_parameter(f"{name}_orig").add_(1.0)
    before = module(x)
    assert_same(module.inverse(before[0].detach())[0], x, 1e-7)
    found = gradients(module, module.inverse(before[0].detach()))
    assert all(bool(one.isfinite().all()) for one in found.values())
    pruned = [one for name, one in found.items() if name.endswith("_orig")]
    assert all(float(one.abs().sum()) > 0 for one in pruned)


def test_hooks_that_compute_run_once_a_call() -> None:
    for module in (ActNorm(2), PointwiseConv(2), LevelSpline(2, 5), LogisticMixture(2, 4),
                   ConditionalPrior(2, 1)):  # fmt: skip
        calls: list[int] = []
        x = torch.randn(2, 2, 4, 4)
        if isinstance(module, ConditionalPrior):
            module.network[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        else:
            module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        module(x)
        assert len(calls) == 1, type(module)


def test_spectral_and_weight_norm() -> None:
    layer = PointwiseConv(3)
    parametrizations.weight_norm(layer, "upper")
    parametrizations.spectral_norm(layer, "lower")
    norm = nn.utils.parametrizations.weight_norm(ActNorm(3, 4), "shift")
    with torch.no_grad():
        norm.parametrizations.shift.original1.add_(1.0)
    x = torch.randn(2, 3, 4, 4)
    for module in (layer.eval(), norm.eval()):
        z = module(x)[0].detach()
        assert_same(module.inverse(z)[0], x, 1e-4)
        assert gradients(module, module.inverse(z))


@pytest.mark.parametrize("kind", ["factor out", "flow"])
def test_hooks_of_parts_run_where_they_are_called(kind: str) -> None:
    """As in any chain: all forward hooks in a forward pass, none in an inverse."""
    module, x = make(kind)
    parts = [one for one in module.modules() if isinstance(one, mint.Invertible)]
    seen: list[nn.Module] = []
    for part in parts:
        part.register_forward_hook(lambda one, *_: seen.append(one))
        part.register_full_backward_hook(lambda one, *_: None)
    x.requires_grad_()
    z = module(x)[0]
    total((z,)).backward()
    assert Counter(map(id, seen)) == Counter(map(id, parts))
    seen.clear()
    module.inverse(z.detach())
    assert seen == []
    # One that changes what a part gives is found out.
    part = next(one for one in parts if isinstance(one, PointwiseConv))
    part.register_forward_hook(lambda _m, _i, output: (output[0] + 1, output[1]))
    assert not mint.verify(module, x[:1].detach()).ok


def test_modules_of_torchs_around_parts() -> None:
    x = torch.randn(2, 3, 4, 4)
    inner = torch.compile(mint.MintPair(2, 4, 2), backend="eager")
    assert isinstance(inner, nn.Module)
    first: Any = torch.compile(PointwiseConv(3), backend="eager")
    module = InvertibleSequential(first,
                                  FactorOut(inner, 1))  # fmt: skip
    assert module.input_shape == (3, None, None)
    assert module.output_shape == (3, 4, 4)
    with torch.no_grad():
        assert_same(module.inverse(module(x)[0])[0], x, 1e-4)
    assert mint.verify(module, x[:1]).ok


def test_sequences_are_those_of_torch() -> None:
    norm = ActNorm(2)
    nn.init.constant_(norm.log_scale, 0.5)
    module = InvertibleSequential(norm, PointwiseConv(2), norm)  # the same one again
    x = torch.randn(2, 2, 3, 3)
    z, log_det = module(x)
    assert_same(log_det, torch.full((2,), 2 * 2 * 9 * 0.5))
    assert_same(module.inverse(z)[0], x, 1e-5)
    assert isinstance(module[1:], InvertibleSequential)
    assert_same(module[2:](module[:2](x)[0])[0], z)
    assert module[0] is module[-1] is norm
    nothing = InvertibleSequential()
    named: Any = OrderedDict(norm=norm)
    assert_same(nothing(x)[0], x)
    assert_same(nothing.inverse(x)[1], torch.zeros(2))
    assert (nothing.input_shape, nothing.output_shape) == (None, None)
    nothing.append(norm)
    assert nothing.input_shape == (2, None, None)
    with pytest.raises(TypeError, match="map 1 must be an Invertible, got Linear"):
        InvertibleSequential(norm, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="map 0 must be an Invertible, got OrderedDict"):
        InvertibleSequential(named)


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: ActNorm(0), ValueError, "channels must be at least 1, got 0"),
        (lambda: ActNorm(2, (0, 1)), ValueError, "size must be at least 1, got 0"),
        (lambda: ActNorm(2, axes=4), ValueError, "axes must be 1, 2 or 3, got 4"),
        (lambda: PointwiseConv(cast(Any, "3")), TypeError, "channels must be an integer, got '3'"),
        (lambda: PointwiseConv(3, 4), ValueError, "axes must be 1, 2 or 3, got 4"),
        (lambda: LevelSpline(2, 2), ValueError, "levels must be at least 3, got 2"),
        (lambda: LevelSpline(2, 3, axes=4), ValueError, "axes must be 1, 2 or 3, got 4"),
        (lambda: LogisticMixture(2, 4, 0), ValueError, "components must be at least 1, got 0"),
        (lambda: LogisticMixture(2, (1, 1, 1, 1)), ValueError, "size must be an integer or"),
        (lambda: FactorOut(nn.Linear(2, 2), 1), TypeError, "inner must be an Invertible, got Lin"),
        (lambda: FactorOut(ActNorm(2), 0), ValueError, "kept must be at least 1, got 0"),
        (
            lambda: FactorOut(ActNorm(2), cast(Any, 1.5)),
            TypeError,
            "kept must be an integer, got 1.5",
        ),
        (lambda: ConditionalPrior(2, 2), ValueError, "kept must be below channels=2, got 2"),
        (lambda: ConditionalPrior(3, 1, 0), ValueError, "width must be at least 1, got 0"),
        (lambda: ConditionalPrior(3, 1, axes=4), ValueError, "axes must be 1, 2 or 3, got 4"),
        (lambda: small_flow(4, 4, level_spline=2), ValueError, "levels must be at least 3, got 2"),
        (lambda: small_flow(4, 4, mixture=0), ValueError, "mixture must be at least 1, got 0"),
        (lambda: small_flow(4, 4, actnorm=1), TypeError, "actnorm must be true or false, got 1"),
        (lambda: small_flow(4, 4, mixin=True), TypeError, "no argument 'mixin'; its parts are"),
        (
            lambda: small_flow(4, 4, factor_out=False),
            ValueError,
            "conditional_prior is of what is factored out: give factor_out=True",
        ),
        (
            lambda: small_flow(4, 4, conditional_prior=True),
            TypeError,
            "conditional_prior must be an integer, got True",
        ),
    ],
)
def test_bad_arguments(make_it: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_it()


def test_bad_inputs() -> None:
    for part in (ActNorm(3), PointwiseConv(3), LevelSpline(3, 5), LogisticMixture(3, 4),
                 ConditionalPrior(3, 1), FactorOut(ActNorm(2), 1)):  # fmt: skip
        with pytest.raises(ValueError, match="dimension 1 is 4, expected 3"):
            part(torch.randn(2, 4, 4, 4))
        with pytest.raises(ValueError, match="x must have 4 dimensions"):
            part(torch.randn(2, 3, 4))
        with pytest.raises(TypeError, match=r"x is torch\.float64"):
            part(torch.randn(2, 3, 4, 4).double())
        with pytest.raises(ValueError, match="z is on meta, the module's parameters on cpu"):
            part.inverse(torch.randn(2, 3, 4, 4, device="meta"))
        with pytest.raises(mint.NonFiniteError, match="z holds 1 NaN"):
            part.inverse(nan_in(torch.randn(2, 3, 4, 4)))
        with pytest.raises((TypeError, ValueError), match="context"):
            part(torch.randn(2, 3, 4, 4), torch.randn(2, 3))
    with pytest.raises(ValueError, match="dimension 2 is 5, expected 4"):
        LogisticMixture(3, 4)(torch.randn(2, 3, 5, 4))
    with pytest.raises(ValueError, match="dimension 1 is 1, expected 3"):
        FactorOut(InvertibleSequential(PointwiseConv(2)), 1)(torch.randn(2, 1, 4, 4))


def test_an_overflow_inside_is_named() -> None:
    flow = small_flow(4, 4)
    with torch.no_grad():
        flow.get_submodule("layers.2").get_parameter("log_scale").fill_(1e5)
    with pytest.raises(mint.NonFiniteError, match=r"inside the network, entering 'layers\.3'"):
        flow(torch.randn(2, 2, 4, 4))
    flat = ActNorm(1)
    nn.init.constant_(flat.log_scale, -1e5)
    with pytest.raises(mint.SingularJacobianError, match="of ActNorm are zero"):
        flat(torch.randn(1, 1, 2, 2))
    assert not bool(mint.invert(flat, torch.ones(1, 1, 2, 2)).converged.any())


def test_what_is_left_aside_is_moved_as_the_rest_is() -> None:
    x = torch.randn(2, 3, 4, 4)
    squeeze = mint.Squeeze()
    module = FactorOut(InvertibleSequential(squeeze, FactorOut(squeeze, 2)), 1)
    assert module.output_shape is None or module.output_shape[0] in (None, 48)
    z, log_det = module(x)
    once = squeeze(x[:, 1:])[0]
    parts = [squeeze(squeeze(x[:, :1])[0])[0], squeeze(once[:, :2])[0], squeeze(once[:, 2:])[0]]
    assert_same(z, torch.cat(parts, 1), 0)
    assert_same(log_det, torch.zeros(2), 0)
    assert_same(module.inverse(z)[0], x, 0)
    assert [name for name, _ in module.stages()] == ["inner.0", "inner.1.inner"]
