"""Layers made to break inversion, and what each answer must be: ``python -m tests.adversarial``.

In float32: weights up to 100 times those of an ordinary layer, t down to 1e-6, ELU saturated far
below zero, inputs up to 1e4.
"""

import argparse
import copy
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

import mintnet_triton as mint
from mintnet_triton.kernels import fronts
from mintnet_triton.kernels.activation import NAMES
from mintnet_triton.kernels.reference import MintWeights


class Problem(NamedTuple):
    """A layer, and z for which it has an inverse (as it has for every z)."""

    layer: mint.MintLayer
    z: Tensor


def make(seed: int, axes: int = 2, position_bias: int | None = None) -> Problem:
    """A problem of its own for each seed, of images of so many axes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        """Uniform in the logarithm."""
        unit = float(torch.rand((), generator=generator))
        return float(low * (high / low) ** unit)

    def choose(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    channels, size = 1 + choose(3), tuple(2 + choose(4) for _ in range(axes))
    layer = mint.MintLayer(
        channels,
        size,
        1 + choose(6),
        ("lower", "upper")[choose(2)],
        ("channel", "pixel")[choose(2)],
        (1, 3, 3, 5)[choose(4)],
        "elu" if choose(2) else NAMES[choose(len(NAMES))],
        position_bias=position_bias,
    )
    scale = draw(0.3, 100)
    with torch.no_grad():
        for conv in (layer.conv1, layer.conv2, layer.conv3):
            fan_in = conv.weight[0].numel()
            conv.weight.normal_(std=scale / fan_in**0.5, generator=generator)
            assert conv.bias is not None
            conv.bias.normal_(std=draw(0.01, 10), generator=generator)
        if choose(4) == 0:
            layer.conv1.bias.sub_(30 * scale)  # type: ignore[union-attr]  # ELU saturates
        layer.t.copy_(draw(1e-6, 1) * torch.rand(layer.t.shape, generator=generator).add(0.1))
        if layer.position_bias is not None:  # whose t goes further down, and up
            layer.position_bias.weight.normal_(std=draw(0.01, 3), generator=generator)
    z = draw(1e-2, 1e4) * torch.randn(2, channels, *size, generator=generator)
    if choose(2):  # a z that some x of this size gives
        with torch.no_grad():
            image = copy.deepcopy(layer).double()(z.double())[0]
        if bool((image.abs() < 1e30).all()):
            z = image.float()
    return Problem(layer, z)


def judge(problem: Problem) -> Counter[str]:
    """Invert, and check what the result says of itself.

    Returns:
        How many samples converged, and how many have a bound.

    Raises:
        AssertionError: something that it says is not true.
    """
    layer, z = problem
    result = mint.invert(layer, z, certify=True)
    assert result.error_bound is not None
    assert bool(result.x.isfinite().all())
    assert not bool(result.residual.isnan().any())
    assert not bool(result.error_bound.isnan().any())
    exact = copy.deepcopy(layer).double()
    condition = exact._condition_in(torch.float64)
    with torch.no_grad():
        weights = MintWeights(*exact.effective_weights())
        y, _ = exact(result.x.double())
    truth = (y - z).abs().flatten(1).amax(1) / z.abs().flatten(1).amax(1).clamp(min=1)
    false = result.converged & ~(truth <= 1e-5 * (1 + 1e-6))
    assert not bool(false.any()), f"converged, but the residual is {truth[false]}"
    assert layer.ordering is not None
    order, triangle = layer.ordering.order, layer.ordering.triangle
    solution = fronts.wavefront(z.double(), weights, layer.activation, order, triangle, condition).x
    error = (result.x.double() - solution).abs().flatten(1).amax(1)
    beyond = ~(error <= result.error_bound)
    assert not bool(beyond.any()), f"error {error[beyond]}, bound {result.error_bound[beyond]}"
    bounded = result.error_bound.isfinite()
    tight = bounded & (result.error_bound <= 1e-5 * result.x.abs().flatten(1).amax(1).clamp(min=1))
    return Counter(
        samples=len(z),
        converged=int(result.converged.sum()),
        bounded=int(bounded.sum()),
        tight=int(tight.sum()),
        neither=int((~result.converged & ~bounded).sum()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--axes", type=int, default=2)
    parser.add_argument("--position-bias", type=int, help="frequencies; default: none")
    options = parser.parse_args()
    total: Counter[str] = Counter()
    torch.set_num_threads(1)
    for seed in range(options.first, options.first + options.count):
        try:
            total += judge(make(seed, options.axes, options.position_bias))
        except AssertionError as error:
            total["wrong"] += 1
            print(f"seed {seed}: {error}")
    print(dict(total))


if __name__ == "__main__":
    main()
