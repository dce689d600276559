"""The wavefront: its schedule against a dependency graph, its solutions against mathematics."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import mintnet_triton as mint
from mintnet_triton.kernels import fronts, reference
from mintnet_triton.kernels.activation import NAMES, find_activation
from mintnet_triton.kernels.cpu import products as cpu_products
from mintnet_triton.kernels.fronts import Slopes, Wave
from mintnet_triton.kernels.reference import MintWeights
from mintnet_triton.ordering import Order, Ordering, Triangle
from tests.jacobian import jacobian

Solver = Callable[..., Wave]


def dependencies(kernel: int, colours: int, height: int, width: int, order: Order) -> Tensor:
    """(n, n), 1 where a convolution's output (first) sees an input, in a lower triangle."""
    mask = Ordering(order, "lower").conv_mask(colours, kernel)
    weight = mask.double()
    n = colours * height * width
    inputs = torch.eye(n, dtype=torch.float64).view(n, colours, height, width)
    outputs = torch.nn.functional.conv2d(inputs, weight, padding="same")
    return outputs.flatten(1).T


def depths(seen: Tensor, shape: tuple[int, ...], order: Order) -> Tensor:
    """The length of the longest chain of dependencies that ends in each variable, (C, H, W)."""
    ranked = Ordering(order, "lower").rank(*shape).flatten().argsort()
    depth = torch.zeros(len(seen), dtype=torch.int64)
    for variable in ranked.tolist():
        before = seen[variable].clone()
        before[variable] = False
        if bool(before.any()):
            depth[variable] = depth[before].max() + 1
    return depth.view(shape)


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize(
    "kernels", [(1, 1, 1), (3, 3, 3), (5, 5, 5), (1, 3, 1), (5, 3, 1), (3, 1, 3), (7, 7, 7)]
)
def test_schedule_is_legal_and_as_short_as_can_be(
    kernels: tuple[int, int, int], order: Order
) -> None:
    radius = max(kernels) // 2
    for shape in product((1, 3, 4), (1, 2, 5, 9), (1, 4, 9)):
        graphs = [dependencies(kernel, *shape, order) for kernel in kernels]
        seen = (graphs[2] @ graphs[1] @ graphs[0]) > 0
        numbers = fronts.front_numbers(*shape, radius, order)
        flat = numbers.flatten()
        later = seen & ~torch.eye(len(seen), dtype=torch.bool)
        assert not bool((later & (flat[:, None] <= flat[None, :])).any()), shape
        assert int(flat.min()) == 0
        if len(set(kernels)) == 1 and min(shape[1:]) > radius:
            assert torch.equal(numbers, depths(seen, shape, order)), shape


def test_fronts_of_the_paper_s_models() -> None:
    def count(order: Order, colours: int, height: int, width: int) -> int:
        return int(fronts.front_numbers(colours, height, width, 1, order).max()) + 1

    cifar10 = [(3, 32, 32), (12, 16, 16), (48, 8, 8)]
    assert [count("channel", *shape) for shape in cifar10] == [102, 90, 210]
    assert [count("pixel", *shape) for shape in cifar10] == [282, 552, 1056]
    mnist = [(1, 28, 28), (4, 14, 14), (16, 7, 7)]
    assert [count("channel", *shape) for shape in mnist] == [82, 52, 79]


def random_layer(
    channels: int,
    size: tuple[int, int],
    hidden: int,
    order: Order = "channel",
    triangle: Triangle = "lower",
    kernel_size: tuple[int, int, int] = (3, 3, 3),
    activation: str = "elu",
) -> mint.MintLayer:
    """A float64 layer far from the identity."""
    layer = mint.MintLayer(channels, size, hidden, triangle, order, kernel_size, activation)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "t":
                parameter.uniform_(0.3, 1.5)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(std=0.5 if fan_in == 1 else 1.5 / fan_in**0.5)
    return layer.double()


def weights_of(layer: mint.MintLayer) -> MintWeights:
    return MintWeights(*(weight.detach() for weight in layer.effective_weights()))


CASES = [
    (1, (6, 6), 5, (3, 3, 3), "elu"),
    (3, (7, 5), 4, (3, 3, 3), "leaky_relu"),
    (4, (3, 6), 9, (5, 3, 1), "softplus"),
    (2, (5, 4), 3, (1, 3, 5), "tanh"),
    (2, (5, 4), 17, (3, 1, 3), "sigmoid"),
    (5, (2, 3), 2, (1, 1, 1), "identity"),
    (2, (1, 1), 1, (3, 3, 3), "elu"),
    (12, (4, 4), 6, (3, 3, 3), "elu"),
    (1, (2, 9), 3, (7, 5, 7), "elu"),
]


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_wavefront_inverts(
    case: tuple[int, tuple[int, int], int, tuple[int, int, int], str],
    order: Order,
    triangle: Triangle,
    solve: Solver,
) -> None:
    channels, size, hidden, kernels, activation = case
    layer = random_layer(channels, size, hidden, order, triangle, kernels, activation)
    x = 2 * torch.randn(5, channels, *size, dtype=torch.float64)
    with torch.no_grad():
        y, diagonal = layer.forward_and_diagonal(x)
    wave = solve(y, weights_of(layer), layer.activation, order, triangle)
    with torch.no_grad():
        again, _ = layer(wave.x)
    assert float((again - y).abs().max()) < 1e-12 * max(1.0, float(y.abs().max()))
    torch.testing.assert_close(wave.x, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(wave.diagonal, diagonal, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(wave.error, again - y, rtol=0, atol=1e-12 * float(y.abs().max()))
    assert wave.steps.dtype == torch.int64
    assert 0 < int(wave.steps.max()) < 30


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("order", ["channel", "pixel"])
def test_linear_wavefront_solves_with_the_jacobian_and_its_transpose(
    order: Order, triangle: Triangle, solve: Solver
) -> None:
    layer = random_layer(3, (5, 4), 4, order, triangle, (3, 5, 1))
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    right = torch.randn_like(x)
    weights = weights_of(layer)
    _, h1, h2 = reference.mint_map(x, weights, layer.activation, order, triangle)
    assert layer.activation.slope is not None
    slopes = Slopes(layer.activation.slope(h1), layer.activation.slope(h2))
    transposed = fronts.transpose_weights(weights)
    twice = fronts.transpose_weights(transposed)
    opposite = "upper" if triangle == "lower" else "lower"
    solved = solve(right, twice, slopes, order, triangle)
    solved_transposed = solve(
        right, transposed, Slopes(slopes.second, slopes.first), order, opposite
    )
    for sample in range(2):
        exact = jacobian(layer, x[sample])
        column = right[sample].flatten()
        expected = torch.linalg.solve(exact, column).view_as(x[0])
        torch.testing.assert_close(solved.x[sample], expected, rtol=1e-9, atol=1e-10)
        diagonal = exact.diagonal().view_as(x[0])
        torch.testing.assert_close(solved.diagonal[sample], diagonal, rtol=1e-10, atol=1e-10)
        expected = torch.linalg.solve(exact.T, column).view_as(x[0])
        torch.testing.assert_close(solved_transposed.x[sample], expected, rtol=1e-9, atol=1e-10)


def stiff(value: float, slope: float, activation: str = "tanh") -> mint.MintLayer:
    """One unknown: ``slope x + 30 h(value h(value x))``."""
    layer = mint.MintLayer(1, 1, 1, activation=activation).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.t.fill_(slope)
        for conv, weight in ((layer.conv1, value), (layer.conv2, value), (layer.conv3, 30.0)):
            conv.weight[0, 0, 1, 1] = weight
    return layer


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "elu", "leaky_relu"])
@pytest.mark.parametrize("slope", [1.0, 1e-3, 1e-9, 1e-12])
@pytest.mark.parametrize("value", [1.0, 30.0, 1e4])
def test_steep_steps_on_a_flat_floor_are_solved(
    value: float, slope: float, activation: str, solve: Solver
) -> None:
    """Where Newton's method alone jumps to and fro."""
    layer = stiff(value, slope, activation)
    x = torch.linspace(-3, 3, 61, dtype=torch.float64).view(-1, 1, 1, 1)
    x = torch.cat([x, torch.tensor([1e-9, -1e-5, 1e4]).double().view(-1, 1, 1, 1)])
    with torch.no_grad():
        z, _ = layer(x)
    wave = solve(z, weights_of(layer), layer.activation, "channel", "lower")
    with torch.no_grad():
        again, diagonal = layer.forward_and_diagonal(wave.x)
    # No x is nearer: it is off by no more than rounding of x and of z allow.
    allowed = 1e-14 * (z.abs() + 30) + 4e-16 * diagonal * wave.x.abs()
    assert bool(((again - z).abs() <= allowed).all())
    assert int(wave.steps.max()) < 200


def test_what_overflows_stays_finite_and_is_reported(solve: Solver) -> None:
    layer = random_layer(1, (3, 3), 4)
    with torch.no_grad():
        for conv in (layer.conv1, layer.conv2, layer.conv3):
            conv.weight.fill_(1e200)
    z = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    wave = solve(z, weights_of(layer), layer.activation, "channel", "lower")
    assert bool(wave.x.isfinite().all())
    assert not bool(wave.error.isfinite().flatten(1).all(1).any())


def test_samples_do_not_touch_each_other(solve: Solver) -> None:
    layer = random_layer(2, (4, 5), 3)
    weights = weights_of(layer)
    z = torch.randn(7, 2, 4, 5, dtype=torch.float64)
    together = solve(z, weights, layer.activation, "channel", "lower")
    for sample in range(7):
        alone = solve(z[sample : sample + 1], weights, layer.activation, "channel", "lower")
        torch.testing.assert_close(alone.x[0], together.x[sample], rtol=1e-12, atol=1e-12)


def test_one_pixel_of_one_colour_in_one_sample(solve: Solver) -> None:
    layer = random_layer(1, (1, 1), 4, kernel_size=(1, 1, 1))
    x = torch.randn(1, 1, 1, 1, dtype=torch.float64)
    wave = solve(layer(x)[0].detach(), weights_of(layer), layer.activation, "channel", "lower")
    torch.testing.assert_close(wave.x, x)


def test_float32_is_solved_to_its_rounding() -> None:
    layer = random_layer(2, (5, 5), 4).float()
    x = torch.randn(3, 2, 5, 5)
    with torch.no_grad():
        y, _ = layer(x)
    wave = fronts.wavefront(y, weights_of(layer), layer.activation, "channel", "lower")
    with torch.no_grad():
        again, _ = layer(wave.x)
    assert wave.x.dtype == torch.float32
    torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-5)


def test_every_activation_has_its_steepest_slope() -> None:
    grid = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    for name in NAMES:
        activation = find_activation(name)
        assert activation.steepest is not None
        assert activation.steepest == pytest.approx(
            float(activation.derivative(grid).max()), abs=1e-6
        )


def test_a_bound_below_the_slope_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steepest must be finite and bound .* got 0.5"):
        mint.Activation("half", lambda a: a, torch.ones_like, torch.ones_like, steepest=0.5)


def test_transposing_and_reversing_twice_changes_nothing() -> None:
    weights = weights_of(random_layer(3, (4, 5), 2, kernel_size=(3, 1, 5)))
    for one, other in zip(
        fronts.reverse_weights(fronts.reverse_weights(weights)), weights, strict=True
    ):
        assert torch.equal(one, other)
    twice = fronts.transpose_weights(fronts.transpose_weights(weights))
    for name in ("weight1", "weight2", "weight3", "centre1", "centre2", "centre3", "t"):
        assert torch.equal(getattr(twice, name), getattr(weights, name))
    assert not bool(twice.bias2.any())


@pytest.fixture(params=["torch", "numba"])
def solve(request: pytest.FixtureRequest) -> Solver:
    if request.param == "torch":
        return fronts.wavefront
    pytest.importorskip("numba")
    from mintnet_triton.kernels.cpu import wavefront as cpu_wavefront

    return cpu_wavefront.wavefront


@pytest.mark.parametrize("kernels", [(3, 3, 3), (1, 5, 3)])
def test_the_map_by_matrix_products(kernels: tuple[int, int, int]) -> None:
    layer = random_layer(3, (4, 6), 5, kernel_size=kernels)
    x = torch.randn(3, 3, 4, 6, dtype=torch.float64)
    computed = cpu_products.mint_map(x, weights_of(layer), layer.activation)
    torch.testing.assert_close(computed, layer(x)[0].detach(), rtol=1e-12, atol=1e-12)
