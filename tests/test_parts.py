"""Stages beyond the paper, alone and inside flows: what is true of Mint layers is true of them."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import mintnet_triton as mint
from mintnet_triton.parts import (
    ActNorm,
    ConditionalPrior,
    FactorOut,
    InvertibleSequential,
    LevelSpline,
    LogisticMixture,
    PointwiseConv,
)
from mintnet_triton.solvers import Evaluator, Solution, Solver
from tests import adversarial_parts
from tests.jacobian import BOTH, in_order, jacobian
from tests.stages import (
    DTYPES,
    KINDS,
    assert_same,
    make,
    moved,
    nan_in,
    small_flow,
    some_kinds,
    total,
)

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
