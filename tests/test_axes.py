"""Series and volumes: all that holds of images, along one axis and along three."""

import copy
import math
import pickle
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d

import mintnet_triton as mint
from mintnet_triton.calculus import Compose, Elementwise, MaskedAffine, Sum
from mintnet_triton.kernels import BackendError, fronts
from mintnet_triton.kernels.canvas import Canvas, Space, offsets
from mintnet_triton.kernels.cpu import products as cpu_products
from mintnet_triton.ordering import Order, Ordering, Triangle
from tests.adversarial import judge, make
from tests.jacobian import assert_triangular_with_log_det, jacobian
from tests.test_fronts import depths, weights_of

ORDERINGS = list(product(("channel", "pixel"), ("lower", "upper")))
SIZES = [(5,), (2, 3, 2)]
KERNELS: list[Any] = [1, 3, 5, (1, 3, 5)]


def random_layer(
    size: tuple[int, ...],
    channels: int = 2,
    hidden: int = 3,
    order: Order = "channel",
    triangle: Triangle = "lower",
    scale: float = 1.5,
    **arguments: Any,
) -> mint.MintLayer:
    """In float64, far from the identity."""
    layer = mint.MintLayer(channels, size, hidden, triangle, order, **arguments).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "t":
                parameter.uniform_(0.3, 1.5)
            else:
                parameter.normal_(std=scale / max(1, parameter[0].numel()) ** 0.5)
    return layer


def random_input(layer: mint.MintLayer, batch: int = 3) -> Tensor:
    return torch.randn(batch, *layer.input_shape, dtype=layer.t.dtype)


# ---------------------------------------------------------------------- masks and schedules


@pytest.mark.parametrize(("order", "triangle"), ORDERINGS)
@pytest.mark.parametrize("size", [(4,), (3, 2), (2, 3, 2)])
def test_masks_hide_what_comes_later_and_nothing_else(
    size: tuple[int, ...], order: Order, triangle: Triangle
) -> None:
    ordering, axes = Ordering(order, triangle), len(size)
    rank = ordering.rank(3, *size).flatten()
    assert sorted(rank.tolist()) == list(range(3 * math.prod(size)))
    inputs = torch.eye(len(rank)).view(-1, 3, *size)
    convolve = (conv1d, conv2d, conv3d)[axes - 1]
    for kernel, strict in product((1, 3, 5), (False, True)):
        mask = ordering.conv_mask(3, kernel, strict=strict, axes=axes)
        near = convolve(inputs, torch.ones_like(mask, dtype=torch.float32), padding="same")
        seen = convolve(inputs, mask.float(), padding="same").flatten(1).T > 0
        before = rank[None] < rank[:, None] if strict else rank[None] <= rank[:, None]
        assert torch.equal(seen, (near.flatten(1).T > 0) & before)


def front_numbers(shape: tuple[int, ...], radius: int, order: Order) -> Tensor:
    colours, *size = shape
    depth, height, width = (1, 1, *size)[-3:]
    return fronts.front_numbers(colours, height, width, radius, order, depth, len(size))


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("kernels", [(1, 1, 1), (3, 3, 3), (5, 5, 5), (1, 3, 1), (5, 3, 1)])
def test_schedule_is_legal_and_as_short_as_can_be(
    kernels: tuple[int, int, int], order: Order
) -> None:
    radius = max(kernels) // 2
    series = [(colours, length) for colours in (1, 3) for length in (1, 2, 4, 9)]
    volumes = [(1, 3, 3, 4), (2, 2, 3, 2), (2, 3, 4, 3), (1, 2, 1, 3), (3, 2, 2, 2)]
    for shape in (*series, *volumes):
        axes, variables = len(shape) - 1, math.prod(shape)
        inputs = torch.eye(variables).view(-1, *shape)
        graphs = [
            (conv1d, conv2d, conv3d)[axes - 1](
                inputs,
                Ordering(order).conv_mask(shape[0], kernel, axes=axes).float(),
                padding="same",
            ).flatten(1).T
            for kernel in kernels
        ]  # fmt: skip
        seen = (graphs[2] @ graphs[1] @ graphs[0]) > 0
        numbers = front_numbers(shape, radius, order)
        assert numbers.shape == shape
        flat = numbers.flatten()
        later = seen & ~torch.eye(variables, dtype=torch.bool)
        assert not bool((later & (flat[:, None] <= flat[None, :])).any()), shape
        assert int(flat.min()) == 0
        if len(set(kernels)) == 1 and min(shape[1:]) > radius:
            assert torch.equal(numbers, depths(seen, shape, order)), shape


@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("size", [(4,), (1,), (3, 2), (2, 3, 2), (1, 2, 3), (3, 1, 1)])
def test_every_tap_of_a_canvas_is_a_constant_distance(size: tuple[int, ...], radius: int) -> None:
    canvas, axes = Space(size, radius), len(size)
    images = torch.rand(2, *size, dtype=torch.float64) + 1
    painted = torch.zeros(canvas.positions(2), dtype=torch.float64)
    every = product(range(2), *map(range, size))
    places = {
        (sample, *pixel): canvas.guard + sample * canvas.steps[0] + canvas.distance(pixel)
        for sample, *pixel in every
    }
    for pixel, place in places.items():
        painted[place] = images[pixel]
    assert painted.count_nonzero() == images.numel()
    weight = torch.rand([2 * radius + 1] * axes, dtype=torch.float64)
    found = torch.zeros_like(images)
    for away, factor in zip(offsets(2 * radius + 1, axes), weight.flatten(), strict=True):
        for pixel, place in places.items():
            at = place + canvas.distance(away)
            assert 0 <= at < len(painted)
            found[pixel] += factor * painted[at]
    convolve = (conv1d, conv2d, conv3d)[axes - 1]
    expected = convolve(images.unsqueeze(1), weight[None, None], padding="same")
    torch.testing.assert_close(found.unsqueeze(1), expected)
    if axes == 2:
        height, width = size
        flat = Canvas(height, width, radius)
        assert canvas.positions(2) == flat.positions(2)
        assert places == {pixel: flat.place(*pixel) for pixel in places}


def test_a_series_has_no_rows_of_zeros() -> None:
    assert Space((100,), 2).steps == (102, 1)


# ---------------------------------------------------------------------- the layer


@pytest.mark.parametrize(("order", "triangle"), ORDERINGS)
@pytest.mark.parametrize("kernel_size", KERNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_jacobian_is_triangular_with_the_log_det(
    size: tuple[int, ...], kernel_size: Any, order: Order, triangle: Triangle
) -> None:
    layer = random_layer(size, order=order, triangle=triangle, kernel_size=kernel_size)
    assert_triangular_with_log_det(layer, random_input(layer, 1))


SOLVERS = [
    mint.Auto(),
    mint.Wavefront(),
    mint.FixedPoint(iterations=200),
    mint.FixedPoint(alpha=0.9, safeguard=True, iterations=400),
]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("order", "triangle"), ORDERINGS)
@pytest.mark.parametrize("size", [(6,), (3, 2, 3)], ids=str)
def test_round_trip_by_every_solver(
    size: tuple[int, ...], order: Order, triangle: Triangle, backend: str
) -> None:
    layer = random_layer(size, order=order, triangle=triangle, kernel_size=(3, 5, 1), scale=0.7)
    x = random_input(layer)
    with torch.no_grad():
        z, log_det = layer(x)
    with mint.use_backend(backend):
        for solver in SOLVERS:
            result = mint.invert(layer, z, solver, certify=True)
            assert result.converged.all(), solver
            torch.testing.assert_close(result.x, x)
            torch.testing.assert_close(result.log_det, -log_det)
            assert result.error_bound is not None
            assert ((result.x - x).abs().flatten(1).amax(1) <= result.error_bound + 1e-13).all()


@pytest.mark.parametrize(("order", "triangle"), ORDERINGS)
@pytest.mark.parametrize("size", [(11,), (4, 3, 2)], ids=str)
def test_steep_layers_are_inverted(size: tuple[int, ...], order: Order, triangle: Triangle) -> None:
    """Weights a hundred times those of an ordinary layer; compiled fronts and plain ones agree."""
    layer = random_layer(size, 3, 5, order, triangle, scale=30, kernel_size=(3, 5, 3))
    z = 1e3 * random_input(layer)
    found = [layer.wavefront(z)]
    with mint.use_backend("torch"):
        found.append(layer.wavefront(z))
    for wave in found:
        with torch.no_grad():
            y = layer(wave.x)[0]
        scale = layer.magnitude(wave.x)
        assert bool(((y - z).abs() <= 1e-9 * scale).all())
    torch.testing.assert_close(found[0].diagonal, found[1].diagonal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [1, 3])
def test_answers_to_adversarial_layers_are_true(axes: int) -> None:
    total = sum((judge(make(seed, axes)) for seed in range(25)), Counter())
    assert total["converged"] > 0.4 * total["samples"]
    assert total["tight"] > 0.7 * total["samples"]


@pytest.mark.parametrize("size", [(1,), (1, 1), (1, 1, 1), (1, 3, 1), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_smallest_layers_are_inverted(size: tuple[int, ...], kernel_size: int) -> None:
    layer = random_layer(size, 1, 2, kernel_size=kernel_size)
    x = random_input(layer)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("size", [(9,), (3, 2), (2, 3, 4), (1, 1, 3), (4, 1, 1)], ids=str)
def test_compiled_fronts_read_what_is_stored(size: tuple[int, ...], order: Order) -> None:
    """Every tap of every variable, and the vector that begins there, lie within the storage."""
    pytest.importorskip("numba")
    from mintnet_triton.kernels.cpu import wavefront as cpu_wavefront

    depth, height, width = (1, 1, *size)[-3:]
    for radius, units in product((0, 1, 2), (1, 5)):
        skew = cpu_wavefront.Skew(3, height, width, radius, 2, depth, len(size))
        storage = skew.new(units)
        places = skew._images(torch.arange(len(storage)))
        assert places.unique().numel() == places.numel()
        for kernel in range(1, 2 * radius + 2, 2):
            _, distances, ends = cpu_wavefront._layout(skew, units, kernel, order)
            for colour in range(3):
                own = distances[ends[colour] : ends[colour + 1]].flatten()
                seen = places[:, colour, 0].flatten()[:, None] + torch.from_numpy(own)
                assert bool((seen >= 0).all())
                assert bool((seen <= len(storage) - cpu_wavefront.VECTOR).all())


def training_step(
    layer: mint.MintLayer, x: Tensor, upstream: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, log_det = layer(x)
    torch.autograd.backward((y, log_det), upstream)
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    found |= {"y": y.detach(), "log_det": log_det.detach(), "x": x.grad}
    return {name: one for name, one in found.items() if one is not None}


COMPILED = [
    ((7,), 3, 5, 3, 5, {}),
    ((70,), 1, 20, (5, 3, 1), 3, {"order": "pixel"}),  # more than a line, tiles of a colour
    ((1,), 12, 2, 1, 70, {"triangle": "upper"}),  # vectors, tiles of several colours
    ((3, 4, 5), 2, 5, 3, 4, {"triangle": "upper"}),
    ((2, 3, 2), 3, 4, (3, 1, 5), 3, {"order": "pixel", "activation": "softplus"}),
    ((1, 2, 3), 4, 2, (1, 5, 3), 7, {"order": "pixel", "triangle": "upper"}),
    ((2, 40, 17), 1, 2, 3, 2, {"activation": "tanh"}),  # rows of a plane in several parts
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("size", "channels", "hidden", "kernel_size", "batch", "arguments"), COMPILED, ids=str
)
def test_compiled_layer_and_its_gradients(
    size: tuple[int, ...],
    channels: int,
    hidden: int,
    kernel_size: Any,
    batch: int,
    arguments: dict[str, Any],
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("numba")
    from mintnet_triton.kernels.cpu import mint_layer as cpu_mint_layer

    calls: list[int] = []
    run = cpu_mint_layer.run_forward

    def counting(x: Tensor, *others: Any) -> Any:
        calls.append(len(x))
        return run(x, *others)

    monkeypatch.setattr(cpu_mint_layer, "run_forward", counting)
    layer = random_layer(size, channels, hidden, kernel_size=kernel_size, **arguments).float()
    layer.recompute = recompute
    x = random_input(layer, batch)
    upstream = torch.randn_like(x), torch.randn(batch)
    computed = training_step(layer, x, upstream)
    assert calls
    with mint.use_backend("torch"):
        exact = (upstream[0].double(), upstream[1].double())
        expected = training_step(layer.double(), x.double(), exact)
    for name, value in expected.items():
        error = (computed[name].double() - value).norm() / value.norm().clamp(min=1e-12)
        assert error < 2e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("size", "kernel"), [((6,), 3), ((3, 2, 4), 3), ((2, 3, 3), 5)])
def test_flops_of_the_compiled_layer(size: tuple[int, ...], kernel: int) -> None:
    """Counted tap by tap: rows beyond a plane, and planes beyond a volume, are skipped."""
    pytest.importorskip("numba")
    from mintnet_triton.kernels.cpu import mint_layer as cpu_mint_layer
    from mintnet_triton.kernels.cpu.canvas import plan

    axes, hidden = len(size), 5
    found = plan(hidden, hidden, 1, (kernel,) * axes, "channel", "lower")
    lines = cpu_mint_layer.lines_of(size, 1, kernel // 2)
    seen = offsets(kernel, axes)[: kernel**axes // 2 + 1]
    rows = sum(
        math.prod(max(0, side - abs(by)) for side, by in zip(size[:-1], away[:-1], strict=True))
        for away in seen
    )
    assert cpu_mint_layer.products([found], lines, 1) == hidden**2 * rows * lines.length


@pytest.mark.parametrize("size", [(6,), (3, 2, 4)], ids=str)
def test_the_exact_map_is_the_layer(size: tuple[int, ...]) -> None:
    layer = random_layer(size, 3, kernel_size=(1, 5, 3))
    x = random_input(layer)
    with torch.no_grad():
        expected = layer(x)[0]
    computed = cpu_products.mint_map(x, weights_of(layer), layer.activation)
    torch.testing.assert_close(computed, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("order", "triangle"), ORDERINGS)
@pytest.mark.parametrize(("small", "large"), [((5,), (1, 5)), ((3, 4), (1, 3, 4))])
def test_an_axis_of_one_is_no_axis(
    small: tuple[int, ...],
    large: tuple[int, ...],
    order: Order,
    triangle: Triangle,
    dtype: torch.dtype,
) -> None:
    """Whatever weights look beyond it, they see zeros."""
    arguments: dict[str, Any] = {"order": order, "triangle": triangle, "kernel_size": (3, 5, 1)}
    layer, wide = (random_layer(size, **arguments).to(dtype) for size in (small, large))
    with torch.no_grad():
        for name in ("conv1", "conv2", "conv3"):
            ours, theirs = getattr(layer, name), getattr(wide, name)
            theirs.weight[:, :, theirs.kernel_size // 2] = ours.weight
            theirs.bias.copy_(ours.bias)
        wide.t.copy_(layer.t.view_as(wide.t))
    x = random_input(layer)
    upstream = torch.randn_like(x), torch.randn(len(x), dtype=dtype)
    expected = training_step(layer, x, upstream)
    shape = (len(x), *wide.input_shape)
    computed = training_step(wide, x.view(shape), (upstream[0].view(shape), upstream[1]))
    for name in ("y", "log_det", "x", "t", "conv1.bias"):
        torch.testing.assert_close(computed[name].view_as(expected[name]), expected[name])
    z = torch.randn_like(x)
    torch.testing.assert_close(
        wide.inverse(z.view(shape))[0].view_as(z), layer.inverse(z)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_of_the_inverse(size: tuple[int, ...]) -> None:
    layer = random_layer(size, scale=0.7)
    x = random_input(layer, 1)
    z = layer(x)[0].detach().requires_grad_()
    upstream = torch.randn_like(z)
    (by_z,) = torch.autograd.grad(layer.inverse(z)[0], z, upstream)
    exact = torch.linalg.solve(jacobian(layer, x[0]).T, upstream.flatten())
    torch.testing.assert_close(by_z.flatten(), exact)
    torch.autograd.gradcheck(lambda z: layer.inverse(z), z)


@pytest.mark.parametrize("size", [(8,), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_torch_s_own_modules_bear(size: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = random_layer(size).to(dtype)
    x = random_input(layer)
    with torch.no_grad():
        expected = layer(x)
        layouts = [x[..., None].expand(*x.shape, 2)[..., 0], x.transpose(1, -1).clone()]
        layouts[1] = layouts[1].transpose(1, -1)  # channels last, whatever the axes
        if len(size) == 3:
            layouts.append(x.contiguous(memory_format=torch.channels_last_3d))
            moved = copy.deepcopy(layer).to(  # type: ignore[call-overload]
                memory_format=torch.channels_last_3d
            )
            assert moved.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
            assert moved.t.shape == layer.t.shape
            torch.testing.assert_close(moved(x), expected)
            torch.testing.assert_close(moved.inverse(expected[0])[0], x, rtol=1e-4, atol=1e-5)
        for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            for one in layouts:
                for computed, value in zip(other(one), expected, strict=True):
                    torch.testing.assert_close(computed, value)
        with mint.frozen(layer):
            for computed, value in zip(layer(x), expected, strict=True):
                assert torch.equal(computed, value)
        torch.testing.assert_close(layer.transform(x), expected[0])
        empty, none = layer(x[:0])
        assert empty.shape == x[:0].shape
        assert none.shape == (0,)
        assert layer.inverse(x[:0])[0].shape == x[:0].shape
        parameters = {name: 2 * one for name, one in layer.named_parameters()}
        doubled = torch.func.functional_call(layer, parameters, x)
        assert not torch.allclose(doubled[0], expected[0])
        mapped = torch.func.vmap(lambda one: layer(one[None])[0][0])(x)
        torch.testing.assert_close(mapped, expected[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("size", [(8,), (2, 3, 4)], ids=str)
def test_torch_compile(size: tuple[int, ...], backend: str) -> None:
    layer = random_layer(size).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with mint.use_backend(backend):
        for batch in (3, 7):
            x = random_input(layer, batch).requires_grad_()
            torch._dynamo.mark_dynamic(x, 0)  # raises if the size becomes part of the graph
            upstream = torch.randn_like(x), torch.randn(batch)
            expected = training_step(layer, x.detach(), upstream)
            layer.zero_grad()
            torch.autograd.backward(compiled(x), upstream)
            torch.testing.assert_close(x.grad, expected["x"])
            torch.testing.assert_close(layer.conv2.weight.grad, expected["conv2.weight"])


@pytest.mark.parametrize("size", [(8,), (2, 3, 4)], ids=str)
def test_operators_of_the_compiled_layer(size: tuple[int, ...]) -> None:
    pytest.importorskip("numba")
    from mintnet_triton.kernels.cpu import mint_layer as cpu_mint_layer

    layer = random_layer(size).float()
    weights = layer.effective_weights()
    parts = tuple(one.detach() for one in (*weights[:6], weights.t))
    x, structure = random_input(layer), ("channel", "lower", "elu")
    tests = ("test_schema", "test_faketensor")
    arguments = (x, *parts, *structure, True, True, 2)
    torch.library.opcheck(cpu_mint_layer.layer_op, arguments, test_utils=tests)
    _, diagonal, h1, h2 = cpu_mint_layer.layer_op(*arguments)
    for wanted in (True, False):
        given = (x, h1, h2, x, diagonal, *parts[:6:2], parts[6], *structure, wanted, 2)
        torch.library.opcheck(cpu_mint_layer.backward_op, given, test_utils=tests)


# ---------------------------------------------------------------------- around the layer


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_squeeze(axes: int) -> None:
    squeeze, size = mint.Squeeze(axes), (4, 2, 6)[:axes]
    x = torch.arange(2 * 3 * math.prod(size)).double().view(2, 3, *size)
    y, log_det = squeeze(x)
    assert y.shape == (2, 3 * 2**axes, *(side // 2 for side in size))
    assert log_det.tolist() == [0, 0]
    for tap, away in enumerate(product((0, 1), repeat=axes)):
        every_other: Any = (..., *(slice(first, None, 2) for first in away))
        assert torch.equal(y[:, 3 * tap : 3 * tap + 3], x[every_other])
    assert torch.equal(squeeze.inverse(y)[0], x)


def small_flow(size: tuple[int, ...], **arguments: Any) -> mint.MintNet:
    taps = 2 ** len(size)
    return mint.MintNet(1, size, pairs=2, hidden=2 * taps, squeezes=1, **arguments)


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("size", [(8,), (2, 4, 2)], ids=str)
def test_flows(size: tuple[int, ...], order: Order, tmp_path: Path) -> None:
    flow = small_flow(size, order=order)
    taps = 2 ** len(size)
    assert flow.image_shape == (1, *size)
    assert flow.latent_shape == (taps, *(side // 2 for side in size))
    layers = [layer for layer in flow.modules() if isinstance(layer, mint.MintLayer)]
    assert [layer.hidden for layer in layers] == [2 * taps, 2 * taps, 2, 2]
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 1, *size)
    report = mint.verify(flow, x)
    assert report.ok, report
    z, log_det = flow(x)
    assert z.shape == (2, *flow.latent_shape)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(flow.log_prob(x), normal + log_det)
    samples, log_prob = flow.sample_and_log_prob(3)
    torch.testing.assert_close(flow.log_prob(samples), log_prob, rtol=1e-4, atol=1e-4)

    mint.save(flow, tmp_path / "flow.safetensors")
    loaded = mint.load(tmp_path / "flow.safetensors")
    assert isinstance(loaded, mint.MintNet)
    assert loaded.arguments == flow.arguments
    assert torch.equal(loaded(x)[0], z)


@pytest.mark.parametrize("is_map", [False, True])
@pytest.mark.parametrize(("order", "triangle"), ORDERINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_contexts(size: tuple[int, ...], order: Order, triangle: Triangle, is_map: bool) -> None:
    """A layer is triangular for each, inverted, and compiled as it is in plain PyTorch."""
    layer = random_layer(size, order=order, triangle=triangle, scale=0.7, context=2)
    x = random_input(layer)
    context = torch.randn(len(x), 2, *(size if is_map else ())).double()
    assert_triangular_with_log_det(layer.given(context[:1]), x[:1])
    z, log_det = layer(x, context)
    assert not torch.allclose(z[:1], layer(x[:1], 2 * context[:1])[0])
    for backend in ("auto", "torch"):
        with mint.use_backend(backend):
            again, inverse_log_det = layer.inverse(z, context=context)
        torch.testing.assert_close(again, x)
        torch.testing.assert_close(inverse_log_det, -log_det)
    expected = torch.autograd.grad(z.square().sum() + log_det.sum(), list(layer.parameters()))
    layer, x, context = layer.float(), x.float(), context.float()
    z, log_det = layer(x, context)
    computed = torch.autograd.grad(z.square().sum() + log_det.sum(), list(layer.parameters()))
    for one, value in zip(computed, expected, strict=True):
        torch.testing.assert_close(one.double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(8,), (2, 4, 2)], ids=str)
def test_contexts_of_flows(size: tuple[int, ...]) -> None:
    flow = small_flow(size, context=3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 1, *size)
    for context in (torch.randn(2, 3), torch.randn(2, 3, *size)):
        z, log_det = flow(x, context)
        again, inverse_log_det = flow.inverse(z, context=context)
        torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-4, atol=1e-4)
    assert flow.sample(4, context=torch.randn(3)).shape == (4, 1, *size)
    assert flow.sample(4, context=torch.randn(1, 3, *size)).shape == (4, 1, *size)
    half = flow.bfloat16()  # whose maps are averaged, too
    z, _ = half(x.bfloat16(), context.bfloat16())
    again, _ = half.inverse(z, context=context.bfloat16())
    torch.testing.assert_close(again, x, rtol=0.1, atol=0.2)
    flow.float()
    with pytest.raises(ValueError, match=r"context must have shape \(batch, 3\) or \(batch, 3, "):
        flow(x, torch.randn(2, 3, *size, 2))


@pytest.mark.parametrize("size", [(8,), (2, 4, 2)], ids=str)
def test_bits_per_dimension(size: tuple[int, ...]) -> None:
    flow, preprocess = small_flow(size).double(), mint.ImagePreprocess(17)
    images = torch.randint(0, 17, (3, 1, *size))
    bits = mint.bits_per_dim(flow, images, 17, generator=torch.Generator().manual_seed(0))
    x, log_det = preprocess(images, torch.Generator().manual_seed(0), torch.float64)
    expected = -(flow.log_prob(x) + log_det) / (math.log(2) * math.prod(size))
    torch.testing.assert_close(bits, expected)
    assert torch.equal(preprocess.to_images(x), images)
    values, inverse_log_det = preprocess.inverse(x)
    torch.testing.assert_close(preprocess.transform(values)[0], x)
    torch.testing.assert_close(inverse_log_det, -log_det)


@pytest.mark.parametrize("size", [(8,), (2, 4, 2)], ids=str)
def test_export(size: tuple[int, ...]) -> None:
    flow, x = small_flow(size), torch.randn(2, 1, *size)
    program = torch.export.export(flow, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.randn(5, 1, *size)
    torch.testing.assert_close(program.module()(more), flow(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8,), (2, 4, 2)], ids=str)
def test_classifiers(size: tuple[int, ...]) -> None:
    model = mint.MintClassifier(1, size, classes=3, pairs=2, squeezes=1, width=2)
    scores = model(torch.randn(4, 1, *size))
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(4))
    scores[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("order", "triangle"), ORDERINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_calculus(size: tuple[int, ...], order: Order, triangle: Triangle) -> None:
    axes = len(size)
    weight = 0.3 * torch.randn(2, 2, *[3] * axes, dtype=torch.float64)
    conv = MaskedAffine(weight, torch.randn(2).double(), Ordering(order, triangle))
    map_ = Sum(Elementwise("identity"), Compose(Elementwise("tanh"), conv), scales=(2.0, 0.3))
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    report = mint.verify(map_, x)
    assert report.ok, report


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("strict", [False, True])
def test_masked_convolutions(axes: int, strict: bool) -> None:
    kind = (mint.MaskedConv1d, mint.MaskedConv2d, mint.MaskedConv3d)[axes - 1]
    conv = kind(4, 6, 3, colours=2, order="pixel", strict=strict)
    dense = (conv1d, conv2d, conv3d)[axes - 1]
    x = torch.randn(2, 4, *(5, 3, 4)[:axes])
    by_colour = Ordering("pixel").conv_mask(2, 3, strict=strict, axes=axes)
    assert torch.equal(conv.mask, by_colour)
    mask = by_colour.repeat_interleave(3, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(conv(x), dense(x, conv.weight * mask, conv.bias, padding="same"))
    large = kind(128, 128, 3, colours=2)  # whose mask is one for all units of a colour
    assert large._seen.ndim == axes + (2 if axes == 1 else 3)
    mask = large.mask.repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert torch.equal(large.masked_weight(), large.weight * mask)


def test_wide_colours_are_convolved_in_blocks() -> None:
    """As many as pay, along one axis and three, too."""
    for kind, size in ((mint.MaskedConv1d, (512,)), (mint.MaskedConv3d, (8, 8, 4))):
        conv = kind(192, 192, 3, colours=3)
        x = torch.randn(2, 192, *size)
        with torch.no_grad():
            dense = (conv1d, conv2d, conv3d)[conv.axes - 1]
            expected = dense(x, conv.masked_weight(), conv.bias, padding="same")
            torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_start(size: tuple[int, ...]) -> None:
    """Xavier with gain 0.005, and biases within 1 / sqrt(fan in), as along two axes."""
    layer = mint.MintLayer(4, size, 16)
    weight = layer.conv2.weight.detach()
    deviation = 0.005 * math.sqrt(2 / (2 * weight[0].numel()))
    torch.testing.assert_close(float(weight.std()), deviation, rtol=0.05, atol=0)
    assert layer.conv2.bias is not None
    assert float(layer.conv2.bias.detach().abs().max()) <= 1 / math.sqrt(weight[0].numel())
    assert bool((layer.t == 1).all())


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        ((), ValueError, r"size must be an integer or .* got \(\)"),
        ((2, 2, 2, 2), ValueError, r"size must be an integer or .* got \(2, 2, 2, 2\)"),
        ((4.0,), TypeError, "size must be an integer, got 4.0"),
        ((0,), ValueError, "size must be at least 1, got 0"),
        ((2, -1, 2), ValueError, "size must be at least 1, got -1"),
        ("8", TypeError, "size must be an integer, got '8'"),
    ],
)
def test_bad_sizes(size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mint.MintLayer(1, size, 2)
    with pytest.raises(error, match=f"image_{message}"):
        mint.MintNet(1, size, pairs=1, hidden=2, squeezes=0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"image_size must divide by 4 .* got 4 x 6 x 8"):
        mint.MintNet(1, (4, 6, 8), pairs=3, hidden=64, squeezes=2)
    with pytest.raises(ValueError, match=r"hidden must be at least 64, .* divided by 8 .* got 63"):
        mint.MintNet(1, (4, 4, 4), pairs=3, hidden=63, squeezes=2)
    with pytest.raises(ValueError, match=r"hidden must be at least 2, .* divided by 2 .* got 1"):
        mint.MintNet(1, (4,), pairs=2, hidden=1, squeezes=1)
    with pytest.raises(ValueError, match="axes must be 1, 2 or 3, got 4"):
        mint.Squeeze(4)
    with pytest.raises(ValueError, match="axes must be at least 1, got 0"):
        mint.Squeeze(0)
    for kind in (mint.MaskedConv1d, mint.MaskedConv3d):
        with pytest.raises(ValueError, match=r"kernel_size must be odd.*got 2"):
            kind(1, 1, 2)
    with pytest.raises(ValueError, match=r"weight must have shape .* got \(2, 2, 3, 3, 1\)"):
        MaskedAffine(torch.zeros(2, 2, 3, 3, 1), None, Ordering())


def test_bad_inputs() -> None:
    layer = mint.MintLayer(2, (4,), 2)
    with pytest.raises(ValueError, match=r"x must have 3 dimensions.*\(batch, 2, 4\), got 4"):
        layer(torch.randn(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"\(batch, 2, 4\), got \(1, 2, 5\).*dimension 2 is 5"):
        layer(torch.randn(1, 2, 5))
    with pytest.raises(ValueError, match=r"z must have 3 dimensions"):
        layer.inverse(torch.randn(1, 2, 4, 4, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, any, any, any\)"):
        mint.MaskedConv3d(1, 1, 3)(torch.randn(1, 2, 3, 3, 3))
    with pytest.raises(ValueError, match=r"x must have 5 dimensions"):
        mint.Squeeze(3)(torch.randn(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"even length, got \(1, 1, 3\)"):
        mint.Squeeze(1)(torch.randn(1, 1, 3))
    with pytest.raises(ValueError, match=r"even depth, height and width, got \(1, 1, 2, 2, 3\)"):
        mint.Squeeze(3)(torch.randn(1, 1, 2, 2, 3))
    with pytest.raises(ValueError, match=r"a multiple of 8 channels, got \(1, 4, 1, 1, 1\)"):
        mint.Squeeze(3).inverse(torch.randn(1, 4, 1, 1, 1))
    with pytest.raises(ValueError, match=r"images must be \(batch, C, H, W\), got shape \(3, 2\)"):
        mint.ImagePreprocess()(torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        mint.ImagePreprocess().to_images(torch.zeros(2, 2))
    x = torch.zeros(1, 2, 4)
    x[0, 1, 3] = math.nan
    with pytest.raises(mint.NonFiniteError, match=r"first at index \(0, 1, 3\)"):
        layer(x)


def test_a_convolution_along_other_axes_is_refused() -> None:
    layer = mint.MintLayer(2, (4,), 2)
    layer.conv1 = mint.MaskedConv2d(2, 4, 3, colours=2)
    with pytest.raises(TypeError, match="conv1 of a MintLayer must be a MaskedConv1d"):
        layer(torch.randn(1, 2, 4))


def test_triton_is_refused_where_it_has_no_kernels() -> None:
    layer = mint.MintLayer(2, (2, 3, 2), 2)
    with mint.use_backend("triton"), pytest.raises(BackendError, match="images and series alone"):
        layer(torch.randn(1, 2, 2, 3, 2))
