"""The wavefront in kernels against the plain one in float64."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import mintnet_triton as mint
from bench.contest.cases import CIFAR10, MNIST, Scale, make_layer, relative_rms
from bench.measure.timing import capture
from mintnet_triton.kernels import fronts, reference
from mintnet_triton.kernels.activation import NAMES
from mintnet_triton.kernels.fronts import Slopes, Wave
from mintnet_triton.kernels.reference import MintWeights

pytest.importorskip("triton")

from mintnet_triton.kernels import ranges
from mintnet_triton.kernels.gpu import wavefront
from tests import grid
from tests.test_fronts import stiff, weights_of
from tests.test_masked_conv_kernels import ORDERINGS
from tests.test_mint_layer_kernels import random, random_layer

# Of the interpreter, where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by):RuntimeWarning")


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_launches_are_the_fronts(radius: int, order: str) -> None:
    for colours, height, width in product((1, 2, 5), (1, 2, 7), (1, 3, 8)):
        skew = radius + 1
        found = torch.full((colours, height, width), -1)
        for number, (first, active, plane) in enumerate(
            wavefront.launches(colours, height, width, skew, order)
        ):
            for colour in range(first, first + active):
                of_colour = plane - skew**2 * (colour - first)
                for row in range(height):
                    column = of_colour - skew * row
                    if 0 <= column < width:
                        found[colour, row, column] = number
        if radius == 0:  # one skewed all the same
            assert bool((found.diff(dim=0) > 0).all())
            continue
        numbers = fronts.front_numbers(colours, height, width, radius, order)
        # Some fronts of a small image are empty.
        ranks = (one.unique(return_inverse=True)[1] for one in (found, numbers))
        assert torch.equal(*ranks)


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_ranges_are_what_is_seen_before(kernel: int, order: str) -> None:
    radius = kernel // 2
    for colour in range(4):
        seen = [
            (other, dy, dx)
            for dy, dx in product(range(-radius, radius + 1), repeat=2)
            for other in range(
                *ranges.seen_inputs(colour, colour, 1, 4, dy * kernel + dx, order, "below")
            )
        ]
        assert sorted(seen) == sorted(fronts.seen_before(order, colour, 4, kernel))


def solve(layer: mint.MintLayer, z: Tensor, solver: Any = wavefront) -> Wave:
    ordering = layer.conv1.ordering
    wave = solver.wavefront(
        z, weights_of(layer), layer.activation, ordering.order, ordering.triangle
    )
    assert isinstance(wave, Wave)
    return wave


def assert_solved(layer: mint.MintLayer, z: Tensor, wave: Wave) -> None:
    """f(x) = z to rounding, and all that is said of x is what the plain version says."""
    wide = z.dtype == torch.float64
    exact = copy.deepcopy(layer).double()
    with torch.no_grad(), mint.use_backend("torch"):
        again, _ = exact(wave.x.double())
    grid.assert_near("f(x)", again, z, 1e-13 if wide else 1e-6)
    expected = solve(exact, z.double(), fronts)
    for name in ("x", "diagonal"):
        computed = getattr(wave, name)
        assert computed.dtype == z.dtype
        grid.assert_near(name, computed, getattr(expected, name), 1e-10 if wide else 1e-3)
    scale = float(z.abs().max())
    error = (wave.error.double() - (again - z.double())).abs().max()
    assert float(error) <= (1e-13 if wide else 1e-5) * max(1.0, scale)
    assert wave.steps.dtype == torch.int64
    assert int(wave.steps.min()) >= 0
    assert 0 < int(wave.steps.max()) <= int(expected.steps.max()) + 3


def affordable(case: grid.Case) -> bool:
    """Few taps at few places: the interpreter is slow."""
    kernels, (height, width) = case.get("kernels", 1), case.get("size", (1, 1))
    kernels = kernels if isinstance(kernels, tuple) else (kernels,) * 3
    colours, units = case.get("colours", 1), case.get("units", 1)
    fronts_of_a_colour = (max(kernels) // 2 + 1) * (height - 1) + width
    taps = colours * fronts_of_a_colour * sum(kernel**2 for kernel in kernels)
    few = taps <= 330 and taps * units * colours <= 8000
    return units * colours <= 255 and (grid.FULL or few)


@grid.over(
    affordable,
    main=["colours", "units", "kernels", "ordering", "numbers"],
    colours=[1, 3, 4, 12],
    units=[1, 5, 16, 45, 85],
    kernels=[1, 3, (1, 3, 3), (3, 1, 5)],
    ordering=ORDERINGS,
    activation=NAMES,
    numbers=["float64", "float32"],
    size=[(1, 1), (2, 2), (1, 3)],
    batch=[1, 3],
)
def test_a_layer_is_solved(case: grid.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("colours", "units", "ordering", "kernels", "activation", "size", "numbers")
    layer = random_layer(*(case[name] for name in names))
    x = random(case["batch"], case["colours"], *case["size"], numbers=case["numbers"])
    with torch.no_grad(), mint.use_backend("torch"):
        z, _ = layer(x)
    with grid.guarded(monkeypatch) as launched:
        wave = solve(layer, z)
    assert set(launched) == {"pack_conv_kernel", "wavefront_kernel"}
    assert_solved(layer, z, wave)


def test_several_tiles_and_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front of more unknowns than a tile has, some of whose tiles span samples."""
    layer = random_layer(2, 3, ("channel", "upper"), (1, 3, 1), size=(3, 4))
    z = grid.laid_out(random(9, 2, 3, 4), "sliced")
    with grid.guarded(monkeypatch):
        wave = solve(layer, z)
    assert_solved(layer, z, wave)


@pytest.mark.parametrize("ordering", [("channel", "upper"), ("pixel", "lower")])
def test_kernels_of_three_sizes_on_an_odd_image(
    ordering: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fronts as the widest needs them; colours and units of more than one block."""
    layer = random_layer(3, 7, ordering, (5, 1, 3), size=(3, 5))
    z = random(2, 3, 3, 5)
    with grid.guarded(monkeypatch):
        wave = solve(layer, z)
    assert_solved(layer, z, wave)


@pytest.mark.parametrize(
    ("ordering", "units", "numbers"),  # units of less than a tile, and of a whole one
    [
        (ORDERINGS[0], 19, "float32"),
        (ORDERINGS[1], 19, "float64"),
        (ORDERINGS[2], 16, "float64"),
    ],
)
def test_a_linear_layer_and_its_transpose_are_solved(
    ordering: Any, units: int, numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, triangle = ordering
    layer = random_layer(2, units, ordering, (1, 3, 1), "elu", (2, 2), numbers)
    x, right = (random(2, 2, 2, 2, numbers=numbers) for _ in range(2))
    weights = weights_of(layer)
    _, h1, h2 = reference.mint_map(x, weights, layer.activation, order, triangle)
    assert layer.activation.slope is not None
    slopes = Slopes(layer.activation.slope(h1), layer.activation.slope(h2))
    transposed = fronts.transpose_weights(weights)
    opposite = "upper" if triangle == "lower" else "lower"
    for linear, given, side in (
        (fronts.transpose_weights(transposed), slopes, triangle),
        (transposed, Slopes(slopes.second, slopes.first), opposite),
    ):
        with grid.guarded(monkeypatch):
            solved = wavefront.wavefront(right, linear, given, order, side)
        expected = fronts.wavefront(
            right.double(),
            MintWeights(*(weight.double() for weight in linear)),
            Slopes(*(slope.double() for slope in given)),
            order,
            side,
        )
        tolerance = 1e-11 if numbers == "float64" else 1e-4
        grid.assert_near("x", solved.x, expected.x, tolerance)
        grid.assert_near("diagonal", solved.diagonal, expected.diagonal, tolerance)


@pytest.mark.parametrize(
    ("value", "slope", "activation"),
    grid.thinned(
        (
            (value, slope, activation)
            for value, slope in ((1.0, 1e-3), (30.0, 1e-9), (1e4, 1.0), (1e4, 1e-12))
            for activation in ("tanh", "sigmoid", "elu", "leaky_relu")
        ),
        kept=[
            (1.0, 1e-3, "sigmoid"),
            (30.0, 1e-9, "elu"),
            (1e4, 1.0, "leaky_relu"),
            (1e4, 1e-12, "tanh"),
        ],
    ),
)
def test_steep_steps_on_a_flat_floor_are_solved(
    value: float, slope: float, activation: str
) -> None:
    """Where Newton's method alone jumps to and fro."""
    layer = stiff(value, slope, activation).to(grid.DEVICE)
    x = torch.cat([torch.linspace(-3, 3, 61), torch.tensor([1e-9, -1e-5, 1e4])])
    x = x.to(grid.DEVICE, torch.float64).view(-1, 1, 1, 1)
    with torch.no_grad(), mint.use_backend("torch"):
        z, _ = layer(x)
        wave = solve(layer, z)
        again, diagonal = layer.forward_and_diagonal(wave.x)
    # No x is nearer: rounding allows no more, of z, of x, and of h, which is rounded as 1 is.
    allowed = 1e-14 * (z.abs() + 30) + 4e-16 * diagonal * (wave.x.abs() + 1 / value)
    assert bool(((again - z).abs() <= allowed).all())
    assert int(wave.steps.max()) < 200


def test_what_overflows_is_reported_and_disturbs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = random_layer(2, 5, activation="identity", size=(2, 3))
    with torch.no_grad():  # so steep off the diagonal that large numbers soon overflow
        centre = layer.conv1.weight[..., 1, 1].clone()
        layer.conv1.weight.mul_(1e6)
        layer.conv1.weight[..., 1, 1] = centre
    z = random(4, 2, 2, 3)
    z[1] *= 1e300
    z[2, 0, 0, 1] = float("nan")
    with grid.guarded(monkeypatch):
        wave = solve(layer, z)
    assert bool(wave.x.isfinite().all())
    for sample in (1, 2):
        assert not bool(wave.error[sample].isfinite().all())
    assert not bool(wave.error[2, 0, 0, 1].isfinite())
    alone = solve(layer, z[::3])
    for name in Wave._fields:
        assert torch.equal(getattr(wave, name)[::3], getattr(alone, name)), name


def test_an_empty_batch() -> None:
    layer = random_layer(2, 3)
    for hidden in (layer.activation, Slopes(*(random(0, 6, 3, 4) for _ in range(2)))):
        wave = wavefront.wavefront(
            random(0, 2, 3, 4), weights_of(layer), hidden, "channel", "upper"
        )
        assert all(field.shape == (0, 2, 3, 4) for field in wave)


def of_scale(scale: Scale, dtype: torch.dtype, **structure: Any) -> tuple[mint.MintLayer, Tensor]:
    """A layer of the paper's models on a GPU, and what 8 samples are mapped to."""
    layer = make_layer(scale, **structure).to(grid.DEVICE, dtype)
    x = torch.randn(8, scale.channels, scale.size, scale.size, device=grid.DEVICE, dtype=dtype)
    with torch.no_grad(), mint.use_backend("torch"):
        z, _ = layer(x)
    return layer, z


def assert_residual(layer: mint.MintLayer, z: Tensor, wave: Wave) -> None:
    with torch.no_grad(), mint.use_backend("torch"):
        again, diagonal = layer.double().forward_and_diagonal(wave.x.double())
    tolerance = 1e-13 if z.dtype == torch.float64 else 1e-5
    assert relative_rms(again, z.double()) <= tolerance
    assert relative_rms(wave.diagonal, diagonal) <= 10 * tolerance
    assert int(wave.steps.max()) < 30


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("scale", [*CIFAR10, *MNIST], ids=str)
def test_the_paper_s_layers(scale: Scale, triangle: str, dtype: torch.dtype) -> None:
    layer, z = of_scale(scale, dtype, triangle=triangle)
    assert_residual(layer, z, solve(layer, z))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pixel_order(dtype: torch.dtype) -> None:
    layer, z = of_scale(CIFAR10[1], dtype, order="pixel")
    assert_residual(layer, z, solve(layer, z))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # CUDA graphs warn of what is no fault here
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_graph_holds_a_whole_layer(dtype: torch.dtype) -> None:
    layer, z = of_scale(CIFAR10[0], dtype)
    eager = solve(layer, z)
    graph, captured = capture(lambda: solve(layer, z))
    for field in captured:
        field.zero_()
    graph.replay()
    for name, one, other in zip(Wave._fields, captured, eager, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.gpu
def test_fronts_are_compiled_once() -> None:
    layer, z = of_scale(CIFAR10[1], torch.float32)
    solve(layer, z)
    cache = wavefront.wavefront_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    solve(layer, z[:5])
    assert len(cache) == before


def test_an_inversion_and_its_gradients_run_in_kernels() -> None:
    layer = random_layer(2, 5, kernels=(1, 3, 1), size=(2, 3))
    z = random(2, 2, 2, 3)
    results = []
    for backend in ("torch", "triton"):
        with mint.use_backend(backend):
            result = mint.invert(layer, z, mint.Wavefront(), certify=True)
            assert result.converged.all()
            assert result.layer_wavefront.all()
            point = z.clone().requires_grad_()
            x, log_det = layer.inverse(point, mint.Wavefront())
            (gradient,) = torch.autograd.grad(x.sum() + log_det.sum(), point)
        results.append((result.x, result.log_det, gradient))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
