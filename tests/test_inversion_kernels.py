"""Algorithm 1 in kernels against the torch path."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import mintnet_triton as mint
from mintnet_triton import checks
from mintnet_triton.kernels import dispatch
from mintnet_triton.kernels.activation import NAMES
from mintnet_triton.kernels.gpu import inversion, launching, mint_layer
from mintnet_triton.kernels.reference import Structure
from tests import grid
from tests.recording import Looking
from tests.test_masked_conv_kernels import ORDERINGS
from tests.test_mint_layer_kernels import (
    affordable,
    costly,
    flow,
    forward,
    random,
    random_layer,
)

# Of the interpreter, where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")


def contracting(*arguments: Any, **keywords: Any) -> mint.MintLayer:
    """A random layer that Algorithm 1 inverts in some ten steps."""
    layer = random_layer(*arguments, **keywords)
    with torch.no_grad():
        for conv in (layer.conv1, layer.conv2, layer.conv3):
            conv.weight.mul_(0.6)
    return layer


def invert(
    module: mint.Invertible, z: Tensor, solver: mint.FixedPoint, backend: str = "triton"
) -> mint.InversionResult:
    with mint.use_backend(backend):
        return mint.invert(module, z, solver, trace=True)


def assert_same(one: mint.InversionResult, other: mint.InversionResult) -> None:
    """Equal to rounding: a residual has that of z."""
    wide = one.x.dtype == torch.float64
    rtol, atol = (1e-9, 1e-13) if wide else (1e-3, 2e-6)
    assert torch.equal(one.iterations, other.iterations)
    assert torch.equal(one.converged, other.converged)
    assert torch.equal(one.layer_converged, other.layer_converged)
    assert (one.layers, one.tolerance) == (other.layers, other.tolerance)
    assert one.trace is not None
    assert other.trace is not None
    values = [(one.x, other.x), (one.log_det, other.log_det), (one.residual, other.residual)]
    values += [(one.layer_residuals, other.layer_residuals)]
    values += list(zip(one.trace, other.trace, strict=True))
    for computed, expected in values:
        scale = float(expected.abs().nan_to_num(0, 0, 0).max().clamp(min=1))
        torch.testing.assert_close(
            computed, expected, rtol=rtol, atol=atol * 10 * scale, equal_nan=True
        )


LAYERS = [
    (1, 1, 3, "elu", (1, 1), ORDERINGS[0], "float64"),
    (1, 5, (1, 3, 3), "tanh", (3, 5), ORDERINGS[1], "float32"),
    (3, 5, (3, 1, 3), "softplus", (2, 3), ORDERINGS[2], "float64"),
    (3, 16, (3, 1, 1), "sigmoid", (3, 2), ORDERINGS[3], "float32"),
    (4, 2, 3, "leaky_relu", (2, 2), ORDERINGS[0], "float32"),
    (12, 1, (3, 3, 1), "elu", (2, 1), ORDERINGS[1], "float64"),
    (1, 1, (1, 3, 1), "identity", (5, 14), ORDERINGS[0], "float32"),  # several tiles to an image
    (40, 1, 1, "elu", (1, 1), ORDERINGS[2], "float64"),  # and of colours
]


@pytest.mark.parametrize(
    ("colours", "units", "kernels", "activation", "size", "ordering", "numbers"),
    grid.thinned(
        ((*layer, numbers) for *layer, _ in LAYERS for numbers in ("float64", "float32")),
        kept=LAYERS,
    ),
)
def test_a_layer_is_inverted_as_in_torch(
    colours: int,
    units: int,
    kernels: Any,
    activation: str,
    size: Any,
    ordering: Any,
    numbers: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = contracting(colours, units, ordering, kernels, activation, size, numbers)
    x = random(3, colours, *size, numbers=numbers)
    with torch.no_grad(), mint.use_backend("torch"):
        z, log_det = layer(x)
    solver = mint.FixedPoint(iterations=10)
    with grid.guarded(monkeypatch) as launched:
        result = invert(layer, z, solver)
    assert "output_kernel" in launched
    assert_same(result, invert(layer, z, solver, "torch"))
    if bool(result.converged.all()):
        tolerance = 1e-9 if numbers == "float64" else 1e-3
        torch.testing.assert_close(result.x, x, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(result.log_det, -log_det, rtol=tolerance, atol=tolerance)


@grid.over(
    affordable,
    main=["colours", "units", "kernels", "ordering", "numbers"],
    costly=costly,
    colours=[1, 3, 12],
    units=[1, 5, 45, 85],
    kernels=[1, 3, (1, 1, 3), (3, 1, 5)],
    ordering=ORDERINGS,
    activation=NAMES,
    numbers=["float64", "float32"],
    size=[(1, 1), (3, 5), (1, 9)],
    batch=[1, 3],
    alpha=[1.0, 0.7],
)
def test_an_update_against_float64(case: grid.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The x after one, and the residual and the log-det of that x."""
    numbers, alpha = case["numbers"], case["alpha"]
    names = ("colours", "units", "ordering", "kernels", "activation", "size", "numbers")
    layer = contracting(*(case[name] for name in names))
    shape = (case["batch"], case["colours"], *case["size"])
    start, z = random(*shape, numbers=numbers), 3 * random(*shape, numbers=numbers)
    order, triangle = case["ordering"]
    structure = Structure(order, triangle, case["activation"])
    with torch.no_grad(), grid.guarded(monkeypatch) as launched:
        weights = layer.raw_weights()
        packed = mint_layer.packed(weights, z.dtype, "ieee", structure)
        computed = inversion.fixed_point(z, start, packed, weights, structure, alpha, 1, 0.0)
    assert launched.count("output_kernel") == 2

    exact, goal = copy.deepcopy(layer).double(), z.double()
    with torch.no_grad(), mint.use_backend("torch"):
        y, diagonal, _ = forward(exact, start.double())
        x = start.double() - alpha * (y - goal) / diagonal
        # Of the x computed: what rounding does to x is not doubled.
        y_then, _, log_det = forward(exact, computed.x.double())
    scale = goal.abs().flatten(1).amax(1).clamp(min=1)
    residuals = torch.stack([(one - goal).abs().flatten(1).amax(1) for one in (y, y_then)]) / scale
    tolerance = grid.TOLERANCES[numbers]
    grid.assert_near("step", computed.x.double() - start.double(), x - start, tolerance)
    grid.assert_near("log-det", computed.log_det, log_det, tolerance)
    grid.assert_near("residual of the start", computed.residuals[0], residuals[0], tolerance)
    # The second is a difference of nearly equal numbers of the size of z.
    grid.assert_near("residual", 1 + computed.residuals[1], 1 + residuals[1], tolerance)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_layouts(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = contracting(3, 2, kernels=(1, 3, 1), size=(2, 3))
    z = grid.laid_out(random(2, 3, 2, 3), layout)
    solver = mint.FixedPoint(iterations=3)
    with grid.guarded(monkeypatch):
        result = invert(layer, z, solver)
    assert_same(result, invert(layer, z, solver, "torch"))


@pytest.mark.parametrize(
    "solver",
    [
        mint.FixedPoint(iterations=1),
        mint.FixedPoint(iterations=2),
        mint.FixedPoint(alpha=0.5, iterations=9),
        mint.FixedPoint(alpha=0.1, iterations=8),
        mint.FixedPoint(iterations=7, tolerance=1e-2),
        mint.FixedPoint(iterations=20, tolerance=0),
    ],
)
def test_solvers(solver: mint.FixedPoint, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = contracting(2, 2, kernels=(1, 3, 1), size=(2, 2))
    z = 3 * random(3, 2, 2, 2)
    with grid.guarded(monkeypatch):
        result = invert(layer, z, solver)
    other = invert(layer, z, solver, "torch")
    if solver.tolerance == 0:  # rounding alone decides when, if ever, a residual is zero
        assert bool((result.residual < 1e-14).all())
        torch.testing.assert_close(result.x, other.x, rtol=1e-12, atol=1e-12)
        assert torch.equal(result.converged, result.residual == 0)
    else:
        assert_same(result, other)


@pytest.mark.parametrize("numbers", ["float32", pytest.param("float64", marks=pytest.mark.full)])
def test_samples_stop_one_by_one(numbers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the x, the log-det and the iterations that it has alone."""
    kernels = (1, 3, 1)
    layer = contracting(2, 3, kernels=kernels, activation="tanh", size=(2, 2), numbers=numbers)
    # What the layer adds to t x is bounded: the larger z, the smaller the first residual.
    far = torch.tensor([1e2, 1.0, 1e9, 10.0, 1e3], device=grid.DEVICE).view(-1, 1, 1, 1)
    z = (far * random(5, 2, 2, 2)).to(grid.dtype_of(numbers))
    solver = mint.FixedPoint(alpha=0.5, iterations=40, tolerance=1e-4)
    with grid.guarded(monkeypatch):
        together = invert(layer, z, solver)
    assert bool(together.converged.all())
    steps = together.iterations.tolist()
    assert len(set(steps)) > 3
    assert {step % 2 for step in steps} == {0, 1}
    for index in range(2, 5):  # one that stops at once, and two others
        alone = invert(layer, z[index : index + 1], solver)
        assert alone.iterations[0] == together.iterations[index]
        for name in ("x", "log_det", "residual"):
            one, other = getattr(alone, name)[0], getattr(together, name)[index]
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0, msg=name)
        # The residual is that of the x returned, not of one beside it.
        with torch.no_grad(), mint.use_backend("torch"):
            y, log_det = layer(together.x[index : index + 1])
        scale = z[index].abs().max().clamp(min=1)
        residual = (y[0] - z[index]).abs().max() / scale
        precision = 1e-15 if numbers == "float64" else 1e-6
        assert abs(float(residual - together.residual[index])) <= 2 * precision
        torch.testing.assert_close(-log_det[0], together.log_det[index])


@pytest.mark.parametrize(("numbers", "iterations"), [("float64", 3), ("float32", 9)])
def test_a_sample_that_diverges_disturbs_no_other(
    numbers: str, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = contracting(1, 2, activation="identity", size=(2, 3), numbers=numbers)
    with torch.no_grad():  # so steep off the diagonal that iterates grow at first
        centre = layer.conv1.weight[..., 1, 1].clone()
        layer.conv1.weight.mul_(1e4)
        layer.conv1.weight[..., 1, 1] = centre
    z = random(4, 1, 2, 3, numbers=numbers)
    # By half steps the residuals stay far above the rounding of what cancels in them.
    solver = mint.FixedPoint(alpha=0.5, iterations=iterations)
    alone = invert(layer, z[::2], solver)
    z[1] = torch.finfo(z.dtype).max / 1e6  # finite for some iterations
    z[3] = torch.finfo(z.dtype).max  # for none
    with grid.guarded(monkeypatch):
        result = invert(layer, z, solver)
    assert result.iterations[1] > 0
    assert not bool(result.converged[1::2].any())
    assert not bool(result.residual[1::2].isfinite().any())
    assert torch.equal(result.converged[::2], alone.converged)
    assert torch.equal(result.iterations[::2], alone.iterations)
    for name in ("x", "residual"):
        computed, expected = getattr(result, name)[::2], getattr(alone, name)
        grid.assert_near(name, computed, expected, grid.TOLERANCES[numbers])
    other = invert(layer, z, solver, "torch")
    assert torch.equal(result.converged, other.converged)
    assert torch.equal(result.iterations, other.iterations)
    grid.assert_near(
        "residual", result.residual[::2], other.residual[::2], grid.TOLERANCES[numbers]
    )


def test_nothing_is_computed_after_all_have_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = contracting(1, 1, size=(1, 1))
    z = random(2, 1, 1, 1)
    with grid.guarded(monkeypatch) as launched:
        result = invert(layer, z, mint.FixedPoint(iterations=100))
    assert bool(result.converged.all())
    assert launched.count("output_kernel") < 100
    assert launched.count("output_kernel") % inversion.STRIDE == inversion.STRIDE - 1


def test_a_network_is_inverted_as_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    net, solver = flow(0), mint.FixedPoint(tolerance=1e-3)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, mint.MintLayer):
                module.conv3.weight.mul_(0.2)
    x = random(2, 1, 4, 4)
    with torch.no_grad(), mint.use_backend("torch"):
        z, _ = net(x)
    with grid.guarded(monkeypatch):
        result = invert(net, z, solver)
    assert bool(result.converged.all())
    assert_same(result, invert(net, z, solver, "torch"))
    torch.testing.assert_close(result.x, x, rtol=1e-2, atol=1e-2)


def test_products_in_float16_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave little to be done in float32, which solves all that it would solve alone."""
    layer = contracting(3, 5, size=(3, 4), numbers="float32")
    x = random(4, 3, 3, 4, numbers="float32")
    x[1] *= 1e6  # beyond float16: it begins anew
    with torch.no_grad(), mint.use_backend("torch"):
        z = layer.double()(x.double())[0].to(x)
    layer.float()
    called = []

    def record(z: Tensor, start: Tensor, packed: Any, *arguments: Any) -> inversion.Iterated:
        called.append((packed.weight2.dtype, inverted(z, start, packed, *arguments)))
        return called[-1][1]

    inverted = inversion.fixed_point
    monkeypatch.setattr(inversion, "fixed_point", record)
    with grid.guarded(monkeypatch), mint.use_backend("triton"):
        result = mint.invert(layer, z, mint.FixedPoint(iterations=40, coarse=True))
        alone = mint.invert(layer, z, mint.FixedPoint(iterations=40))
    dtypes, (coarse, fine, other) = zip(*called, strict=True)
    assert dtypes == (torch.float16, torch.float32, torch.float32)
    assert bool(alone.converged.all())
    assert bool(result.converged.all())
    assert torch.equal(result.iterations, coarse.iterations + fine.iterations)
    assert coarse.iterations[1] == 0
    assert not coarse.residuals[0, 1].isfinite()
    assert torch.equal(fine.x[1], other.x[1])
    ordinary = torch.tensor([0, 2, 3], device=z.device)
    assert bool((fine.iterations[ordinary] <= 2).all())
    assert bool((fine.iterations[ordinary] < other.iterations[ordinary]).all())
    torch.testing.assert_close(result.x, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gain", [0.5, 1e-3])
def test_a_sample_stops_that_gains_too_little(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = contracting(2, 3, size=(2, 3))
    z = random(3, 2, 2, 3)
    weights, structure = layer.raw_weights(), Structure("channel", "lower", "elu")
    with torch.no_grad(), grid.guarded(monkeypatch):
        packed = mint_layer.packed(weights, z.dtype, "ieee", structure)
        found = inversion.fixed_point(z, z, packed, weights, structure, 0.3, 30, 0.0, gain)
        free = inversion.fixed_point(z, z, packed, weights, structure, 0.3, 30, 0.0)
    for sample, (one, other) in enumerate(zip(found.residuals.T, free.residuals.T, strict=True)):
        last = int(found.iterations[sample])
        assert 0 < last < 30
        assert bool((one[1:last] <= gain * one[: last - 1]).all())
        assert one[last] > gain * one[last - 1]
        assert torch.equal(one[: last + 1], other[: last + 1])
        assert bool((one[last + 1 :] == 0).all())


def test_a_graph_may_capture_an_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at a value, whatever z is."""
    net, solver = flow(0), mint.FixedPoint(iterations=inversion.STRIDE, coarse=True)
    net.float()
    z = random(2, *net.latent_shape, numbers="float32")
    expected = invert(net, z, solver)
    for module in (inversion, dispatch, checks):
        monkeypatch.setattr(module, "is_capturing", lambda x: True)
    z = torch.stack([z[0], z[1] * torch.nan])

    def launch(*arguments: Any, **constants: Any) -> None:
        with _disable_current_modes():  # the interpreter looks
            launched(*arguments, **constants)

    launched = launching.launch
    monkeypatch.setattr(launching, "launch", launch)
    with mint.use_backend("triton"), Looking():
        result = mint.invert(net, z, solver)
    assert result.converged.tolist() == [bool(expected.converged[0]), False]
    torch.testing.assert_close(result.x[0], expected.x[0], rtol=1e-3, atol=1e-3)


def test_an_empty_batch() -> None:
    result = invert(contracting(2, 2), random(0, 2, 3, 4), mint.FixedPoint())
    assert result.x.shape == (0, 2, 3, 4)
    assert result.residual.shape == result.log_det.shape == result.iterations.shape == (0,)


def test_half_precision_is_inverted_in_float32() -> None:
    layer = contracting(2, 2, size=(2, 2), numbers="float16")
    z = random(2, 2, 2, 2, numbers="float16")
    with torch.autocast(grid.DEVICE, torch.float16), grid.precision_of("tf32"):
        result = invert(layer, z, mint.FixedPoint())
    assert result.x.dtype == torch.float32
    assert_same(result, invert(layer.float(), z.float(), mint.FixedPoint(), "torch"))
