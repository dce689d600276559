"""Layers, pairs and networks that are given a context beside their input."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

import mintnet_triton as mint
from mintnet_triton import FixedPoint, MintLayer, use_backend
from mintnet_triton.kernels.backend import numba_compiles
from mintnet_triton.solvers import Auto, Wavefront
from tests import grid
from tests.conditioned import fill

CHANNELS, SIZE, HIDDEN, CONTEXT = 3, (4, 5), 4, 2
#: shapes of a context of so many channels
VECTOR, MAP = (CONTEXT,), (CONTEXT, *SIZE)
BACKENDS = ["torch", "auto"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def make_layer(
    dtype: torch.dtype = torch.float64, seed: int = 0, far: bool = True, **arguments: Any
) -> MintLayer:
    """Far from the identity, and from the layer without a context."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "channels": CHANNELS,
        "size": SIZE,
        "hidden": HIDDEN,
        "context": CONTEXT,
    }
    layer = MintLayer(**shape | {"initialisation": "classifier"} | arguments).to(dtype)
    return fill(layer, conditions=far)


def inputs(shape: tuple[int, ...], batch: int = 4, dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(batch, CHANNELS, *SIZE, dtype=dtype), torch.randn(batch, *shape, dtype=dtype)


def without_context(layer: MintLayer, **arguments: Any) -> MintLayer:
    """The layer of the same weights that takes none."""
    twin = make_layer(layer.t.dtype, context=None, **arguments)
    state = {name: one for name, one in layer.state_dict().items() if "context" not in name}
    twin.load_state_dict(state)
    return twin


# ------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("shape", [VECTOR, MAP], ids=["vector", "map"])
def test_a_network_that_gives_zeros_changes_no_bit(
    backend: str, dtype: torch.dtype, triangle: str, shape: tuple[int, ...]
) -> None:
    layer = make_layer(dtype, far=False, triangle=triangle)
    plain = without_context(layer, triangle=triangle)
    x, context = inputs(shape, dtype=dtype)
    upstream = torch.randn_like(x), torch.randn(len(x), dtype=dtype)

    def everything(one: MintLayer, *given: Tensor) -> dict[str, Tensor]:
        own = x.clone().requires_grad_()
        y, log_det = one(own, *given)
        torch.autograd.backward((y, log_det), upstream)
        found = {"y": y, "log_det": log_det, "x": own.grad}
        found |= {name: parameter.grad for name, parameter in one.named_parameters()}
        z = y.detach().requires_grad_()
        back, back_log_det = one.inverse(z, None, *given)
        found |= {"back": back, "back_log_det": back_log_det}
        one.zero_grad()
        torch.autograd.backward((back, back_log_det), upstream)
        found |= {f"{name}, inverse": p.grad for name, p in one.named_parameters()}
        found |= {"z": z.grad, "iterated": one.inverse(z, FixedPoint(safeguard=True), *given)[0]}
        return found | {"transformed": one.transform(x, *given)}

    with use_backend(backend):
        computed, expected = everything(layer, context), everything(plain)
    for name, value in expected.items():
        assert torch.equal(computed[name], value), name
    by_network = computed["context_network.weight"]
    assert by_network.abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", [VECTOR, MAP], ids=["vector", "map"])
def test_each_sample_has_a_layer_of_its_own(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """One by one; and as a layer whose biases and t are what the network gives."""
    layer = make_layer(dtype)
    x, context = inputs(shape, dtype=dtype)
    close = partial(torch.testing.assert_close, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert layer.context_network is not None
    with use_backend(backend), torch.no_grad():
        y, log_det = layer(x, context)
        back, back_log_det = layer.inverse(y, context=context)
        diagonal = layer.forward_and_diagonal(x, context)[1]
        close(layer.transform(x, context), y)
        for i in range(len(x)):
            alone = layer(x[i : i + 1], context[i : i + 1])
            close(alone[0][0], y[i])
            close(alone[1][0], log_det[i])
            if shape is MAP:
                continue
            own = without_context(layer)
            added = layer.context_network(context[i : i + 1])[0]
            sizes = [CHANNELS * HIDDEN, CHANNELS * HIDDEN, CHANNELS, CHANNELS]
            for conv, bias in zip(
                (own.conv1, own.conv2, own.conv3), added.split(sizes), strict=False
            ):
                assert conv.bias is not None
                conv.bias += bias
            own.t.mul_(added[-CHANNELS:, None, None].exp())
            expected = own(x[i : i + 1])
            close(expected[0][0], y[i])
            close(expected[1][0], log_det[i])
            close(own.forward_and_diagonal(x[i : i + 1])[1][0], diagonal[i])
    close(back, x, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    close(back_log_det, -log_det, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@grid.over(
    lambda case: True,
    main=["order", "triangle", "shape"],
    order=["channel", "pixel"],
    triangle=["lower", "upper"],
    shape=["vector", "map"],
    kernel_size=[3, (1, 3, 5), 1],
    size=[(4, 5), (1, 7), (6, 1), (1, 1)],
    channels=[1, 3, 4],
    batch=[1, 5, 8],
    activation=["elu", "leaky_relu", "softplus"],
    recompute=[False, True],
)
def test_compiled_and_plain_layers_agree_with_float64(case: dict[str, Any]) -> None:
    """All gradients by random ones from above, and the inverse, which numba compiles otherwise."""
    shape, batch, size = case.pop("shape"), case.pop("batch"), case["size"]
    layer = make_layer(torch.float32, context=CONTEXT, **case)
    x = torch.randn(batch, case["channels"], *size)
    context = torch.randn(batch, CONTEXT, *(size if shape == "map" else ()))
    upstream = torch.randn_like(x), torch.randn(batch)

    def everything(dtype: torch.dtype) -> dict[str, Tensor]:
        one = copy.deepcopy(layer).to(dtype)
        own, given = (values.to(dtype, copy=True).requires_grad_() for values in (x, context))
        y, log_det = one(own, given)
        torch.autograd.backward((y, log_det), [values.to(dtype) for values in upstream])
        found = {"y": y, "log_det": log_det, "x": own.grad, "context": given.grad}
        found |= {name: parameter.grad for name, parameter in one.named_parameters()}
        with torch.no_grad():
            found["back"] = one.inverse(y, context=given)[0]
        return {name: value.detach().double() for name, value in found.items()}

    with use_backend("torch"):
        expected, plain = everything(torch.float64), everything(torch.float32)
    if case["recompute"]:
        layer.recompute = False
    for computed in (plain, everything(torch.float32)):
        for name, value in expected.items():
            error = (computed[name] - value).norm() / value.norm().clamp(min=1e-3)
            assert error < 3e-5, f"{name}: {error:.1e}"
    with use_backend("auto"):
        back = everything(torch.float64)["back"]
    torch.testing.assert_close(back, expected["back"], rtol=1e-11, atol=1e-11)


def test_threads_share_samples_and_their_contexts() -> None:
    layer = make_layer(torch.float32)
    x, context = inputs(MAP, 7, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            given = context.clone().requires_grad_()
            y, log_det = layer(x, given)
            (y.square().sum() + log_det.sum()).backward()
            assert given.grad is not None
            results.append((y, given.grad, layer.inverse(y.detach(), context=context)[0]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, expected)


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("shape", [VECTOR, MAP], ids=["vector", "map"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_gradients_by_context_and_network(shape: tuple[int, ...], inverse: bool) -> None:
    torch.manual_seed(0)
    layer = MintLayer(2, (1, 2), 2, initialisation="classifier", context=2, dtype=torch.float64)
    assert isinstance(layer.context_network, nn.Linear)
    nn.init.normal_(layer.context_network.weight, std=0.3)
    x = torch.randn(2, 2, 1, 2, dtype=torch.float64)
    context = torch.randn(2, 2, *((1, 2) if shape is MAP else ()), dtype=torch.float64)
    names = ("context_network.weight", "t", "conv1.bias", "conv2.weight")
    tensors = [dict(layer.named_parameters())[name].detach().clone() for name in names]

    def function(x: Tensor, context: Tensor, *tensors: Tensor) -> Any:
        state = dict(zip(names, tensors, strict=True))
        if not inverse:
            return functional_call(layer, state, (x, context))
        with nn.utils.stateless._reparametrize_module(layer, state):
            return layer.inverse(x, context=context)

    arguments = [one.requires_grad_() for one in (x, context, *tensors)]
    assert torch.autograd.gradcheck(function, arguments)
    if shape is VECTOR:
        assert torch.autograd.gradgradcheck(function, arguments)


def test_second_derivatives_of_compiled_layers() -> None:
    layer = make_layer(torch.float32)
    x, context = inputs(VECTOR, dtype=torch.float32)
    found = []
    for dtype, backend in ((torch.float32, "auto"), (torch.float64, "torch")):
        layer.to(dtype)
        given = context.to(dtype, copy=True).requires_grad_()
        with use_backend(backend):
            y, log_det = layer(x.to(dtype), given)
            first = torch.autograd.grad(y.sin().sum() + log_det.sum(), given, create_graph=True)[0]
            found.append(torch.autograd.grad(first.square().sum(), given)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-3, atol=1e-4)


def test_transforms_of_functions_of_the_context() -> None:
    layer = make_layer()
    x, context = inputs(VECTOR, 2)
    for function in (
        lambda given: layer(x, given)[0],
        lambda given: layer.inverse(x, context=given)[0],
    ):
        computed = torch.func.jacrev(function)(context)
        expected = torch.autograd.functional.jacobian(function, context)
        torch.testing.assert_close(computed, expected)
        pushed = torch.func.jvp(function, (context,), (torch.ones_like(context),))[1]
        torch.testing.assert_close(pushed, expected.sum((-2, -1)))
    each = torch.func.vmap(lambda x, given: layer(x[None], given[None])[0][0])(x, context)
    torch.testing.assert_close(each, layer(x, context)[0])


# ------------------------------------------------------------------ solvers


@pytest.mark.parametrize(
    "solver",
    [Wavefront(), FixedPoint(), FixedPoint(safeguard=True, iterations=400), Auto()],
    ids=lambda solver: repr(solver)[:22],
)
@pytest.mark.parametrize("shape", [VECTOR, MAP], ids=["vector", "map"])
def test_samples_that_stop_take_their_contexts_along(
    solver: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples differ in how long they take; what Algorithm 1 fails on goes to the wavefront."""
    layer = make_layer(seed=1)
    with torch.no_grad():
        for conv in (layer.conv1, layer.conv2, layer.conv3):
            conv.weight.mul_(6)
    torch.manual_seed(5)
    x, context = inputs(shape, 6)
    context *= torch.tensor([0, 0.1, 3, 1, 0.3, 2.0]).double().view(-1, *[1] * len(shape))
    z, log_det = layer(x, context)
    if isinstance(solver, Auto):
        monkeypatch.setattr(Auto, "_exact_at_once", lambda self, z: False)
        monkeypatch.setattr(Auto, "ITERATIONS", 17)
    result = mint.invert(layer, z, solver, context=context, certify=True, trace=True)
    if isinstance(solver, Auto):
        assert result.layer_wavefront.any()
        assert not result.layer_wavefront.all()
    elif isinstance(solver, FixedPoint):
        assert len(result.iterations.unique()) > 1
    found = result.converged
    assert found.sum() >= 4
    assert found.all() or type(solver) is FixedPoint
    errors = (result.x - x).abs().flatten(1).amax(1)
    assert result.error_bound is not None
    assert (errors <= result.error_bound)[found].all()
    assert (result.error_bound < 1e-8)[found].all()
    torch.testing.assert_close(result.log_det[found], -log_det[found])


def test_a_bound_of_the_error_holds() -> None:
    """An inverse that is off: by the tolerance of float32, which is judged in float64."""
    layer = make_layer(torch.float32)
    x, context = inputs(MAP, 6, torch.float32)
    z = layer(x, context)[0].detach()
    exact = mint.invert(copy.deepcopy(layer).double(), z.double(), context=context.double()).x
    result = mint.invert(layer, z, FixedPoint(tolerance=1e-2), context=context, certify=True)
    assert result.error_bound is not None
    errors = (result.x - exact).abs().flatten(1).amax(1)
    assert (errors <= result.error_bound).all()
    assert (errors > 1e-6).any()
    assert (result.error_bound < 100 * errors.max()).all()


def test_rounding_is_relative_to_what_a_context_adds() -> None:
    layer = make_layer()
    x, context = inputs(VECTOR, 1)
    with torch.no_grad():
        condition = layer.given(context)._condition
        assert condition is not None
        own = without_context(layer)
        for conv, shift in zip((own.conv1, own.conv2, own.conv3), condition, strict=False):
            assert conv.bias is not None
            # Both have their own rounding: neither may cancel the other.
            shift.copy_(shift.abs() * conv.bias.sign()[:, None, None])
            conv.bias += shift[0, :, 0, 0]
        own.t.mul_(condition.scale[0])
        view = layer.given(context)
        view._given = condition
        torch.testing.assert_close(view.magnitude(x), own.magnitude(x))


@pytest.mark.parametrize("shape", [VECTOR, MAP], ids=["vector", "map"])
def test_verify(shape: tuple[int, ...]) -> None:
    layer = make_layer(torch.float32)
    x, context = inputs(shape, 2, torch.float32)
    assert mint.verify(layer, x, context).ok
    flow = make_flow(torch.float32)
    x, context = torch.randn(2, 1, 8, 8), torch.randn(2, 3, *((8, 8) if shape is MAP else ()))
    report = mint.verify(flow, x, context)
    assert report.ok
    assert len(report.layers) == 6
    hook = flow.register_forward_hook(lambda module, given, out: (out[0], out[1] + 0.1))
    assert not mint.verify(flow, x, context).ok
    hook.remove()


# ------------------------------------------------------------------ networks


def make_flow(dtype: torch.dtype = torch.float64, **arguments: Any) -> mint.MintNet:
    torch.manual_seed(0)
    flow = mint.MintNet(1, 8, pairs=3, hidden=4, squeezes=1, context=3, **arguments).to(dtype)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "context" in name:
                parameter.normal_(std=0.3)
    return flow


@pytest.mark.parametrize("shape", [(3,), (3, 8, 8)], ids=["vector", "map"])
def test_a_network_gives_each_layer_the_context_of_its_scale(shape: tuple[int, ...]) -> None:
    flow = make_flow()
    x, context = torch.randn(3, 1, 8, 8).double(), torch.randn(3, *shape).double()
    z, log_det = flow(x, context)
    point, sizes = x, torch.zeros(3).double()
    given = context
    for layer in flow.layers:
        if isinstance(layer, mint.Squeeze):
            point = layer(point)[0]
            given = given if given.ndim == 2 else F.avg_pool2d(given, 2)
            continue
        for one in layer.children():
            point, step = one(point, given)
            sizes += step
    torch.testing.assert_close(z, point)
    torch.testing.assert_close(log_det, sizes)
    torch.testing.assert_close(flow.inverse(z, context=context)[0], x)
    other = flow(x, context.flip(0))[0]
    assert not torch.allclose(z, other)
    with mint.frozen(flow):
        torch.testing.assert_close(flow(x, context)[0], z)
        torch.testing.assert_close(flow.inverse(z, context=context)[0], x)
    pair = flow.layers[0]
    assert isinstance(pair, mint.MintPair)
    torch.testing.assert_close(pair.inverse(pair(x, context)[0], context=context)[0], x)


def test_densities_and_samples() -> None:
    flow = make_flow()
    context = torch.randn(5, 3).double()

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    x, log_prob = flow.sample_and_log_prob(5, seeded(), context=context)
    torch.testing.assert_close(flow.log_prob(x, context), log_prob)
    torch.testing.assert_close(flow.sample(5, seeded(), context=context), x)
    assert not torch.allclose(flow.log_prob(x, context.flip(0)), log_prob)
    one = flow.sample(5, seeded(), context=context[:1].expand(5, 3))
    torch.testing.assert_close(flow.sample(5, seeded(), context=context[0]), one)
    torch.testing.assert_close(flow.sample(5, seeded(), context=context[:1]), one)
    whole = context[0, :, None, None].expand(3, 8, 8)
    torch.testing.assert_close(flow.sample(5, seeded(), context=whole), one)
    assert flow.sample(0, context=context[0]).shape == (0, 1, 8, 8)
    images = torch.randint(0, 256, (5, 1, 8, 8))
    bits = mint.bits_per_dim(flow, images, generator=seeded(), context=context)
    assert bits.shape == (5,)
    assert not torch.allclose(
        bits, mint.bits_per_dim(flow, images, 256, 0.05, seeded(), context.flip(0))
    )


class Own(nn.Module):
    """Reads vectors and maps, and gives values of a sample for both."""

    def __init__(self, outputs: int, context: int = CONTEXT) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(context, 5), nn.Tanh(), nn.Linear(5, outputs))

    def forward(self, context: Tensor) -> Tensor:
        pooled = context if context.ndim == 2 else context.mean((2, 3))
        values: Tensor = self.body(pooled)
        return values


def test_networks_of_users_own() -> None:
    outputs = 2 * CHANNELS * HIDDEN + 2 * CHANNELS
    module = Own(outputs).double()
    layer = make_layer(context_network=module)
    assert layer.context_network is module
    for shape in (VECTOR, MAP):
        x, context = inputs(shape)
        y, log_det = layer(x, context)
        back, back_log_det = layer.inverse(y, context=context)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(back_log_det, -log_det)
    made = make_layer(context_network=Own)
    assert isinstance(made.context_network, Own)
    before = copy.deepcopy(made.context_network.state_dict())
    made.reset_parameters()
    for name, value in made.context_network.state_dict().items():
        assert torch.equal(value, before[name])
    deeper = make_layer(
        context_network=lambda n: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.Conv2d(3, n, 1)
        )
    )
    x, context = inputs(MAP)
    torch.testing.assert_close(deeper.inverse(deeper(x, context)[0], context=context)[0], x)
    flow = mint.MintNet(1, 8, pairs=2, hidden=4, squeezes=1, context=2, context_network=Own)
    networks = [one for one in flow.modules() if isinstance(one, Own)]
    assert len(networks) == len(set(map(id, networks))) == 4


class Changed(nn.Linear):
    """A network whose values are changed by a function."""

    def __init__(self, outputs: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(CONTEXT, outputs)
        self.change = change

    def forward(self, context: Tensor) -> Tensor:
        return self.change(super().forward(context))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda values: values > 0, TypeError, "give a tensor of a floating dtype, got torch.bool"),
        (lambda values: values + 0j, TypeError, "a floating dtype, got torch.complex64"),
        (lambda values: values.to("meta"), ValueError, "gives a tensor on meta, the layer's"),
        (lambda values: values / 0, mint.NonFiniteError, "what context_network gives holds"),
        (lambda values: values + 90, mint.NonFiniteError, r"exp\(s\) of what context_network"),
    ],
)
def test_values_of_networks_that_are_none(
    change: Callable[[Tensor], Tensor], kind: type[Exception], message: str
) -> None:
    layer = make_layer(torch.float32, context_network=partial(Changed, change=change))
    x, context = inputs(VECTOR, dtype=torch.float32)
    for call in (layer, layer.transform, lambda x, given: layer.inverse(x, context=given)):
        with pytest.raises(kind, match=message):
            call(x, context)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_in_another_dtype_leave_that_of_the_layer(backend: str) -> None:
    layer = make_layer(torch.float32, context_network=partial(Changed, change=torch.Tensor.double))
    x, context = inputs(VECTOR, dtype=torch.float32)
    with use_backend(backend):
        y, log_det = layer(x, context)
    assert y.dtype == log_det.dtype == torch.float32
    layer.context_network = cast(Changed, layer.context_network)
    layer.context_network.change = nn.Identity()
    torch.testing.assert_close((y, log_det), layer(x, context))


def test_a_context_of_zeros_is_none() -> None:
    layer = make_layer()
    x, context = inputs(VECTOR)
    assert torch.equal(layer(x, 0 * context)[0], without_context(layer)(x)[0])
    layer.reset_parameters()
    assert layer.context_network is not None
    assert not any(one.any() for one in layer.context_network.parameters())


def test_t_stays_positive() -> None:
    layer = make_layer(torch.float32, context_network=lambda n: nn.Linear(CONTEXT, n))
    network = layer.context_network
    assert isinstance(network, nn.Linear)
    assert network.bias is not None
    with torch.no_grad():
        network.bias[-CHANNELS:] = -500
    x, context = inputs(VECTOR, dtype=torch.float32)
    assert layer(x, context)[1].isfinite().all()


# ------------------------------------------------------------------ errors


def test_contexts_that_do_not_fit() -> None:
    layer, plain, flow = make_layer(), make_layer(context=None), make_flow()
    x, context = inputs(VECTOR)
    y = layer(x, context)[0]
    wrong: list[tuple[Any, type[Exception], str]] = [
        (None, TypeError, r"MintLayer was made for a context.*\(batch, 2\).*got None"),
        ("red", TypeError, "context must be a torch.Tensor, got str"),
        (context[0], ValueError, r"context must have shape.*got \(2,\)"),
        (context[:, :, None], ValueError, r"context must have shape.*got \(4, 2, 1\)"),
        (context[:, :1], ValueError, "dimension 1 is 1, expected 2"),
        (context[:3], ValueError, "context has 3 samples, the input 4"),
        (context[:, :, None, None], ValueError, "dimension 2 is 1, expected 4"),
        (context.float(), TypeError, "context is torch.float32"),
        (context.long(), TypeError, r"context must be of a floating dtype.*one_hot"),
        (context[0, 0], ValueError, r"context must have shape.*got \(\)"),
        (context.to("meta"), ValueError, "context is on meta"),
        (context / 0, mint.NonFiniteError, "context holds"),
    ]
    for given, kind, message in wrong:
        for call in (
            lambda given: layer(x, given),
            lambda given: layer.inverse(y, context=given),
            lambda given: mint.invert(layer, y, context=given),
            lambda given: layer.forward_and_diagonal(x, given),
            lambda given: layer.transform(x, given),
            lambda given: mint.verify(layer, x, given),
        ):
            with pytest.raises(kind, match=message):
                call(given)
    images = torch.randn(4, 1, 8, 8).double()
    for bare in (
        lambda: flow(images),
        lambda: flow.log_prob(images),
        lambda: flow.sample(2),
        lambda: flow.sample_and_log_prob(2),
        lambda: mint.bits_per_dim(flow, torch.randint(0, 9, (2, 1, 8, 8))),
        lambda: flow.layers[0](images),
    ):
        with pytest.raises(TypeError, match="was made for a context"):
            bare()
    with pytest.raises(ValueError, match=r"context must have shape.*got \(\)"):
        flow.sample(2, context=torch.tensor(1.0).double())
    with pytest.raises(ValueError, match="context has 3 samples, the input 2"):
        flow.sample(2, context=torch.zeros(3, 3).double())
    for takes_none in (plain, mint.Squeeze(), mint.Elementwise("tanh")):
        with pytest.raises(TypeError, match="takes no context"):
            takes_none(x, context)
        with pytest.raises(TypeError, match="takes no context"):
            mint.invert(takes_none, x, context=context)
    for whole in (mint.Sum(layer, layer), mint.Compose(layer, layer)):
        with pytest.raises(TypeError, match="no part of a Sum or a Compose"):
            whole(x)
        with pytest.raises(TypeError, match="no part of a Sum or a Compose"):
            mint.invert(whole, x)


def test_arguments_that_do_not_fit() -> None:
    for arguments, kind, message in (
        ({"context": 0}, ValueError, "context must be at least 1"),
        ({"context": 1.5}, TypeError, "context must be an integer"),
        ({"context": None, "context_network": Own}, ValueError, "context_network needs context"),
        ({"context_network": "linear"}, TypeError, "context_network must be an nn.Module, or"),
        ({"context_network": lambda n: None}, TypeError, "which gave None"),
    ):
        with pytest.raises(kind, match=message):
            make_layer(**arguments)
    network = Own(8)
    for make in (
        lambda: mint.MintPair(1, 4, 3, context=2, context_network=network),
        lambda: mint.MintNet(1, 8, 2, 4, 1, context=2, context_network=network),
    ):
        with pytest.raises(TypeError, match="each layer has a network of its own, got Own"):
            make()
    x, context = inputs(VECTOR)
    for wrong in (
        lambda given: None,
        lambda given: given,
        lambda given: torch.zeros(4, 30, 1, 1),
        lambda given: torch.zeros(3, 30),
    ):
        layer = make_layer(context_network=as_module(wrong))
        with pytest.raises(ValueError, match=r"context_network of a MintLayer must give a tensor"):
            layer(x, context)
    chain = nn.Module.__new__(mint.MintPair)
    nn.Sequential.__init__(chain, make_layer(), make_layer(context=3))
    with pytest.raises(ValueError, match=r"take contexts of \[2, 3\] channels"):
        chain(x, context)


def as_module(function: Callable[[Tensor], Any]) -> nn.Module:
    module = nn.Module()
    module.forward = function
    return module


# ------------------------------------------------------------------ as a module among others


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("shape", [VECTOR, MAP], ids=["vector", "map"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_compiled_by_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = make_layer(dtype)
    x, context = inputs(shape, dtype=dtype)
    context.requires_grad_()
    y, log_det = layer(x, context)
    expected = torch.autograd.grad(y.square().sum() + log_det.sum(), context)[0]
    function = torch.compile(layer, backend="aot_eager", fullgraph=True)
    z, other = function(x, context)
    torch.testing.assert_close((z, other), (y, log_det))
    computed = torch.autograd.grad(z.square().sum() + other.sum(), context)[0]
    torch.testing.assert_close(computed, expected)
    torch.testing.assert_close(layer.inverse(z.detach(), context=context)[0], x)


def test_exported() -> None:
    flow = make_flow(torch.float32)
    x, context = torch.randn(3, 1, 8, 8), torch.randn(3, 3)
    batch = torch.export.Dim("batch")
    program = torch.export.export(flow, (x, context), dynamic_shapes=({0: batch}, {0: batch}))
    with torch.no_grad():
        expected = flow(x[:2], context[:2])
        torch.testing.assert_close(program.module()(x[:2], context[:2]), expected)


def test_copies_and_other_layouts() -> None:
    layer = make_layer(torch.float32)
    x, context = inputs(MAP, dtype=torch.float32)
    expected = layer(x, context)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        nn.utils.parametrizations.weight_norm(copy.deepcopy(layer).conv1) and layer,
        layer.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    ):
        given = context.to(memory_format=torch.channels_last)
        torch.testing.assert_close(other(x, given), expected)
    wide = torch.zeros(4, 2 * CONTEXT, *SIZE)
    wide[:, ::2] = context
    torch.testing.assert_close(layer(x, wide[:, ::2]), expected)
    flow = make_flow(context_network=lambda n: nn.Linear(3, n))
    images, vectors = torch.randn(2, 1, 8, 8).double(), torch.randn(2, 3).double()
    again = pickle.loads(pickle.dumps(flow))  # though it was made by what cannot be pickled
    torch.testing.assert_close(again(images, vectors), flow(images, vectors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend: str) -> None:
    for dtype in (torch.float64, torch.float32):
        layer = make_layer(dtype)
        for shape in (VECTOR, MAP):
            x, context = inputs(shape, 0, dtype)
            context.requires_grad_()
            with use_backend(backend):
                y, log_det = layer(x, context)
                (y.sum() + log_det.sum()).backward()
                back = layer.inverse(y, context=context)[0]
            assert y.shape == back.shape == x.shape
            assert context.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_lower_precision(backend: str) -> None:
    layer = make_layer(torch.float32)
    for shape in (VECTOR, MAP):
        x, context = inputs(shape, dtype=torch.float32)
        y, log_det = layer(x, context)
        close = partial(torch.testing.assert_close, rtol=0.05, atol=0.1)
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            z, other = layer(x, context.bfloat16())
            assert z.dtype == other.dtype == torch.float32
            back = layer.inverse(z, context=context.bfloat16())[0]
        close((z, other), (y, log_det))
        close(back, x)
        half = copy.deepcopy(layer).bfloat16()
        with use_backend(backend):
            z, other = half(x.bfloat16(), context.bfloat16())
            back, back_log_det = half.inverse(z.float(), context=context.bfloat16())
        assert z.dtype == torch.bfloat16
        close(z.float(), y)
        close(back, x, atol=0.2)
        close(back_log_det, -other)


def test_hooks_run() -> None:
    layer = make_layer(torch.float32)
    x, context = inputs(VECTOR, dtype=torch.float32)
    expected = layer(x, context)
    seen: list[Any] = []
    assert layer.context_network is not None
    handles = [
        layer.register_forward_hook(lambda module, given, out: seen.append(len(given))),
        layer.context_network.register_forward_hook(lambda *_: seen.append("network")),
        layer.conv2.register_forward_hook(lambda *_: seen.append("conv2")),
    ]
    computed = layer(x, context)
    assert seen == ["network", "conv2", 2]
    torch.testing.assert_close(computed, expected)
    layer.inverse(computed[0].detach(), context=context)
    assert seen[3:] == ["network"]
    for handle in handles:
        handle.remove()
    prune.random_unstructured(layer, "t", 0.5)
    with torch.no_grad():
        y, log_det = layer(x, context)
        torch.testing.assert_close(layer.inverse(y, context=context)[1], -log_det)
    nn.utils.parametrizations.spectral_norm(layer.context_network)
    assert not torch.allclose(layer(x, context)[0], y)


def test_checkpointed_layers() -> None:
    layer = make_layer(torch.float32)
    x, context = inputs(MAP, dtype=torch.float32)
    context.requires_grad_()
    expected = torch.autograd.grad(layer(x, context)[0].square().sum(), context)
    y, _ = torch.utils.checkpoint.checkpoint(layer, x, context, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), context), expected)
    layer.recompute = True
    y = layer(x, context)[0]
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), context), expected)


@pytest.mark.skipif(not numba_compiles(), reason="numba packs weights")
def test_frozen_layers_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mintnet_triton.kernels.cpu import mint_layer as cpu_mint_layer

    packings: list[int] = []
    pack = cpu_mint_layer.pack_layer

    def packing(*arguments: Any) -> Any:
        packings.append(1)
        return pack(*arguments)

    monkeypatch.setattr(cpu_mint_layer, "pack_layer", packing)
    layer = make_layer(torch.float32)
    x, context = inputs(VECTOR, dtype=torch.float32)
    with torch.no_grad():
        expected = layer(x, context)
        packings.clear()
        with mint.frozen(layer):
            for block in (nullcontext(), mint.frozen(layer)):
                with block:
                    torch.testing.assert_close(layer(x, context), expected)
                    torch.testing.assert_close(layer(x, 0 * context)[0], layer(x, -0 * context)[0])
            found = mint.invert(layer, expected[0], FixedPoint(safeguard=True), context=context)
    torch.testing.assert_close(found.x, x, rtol=1e-3, atol=1e-3)
    assert len(packings) == 2
