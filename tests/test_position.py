"""Biases that depend on the place of a pixel: against a context that says the same."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import mintnet_triton as mint
from mintnet_triton import MintLayer, use_backend
from mintnet_triton.kernels.backend import numba_compiles
from mintnet_triton.kernels.reference import Condition
from mintnet_triton.position import PositionBias
from mintnet_triton.solvers import FixedPoint, Wavefront
from mintnet_triton.views import twin
from tests import adversarial, grid
from tests.conditioned import fill

CHANNELS, SIZE, HIDDEN = 3, (4, 5), 4
BACKENDS = ["torch", "auto"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def make_layer(dtype: torch.dtype = torch.float64, **arguments: Any) -> MintLayer:
    """Far from the identity, and from the layer without a position bias."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "channels": CHANNELS,
        "size": SIZE,
        "hidden": HIDDEN,
        "position_bias": 3,
        "initialisation": "classifier",
    }
    return fill(MintLayer(**shape | arguments).to(dtype), deviation=0.3)


def of_context(layer: MintLayer, batch: int, context: int = 0) -> tuple[MintLayer, Tensor]:
    """The layer that is told by a context where pixels are, and that context.

    Args:
        context: channels of that which the layer takes itself.
    """
    assert layer.position_bias is not None
    weight, basis = layer.position_bias.weight, layer.position_bias._cosines.to(layer.t.dtype)
    assert layer.ordering is not None
    other = make_layer(
        weight.dtype,
        channels=layer.channels,
        size=layer.size,
        hidden=layer.hidden,
        triangle=layer.ordering.triangle,
        order=layer.ordering.order,
        activation=layer.activation,
        position_bias=None,
        context=context + len(basis),
    )
    state = {key: one for key, one in layer.state_dict().items() if key in other.state_dict()}
    own = [] if layer.context_network is None else [layer.context_network.get_parameter("weight")]
    other.load_state_dict({**state, "context_network.weight": torch.cat([*own, weight], 1)})
    return other, basis.reshape(-1, *layer.size).expand(batch, -1, *layer.size)


def everything(layer: MintLayer, x: Tensor, *context: Tensor) -> dict[str, Tensor]:
    """Results and all gradients, by random ones from above, forward and inverse."""
    generator = torch.Generator().manual_seed(4)
    upstream = [
        torch.randn(shape, generator=generator).to(x.dtype) for shape in (x.shape, x.shape[:1])
    ]
    own = x.clone().requires_grad_()
    y, log_det = layer(own, *context)
    torch.autograd.backward((y, log_det), upstream)
    found = {"y": y, "log_det": log_det, "x": own.grad}
    found |= {name: one.grad for name, one in layer.named_parameters()}
    layer.zero_grad()
    z = y.detach().requires_grad_()
    back, back_log_det = layer.inverse(z, None, *context)
    torch.autograd.backward((back, back_log_det), upstream)
    found |= {"back": back, "back_log_det": back_log_det, "z": z.grad}
    found |= {f"{name}, inverse": one.grad for name, one in layer.named_parameters()}
    layer.zero_grad()
    found["iterated"] = layer.inverse(z, FixedPoint(safeguard=True), *context)[0]
    found["in order"] = layer.inverse(z, Wavefront(), *context)[0]
    found["transformed"] = layer.transform(x, *context)
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


# ------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("size", [(7,), (4, 6), (1, 3), (2, 3, 5)])
def test_maps_are_the_lowest_frequencies_of_a_cosine_transform(size: tuple[int, ...]) -> None:
    module = PositionBias(3, size, 2, dtype=torch.float64)
    assert module().shape == (1, 2, *size)
    assert module().abs().max() == 0
    weight = torch.randn_like(module.weight)
    module.weight.data = weight
    found = module()[0]
    # A whole transform, axis by axis: what it holds beyond those frequencies is none.
    for axis, side in enumerate(size):
        pixel = torch.arange(side, dtype=torch.float64)
        cosines = (torch.pi / side * torch.outer(pixel, pixel + 0.5)).cos()
        norms = torch.full((side,), side / 2, dtype=torch.float64)
        norms[0] = side
        found = (found.movedim(1 + axis, -1) @ (cosines / norms[:, None]).T).movedim(-1, 1 + axis)
    wanted = torch.zeros_like(found)
    each = [min(3, side) for side in size]
    wanted[(slice(None), *(slice(one) for one in each))] = weight.reshape(-1, *each)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_at_its_start_it_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    layer = make_layer(dtype)
    assert layer.position_bias is not None
    layer.position_bias.reset_parameters()
    plain = make_layer(dtype, position_bias=None)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(5, CHANNELS, *SIZE, dtype=dtype)
    with use_backend(backend):
        found, expected = everything(layer, x), everything(plain, x)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found["position_bias.weight"].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@grid.over(
    lambda case: True,
    main=["size", "order", "triangle"],
    dtype=[torch.float64, torch.float32],
    size=[(4, 5), (6, 1), (7,), (3, 2, 4)],
    triangle=["lower", "upper"],
    order=["channel", "pixel"],
    batch=[1, 5],
    activation=["elu", "softplus"],
)
def test_it_is_a_context_of_cosines(case: dict[str, Any], backend: str) -> None:
    case = dict(case)
    dtype, batch = case.pop("dtype"), case.pop("batch")
    layer = make_layer(dtype, **case)
    other, context = of_context(layer, batch)
    x = torch.randn(batch, CHANNELS, *case["size"], dtype=dtype)
    with use_backend(backend):
        found, expected = everything(layer, x), everything(other, x, context)
    expected = {key.replace("context_network", "position_bias"): expected[key] for key in expected}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-3)
        assert error < 10 * TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("shape", [(2,), (2, *SIZE)], ids=["vector", "map"])
def test_beside_a_context_it_is_added(shape: tuple[int, ...]) -> None:
    layer = make_layer(context=2)
    other, places = of_context(layer, 4, context=2)
    x, context = torch.randn(4, CHANNELS, *SIZE).double(), torch.randn(4, *shape).double()
    as_map = context.reshape(*context.shape[:2], *(SIZE if len(shape) == 3 else (1, 1)))
    both = torch.cat([as_map.expand(4, 2, *SIZE), places], 1)
    found, expected = everything(layer, x, context), everything(other, x, both)
    for name, value in expected.items():
        if "context_network" in name:
            parts = (name, name.replace("context_network", "position_bias"))
            computed = torch.cat([found.pop(part) for part in parts], 1)
        else:
            computed = found.pop(name)
        torch.testing.assert_close(computed, value, rtol=1e-10, atol=1e-10, msg=name)
    assert not found


@pytest.mark.skipif(not numba_compiles(), reason="as plain torch then")
@grid.over(
    lambda case: True,
    main=["kernel_size", "size"],
    kernel_size=[3, (1, 3, 5), 1],
    size=[(4, 5), (1, 7), (6, 1), (1, 1)],
    channels=[1, 4],
    batch=[1, 8],
    recompute=[False, True],
)
def test_compiled_layers_agree_with_float64(case: dict[str, Any]) -> None:
    case = dict(case)
    batch = case.pop("batch")
    layer = make_layer(torch.float32, **case)
    x = torch.randn(batch, case["channels"], *case["size"])
    computed = everything(layer, x)
    exact = copy.deepcopy(layer).double()
    with use_backend("torch"):
        expected = everything(exact, x.double())
    for name, value in expected.items():
        error = (computed[name].double() - value).norm() / value.norm().clamp(min=1e-3)
        assert error < 5e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [SIZE, (1, 1)], ids=["map", "vector"])
def test_a_condition_of_one_sample_is_that_of_all(size: tuple[int, int], backend: str) -> None:
    layer = make_layer(torch.float32, position_bias=None)
    widths = CHANNELS * HIDDEN, CHANNELS * HIDDEN, CHANNELS, CHANNELS
    given = [torch.randn(1, width, *size).exp().requires_grad_() for width in widths]
    x = torch.randn(7, CHANNELS, *SIZE)
    results = []
    for samples in (1, 7):
        view = twin(layer)
        view._given = Condition(*given).of_batch(samples)
        with use_backend(backend):
            y, log_det = view(x)
            loss = y.square().sum() + log_det.sum()
            results.append([y, log_det, *torch.autograd.grad(loss, given)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not numba_compiles(), reason="there are no threads of ours then")
def test_threads_add_up_what_they_find() -> None:
    layer = make_layer(torch.float32)
    x = torch.randn(96, CHANNELS, *SIZE)  # several groups
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(everything(layer, x))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_samples_that_stop_leave_the_others_theirs() -> None:
    layer = make_layer(torch.float32)
    x = torch.randn(6, CHANNELS, *SIZE) * torch.tensor([0, 1e-3, 1, 3, 10, 30]).view(6, 1, 1, 1)
    z = layer(x)[0].detach()
    for solver in (FixedPoint(), FixedPoint(safeguard=True), mint.Auto()):
        with use_backend("torch"):
            result = mint.invert(layer, z, solver, certify=True)
        alone = [mint.invert(layer, one[None], solver, certify=True) for one in z]
        assert result.converged.all()
        torch.testing.assert_close(result.x, torch.cat([one.x for one in alone]))


@pytest.mark.parametrize("axes", [1, 2])
def test_layers_made_to_break_inversion(axes: int) -> None:
    """Its s takes t further down than the layers without one have it."""
    found: Counter[str] = Counter()
    for seed in range(40):
        found += adversarial.judge(adversarial.make(seed, axes, 1 + seed % 4))
    assert found["samples"] == 80
    assert found["converged"] > 0.6 * 80
    assert found["tight"] > 0.75 * 80


# ------------------------------------------------------------------ a guest


def test_a_network_has_one_in_each_layer_and_no_more_frequencies_than_pixels() -> None:
    flow = mint.MintNet(1, 8, 3, 16, 2, position_bias=3)
    found = [one.frequencies for one in flow.modules() if isinstance(one, PositionBias)]
    assert found == [(3, 3)] * 4 + [(2, 2)] * 2
    state = flow.state_dict()
    names = [name for name in state if "position_bias" in name]
    assert len(names) == 6
    # The paper's models are as they were.
    assert not [name for name in mint.MintNet(1, 8, 3, 16, 2).state_dict() if "position" in name]


def test_one_made_without_memory_has_its_cosines_after_reset() -> None:
    with torch.device("meta"):
        layer = MintLayer(2, 4, 3, position_bias=2)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.position_bias is not None
    assert layer.position_bias().abs().max() == 0
    layer.position_bias.weight.data.normal_()
    other = PositionBias(2, (4, 4), 16)
    other.load_state_dict(layer.position_bias.state_dict())
    torch.testing.assert_close(layer.position_bias(), other())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_are_rounded_by_nothing_but_the_weight(dtype: torch.dtype) -> None:
    module = PositionBias(4, (8, 8), 6, dtype=dtype)
    nn.init.normal_(module.weight)
    exact = PositionBias(4, (8, 8), 6, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found = module()
    torch.testing.assert_close(found, exact(), rtol=1e-14, atol=1e-14)
    found.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend: str) -> None:
    layer = make_layer(torch.float32)
    x = torch.randn(0, CHANNELS, *SIZE)
    with use_backend(backend):
        found = everything(layer, x)
    assert found["y"].shape == found["back"].shape == x.shape
    for name, parameter in layer.named_parameters():
        for key in (name, f"{name}, inverse"):
            assert torch.equal(found[key], torch.zeros_like(parameter)), key


def test_frozen_and_functional() -> None:
    layer = make_layer()
    x = torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64)
    y = layer(x)[0].detach()
    with mint.frozen(layer):
        torch.testing.assert_close(layer(x)[0], y)
        torch.testing.assert_close(layer.inverse(y)[0], x)
    assert layer.position_bias is not None
    weight = layer.position_bias.weight.detach() + 0.1
    moved = functional_call(layer, {"position_bias.weight": weight}, (x,))[0]
    layer.position_bias.weight.data = weight
    torch.testing.assert_close(layer(x)[0], moved)
    assert (moved - y).abs().max() > 1e-3


def test_it_may_be_part_of_a_sum() -> None:
    layers = make_layer(triangle="lower"), make_layer(triangle="lower", kernel_size=1)
    both = mint.Sum(*layers)
    x = torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64)
    y = both(x)[0]
    torch.testing.assert_close(y, layers[0](x)[0] + layers[1](x)[0])
    torch.testing.assert_close(both.inverse(y.detach())[0], x)


def test_hooks_of_it_run_once_a_call() -> None:
    layer = make_layer()
    calls: list[nn.Module] = []
    assert layer.position_bias is not None
    layer.position_bias.register_forward_hook(lambda module, *_: calls.append(module))
    x = torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64)
    z = layer(x)[0].detach()
    assert len(calls) == 1
    before = layer.inverse(z)[0]
    layer.position_bias.register_forward_hook(lambda *given: given[-1] + 0.5)
    assert (layer(x)[0] - z).abs().max() > 0.1
    after = layer.inverse(z)[0]
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(layer(after)[0].detach(), z)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "position_bias must be at least 1, got 0"),
        (True, TypeError, "position_bias must be an integer, got True"),
        (2.0, TypeError, r"position_bias must be an integer, got 2\.0"),
    ],
)
def test_bad_arguments(value: Any, error: type[Exception], message: str) -> None:
    for make in (lambda: MintLayer(1, 4, 2, position_bias=value),
                 lambda: mint.MintNet(1, 4, 2, 4, 1, position_bias=value)):  # fmt: skip
        with pytest.raises(error, match=message):
            make()


def test_bad_arguments_of_its_own() -> None:
    for arguments, message in (
        ((0, SIZE, 2), "frequencies must be at least 1, got 0"),
        ((2, (4, 0), 2), "size must be at least 1, got 0"),
        ((2, SIZE, 0), "outputs must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PositionBias(*arguments)


def test_one_that_overflows_is_reported() -> None:
    layer = make_layer(torch.float32)
    assert layer.position_bias is not None
    nn.init.constant_(layer.position_bias.weight, 1e3)
    z = torch.randn(2, CHANNELS, *SIZE)
    assert not mint.invert(layer, z).converged.any()
    with pytest.raises(mint.NotConvergedError):
        layer.inverse(z)
