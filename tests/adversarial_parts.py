"""Stages beyond the paper, made to break inversion: ``python -m tests.adversarial_parts``.

Scales up to e^±10, splines with steep pieces, components of a mixture far apart or very narrow,
ill-conditioned matrices, priors at the end of their range, and z up to 1e6, in float32 and float64.
What an answer says of itself is checked by numpy's numbers of 64 bits of mantissa, with the stages
written out again.
"""

import argparse
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import mintnet_triton as mint
from mintnet_triton.parts import (
    ActNorm,
    ConditionalPrior,
    FactorOut,
    LevelSpline,
    LogisticMixture,
    PointwiseConv,
)
from mintnet_triton.parts.factor_out import WIDEST

Array = np.ndarray[Any, np.dtype[np.longdouble]]
KINDS = ("actnorm", "pointwise", "mixture", "prior", "factor out", "spline")
SIDE = 2


class Problem(NamedTuple):
    """A stage, and z for which it has an inverse (as it has for every z)."""

    stage: mint.Invertible
    z: Tensor
    solver: mint.Solver


def make(seed: int, kind: str | None = None) -> Problem:
    """A problem of its own for each seed, of a kind drawn at random or given."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of what layers start with

    def draw(low: float, high: float) -> float:
        """Uniform in the logarithm."""
        return float(low * (high / low) ** float(torch.rand((), generator=generator)))

    def choose(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def fill(parameter: Tensor, deviation: float, most: float = float("inf")) -> None:
        values = deviation * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values.clamp(-most, most))

    channels = 1 + choose(4)
    kind = kind or KINDS[choose(len(KINDS))]
    stage: mint.Invertible
    if kind == "actnorm":
        stage = ActNorm(channels, SIDE if choose(2) else None)
        fill(stage.shift, draw(1e-2, 1e4))
        fill(stage.log_scale, draw(0.1, 10), 10)
    elif kind in ("pointwise", "factor out"):
        inner = PointwiseConv(channels)
        fill(inner.log_scale, draw(0.1, 10), 10)
        if choose(2):  # no longer as pivoting would have them
            fill(inner.lower, draw(0.1, 30))
            fill(inner.upper, draw(0.1, 30))
        stage = FactorOut(inner, 1) if kind == "factor out" else inner
    elif kind == "spline":
        stage = LevelSpline(channels, 3 + choose(2**16))
        fill(stage.least, draw(1e-2, 1e3))
        fill(stage.log_height, draw(0.1, 10), 10)
        fill(stage.log_slope, draw(0.1, 10), 10)
    elif kind == "mixture":
        stage = LogisticMixture(channels, SIDE, 1 + choose(8))
        fill(stage.mean, draw(1e-2, 1e3))
        fill(stage.log_scale, draw(0.1, 10), 10)
        fill(stage.logits, draw(0.1, 30))
    else:
        stage = ConditionalPrior(channels + 1, 1, 4)
        for parameter in stage.network.parameters():
            fill(parameter, draw(0.03, 3))
    z = draw(1e-2, 1e6) * torch.randn(
        2, channels + (kind in ("prior", "factor out")), SIDE, SIDE, generator=generator
    )
    if choose(8) == 0:
        z[0] = 0
    dtype = (torch.float32, torch.float64)[choose(2)]
    stage, z = stage.to(dtype), z.to(dtype)
    if choose(2):  # a z that some x of this size gives
        with torch.no_grad():
            image, _ = stage(z)
        if bool(image.isfinite().all()):
            z = image
    # One goes to float64 on a CPU, as none does by itself on a GPU.
    return Problem(stage, z, (mint.Auto(), mint.FixedPoint())[choose(2)])


def _exact(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy().astype(np.longdouble)


def _log_sum_exp(values: Array) -> Array:
    most = values.max(-1)
    found: Array = most + np.log(np.exp(values - most[..., None]).sum(-1))
    return found


def _log_sigmoid(values: Array) -> Array:
    found: Array = np.minimum(values, 0) - np.log1p(np.exp(-np.abs(values)))
    return found


def _convolved(x: Array, layer: Any) -> Array:
    weight, bias = _exact(layer.weight), _exact(layer.bias)
    side = weight.shape[-1]
    edge = side // 2
    padded = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))
    found: Array = np.einsum("bihwrs,oirs->bohw", windows, weight) + bias[:, None, None]
    return found


def _prior(stage: ConditionalPrior, b: Array) -> tuple[Array, Array]:
    first, _, second, _, third = stage.network
    for layer in (first, second):
        b = _convolved(b, layer)
        b = np.where(b > 0, b, np.expm1(np.minimum(b, 0)))
    mean, raw = np.split(_convolved(b, third), 2, 1)
    return mean, WIDEST * np.tanh(raw / WIDEST)


def _triangles(stage: PointwiseConv) -> tuple[Array, Array]:
    lower = np.tril(_exact(stage.lower), -1) + np.eye(stage.channels, dtype=np.longdouble)
    scale = _exact(stage.sign) * np.exp(_exact(stage.log_scale))
    return lower, np.triu(_exact(stage.upper), 1) + np.diag(scale)


def _spline(stage: LevelSpline, channel: int, x: Array) -> Array:
    """y of one channel."""
    knots, heights = _exact(stage.knots), np.exp(_exact(stage.log_height)[channel])
    slopes = np.exp(_exact(stage.log_slope)[channel])
    y = _exact(stage.least)[channel] + np.concatenate([[0], heights.cumsum()])
    piece = np.searchsorted(knots[1:-1], x)
    inside = np.clip(x, knots[0], knots[-1])
    width, height, first, last = (
        values[piece] for values in (np.diff(knots), heights, slopes[:-1], slopes[1:])
    )
    share = (inside - knots[piece]) / width
    mean, both = height / width, share * (1 - share)
    found: Array = y[piece] + height * (mean * share**2 + first * both) / (
        mean + (first + last - 2 * mean) * both
    )
    beyond = np.where(x < inside, slopes[0], slopes[-1])
    found += (x - inside) * beyond
    return found


def _bracket(stage: LevelSpline | LogisticMixture, z: Array) -> tuple[Any, Any]:
    """Of x with f(x) = z."""
    if isinstance(stage, LogisticMixture):
        slopes = np.exp(_exact(stage.log_scale)) * PI / np.sqrt(np.longdouble(3))
        ends = _exact(stage.mean) + slopes * z[..., None]
        return ends.min(-1), ends.max(-1)
    least, most = (np.full_like(z, _exact(stage.knots)[end]) for end in (0, -1))
    slopes = np.exp(_exact(stage.log_slope))
    first, last = slopes[:, 0, None, None], slopes[:, -1, None, None]
    low = least + np.minimum(z - forward(stage, least), 0) / first
    return low, most + np.maximum(z - forward(stage, most), 0) / last


def forward(stage: nn.Module, x: Array) -> Array:
    """f(x) of a stage."""
    y: Array
    if isinstance(stage, FactorOut):
        y = np.concatenate([x[:, : stage.kept], forward(stage.inner, x[:, stage.kept :])], 1)
    elif isinstance(stage, ActNorm):
        y = np.exp(_exact(stage.log_scale)) * (x + _exact(stage.shift))
    elif isinstance(stage, PointwiseConv):
        lower, upper = _triangles(stage)
        middle = np.einsum("ij,bjhw->bihw", upper, x)
        y = np.einsum("ij,bjhw->bihw", lower, middle)[:, stage.order.numpy()]
    elif isinstance(stage, LevelSpline):
        y = np.empty_like(x)
        for channel in range(stage.channels):
            y[:, channel] = _spline(stage, channel, x[:, channel])
    elif isinstance(stage, LogisticMixture):
        logits = _exact(stage.logits)
        weights = logits - _log_sum_exp(logits)[..., None]
        scaled = (x[..., None] - _exact(stage.mean)) * np.exp(-_exact(stage.log_scale))
        below = _log_sum_exp(weights + _log_sigmoid(scaled))
        above = _log_sum_exp(weights + _log_sigmoid(-scaled))
        y = np.sqrt(np.longdouble(3)) / PI * (below - above)
    else:
        assert isinstance(stage, ConditionalPrior)
        a, b = x[:, : stage.kept], x[:, stage.kept :]
        mean, log_scale = _prior(stage, b)
        y = np.concatenate([(a - mean) * np.exp(-log_scale), b], 1)
    return y


def inverse(stage: nn.Module, z: Array) -> Array:
    """x with f(x) = z; of a mixture or a spline, by halving a bracket."""
    x: Array
    if isinstance(stage, FactorOut):
        x = np.concatenate([z[:, : stage.kept], inverse(stage.inner, z[:, stage.kept :])], 1)
    elif isinstance(stage, ActNorm):
        x = z / np.exp(_exact(stage.log_scale)) - _exact(stage.shift)
    elif isinstance(stage, PointwiseConv):
        lower, upper = _triangles(stage)
        x = z[:, np.argsort(stage.order.numpy())]
        for row in range(stage.channels):
            x[:, row] -= np.einsum("j,bjhw->bhw", lower[row, :row], x[:, :row])
        for row in reversed(range(stage.channels)):
            later = slice(row + 1, None)
            x[:, row] -= np.einsum("j,bjhw->bhw", upper[row, later], x[:, later])
            x[:, row] /= upper[row, row]
    elif isinstance(stage, LevelSpline | LogisticMixture):
        low, high = _bracket(stage, z)
        for _ in range(110):
            x = (low + high) / 2
            less = forward(stage, x) < z
            low, high = np.where(less, x, low), np.where(less, high, x)
        x = (low + high) / 2
    else:
        assert isinstance(stage, ConditionalPrior)
        a, b = z[:, : stage.kept], z[:, stage.kept :]
        mean, log_scale = _prior(stage, b)
        x = np.concatenate([a * np.exp(log_scale) + mean, b], 1)
    return x


PI = np.arctan2(np.longdouble(0), np.longdouble(-1))


def _largest(values: Array) -> Array:
    found: Array = np.abs(values).reshape(len(values), -1).max(1)
    return found


def judge(problem: Problem) -> Counter[str]:
    """Invert, and check what the result says of itself.

    Returns:
        How many samples converged, and how many have a bound.

    Raises:
        AssertionError: something that it says is not true.
    """
    stage, z, solver = problem
    result = mint.invert(stage, z, solver, certify=True)
    assert result.error_bound is not None
    assert bool(result.x.isfinite().all())
    assert not bool(result.residual.isnan().any())
    assert not bool(result.error_bound.isnan().any())
    assert not bool(result.log_det[result.converged].isnan().any())
    x, target = _exact(result.x), _exact(z)
    truth = _largest(forward(stage, x) - target) / np.maximum(1, _largest(target))
    converged = result.converged.numpy()
    # A residual in float64 is itself rounded, relative to what it is a sum of.
    ((_, part),) = stage.stages()
    with torch.no_grad():
        size = part.in_dtype(torch.float64).magnitude(result.x.double())
    rounding = 8 * 2.0**-52 * _largest(_exact(size)) / np.maximum(1, _largest(target))
    false = converged & ~(truth <= result.tolerance * (1 + 1e-6) + rounding)
    assert not false.any(), f"converged, but the residual is {truth[false]}"
    error = _largest(x - inverse(stage, target.copy()))
    bound = result.error_bound.numpy()
    beyond = ~(error <= bound)
    assert not beyond.any(), f"error {error[beyond]}, bound {bound[beyond]}"
    return Counter(
        samples=len(z),
        converged=int(converged.sum()),
        bounded=int(np.isfinite(bound).sum()),
        neither=int((~converged & ~np.isfinite(bound)).sum()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    total: Counter[str] = Counter()
    torch.set_num_threads(1)
    for seed in range(options.first, options.first + options.count):
        try:
            total += judge(make(seed))
        except AssertionError as error:
            total["wrong"] += 1
            print(f"seed {seed}: {error}")
    print(dict(total))


if __name__ == "__main__":
    main()
