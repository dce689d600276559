"""Layers that are given a context, by the Triton kernels: against plain PyTorch, bit for bit where
nothing changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mintnet_triton import FixedPoint, MintLayer, frozen, invert, use_backend
from mintnet_triton.kernels.gpu import mint_layer
from mintnet_triton.solvers import Wavefront
from tests import grid
from tests.conditioned import fill

CASES: list[tuple[str, dict[str, Any]]] = [
    ("vector", {"triangle": "lower", "order": "channel"}),
    ("map", {"triangle": "upper", "order": "pixel", "kernel_size": (1, 3, 1)}),
]


def make_layer(dtype: torch.dtype = torch.float64, **arguments: Any) -> MintLayer:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"channels": 2, "size": (2, 3), "hidden": 3, "context": 2}
    layer = MintLayer(**shape | {"initialisation": "classifier"} | arguments).to(dtype)
    return fill(layer).to(grid.DEVICE)


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    context = torch.randn(3, 2, *((2, 3) if kind == "map" else ()), dtype=dtype)
    return torch.randn(3, 2, 2, 3, dtype=dtype).to(grid.DEVICE), context.to(grid.DEVICE)


def everything(
    layer: MintLayer, x: Tensor, context: Tensor | None, inverse: bool = False
) -> dict[str, Tensor]:
    """Results and all gradients, by random ones from above."""
    generator = torch.Generator().manual_seed(4)
    upstream = [
        torch.randn(shape, generator=generator, dtype=x.dtype).to(x.device)
        for shape in (x.shape, x.shape[:1])
    ]
    own = x.clone().requires_grad_()
    given = () if context is None else (context.clone().requires_grad_(),)
    layer.zero_grad()
    if inverse:
        y, log_det = layer.inverse(own, None, *given)
    else:
        y, log_det = layer(own, *given)
    torch.autograd.backward((y, log_det), upstream)
    found = {"y": y, "log_det": log_det, "x": own.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    if given:
        found["context"] = given[0].grad
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        *CASES,
        ("none", {"context": None, "position_bias": 2, **CASES[1][1]}),
        ("vector", {"position_bias": 2, **CASES[0][1]}),
    ],
    ids=["vector", "map", "position", "position and vector"],
)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_kernels_and_plain_torch_agree(kind: str, arguments: dict[str, Any], inverse: bool) -> None:
    layer = make_layer(**arguments)
    x, given = inputs(kind)
    context = None if kind == "none" else given
    results = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            results.append(everything(layer, x, context, inverse))
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "arguments"), CASES, ids=["vector", "map"])
def test_a_network_that_gives_zeros_changes_no_bit(kind: str, arguments: dict[str, Any]) -> None:
    layer = make_layer(torch.float32, **arguments)
    with torch.no_grad():
        for parameter in layer.get_submodule("context_network").parameters():
            parameter.zero_()
    plain = make_layer(torch.float32, context=None, **arguments)
    state = {name: one for name, one in layer.state_dict().items() if "context" not in name}
    plain.load_state_dict(state)
    x, context = inputs(kind, torch.float32)
    with use_backend("triton"):
        computed, expected = everything(layer, x, context), everything(plain, x, None)
        for name, value in expected.items():
            assert torch.equal(computed[name], value), name
        for solver in (FixedPoint(iterations=3), Wavefront()):
            found, alike = invert(layer, x, solver, context=context), invert(plain, x, solver)
            assert torch.equal(found.x, alike.x)
            assert torch.equal(found.log_det, alike.log_det)
            assert torch.equal(found.residual, alike.residual)


@pytest.mark.parametrize("kind", ["vector", "map"])
def test_algorithm_1_takes_the_same_steps(kind: str) -> None:
    """Residuals are relative to z, whatever a context adds to it."""
    layer = make_layer()
    x, context = inputs(kind)
    with torch.no_grad(), use_backend("torch"):
        z = layer(x, context)[0]
    results = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            view = layer.given(context)
            view = view.view(view.tensors())
            solver = FixedPoint(iterations=3, tolerance=1e-12)
            results.append(solver_solution(view, z, solver))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def solver_solution(view: MintLayer, z: Tensor, solver: FixedPoint) -> tuple[Tensor, ...]:
    with torch.no_grad():
        solution = view.solve(z, solver, trace=True, reference=None)
    assert solution.trace is not None
    return solution.x, solution.log_det, solution.residual, solution.trace


def test_recomputed_and_frozen_layers() -> None:
    layer = make_layer()
    x, context = inputs("map")
    with use_backend("triton"):
        expected = everything(layer, x, context)
        layer.recompute = True
        for name, value in everything(layer, x, context).items():
            assert torch.equal(value, expected[name]), name
        with frozen(layer):
            for _ in range(2):
                y, log_det = layer(x, context)
                assert torch.equal(y, expected["y"])
                assert torch.equal(log_det, expected["log_det"])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_operators_are_well_formed_and_compile() -> None:
    layer = make_layer()
    x, context = inputs("vector")
    condition = layer.given(context)._condition
    assert condition is not None
    weights, structure = layer.raw_weights(), layer._structure
    tensors = [None if one is None else one.detach() for one in weights]
    named = [structure[0], structure[1], "elu"]
    packed = mint_layer.pack_op(tensors, torch.float64, "ieee", named)
    inner = [condition.shift1.detach(), condition.shift2.detach(), condition.scale.detach()]
    biases = tensors[1:6:2]
    arguments = (x, *packed[:6], *biases, list(weights.kernels), named, inner)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(mint_layer.layer_op, arguments, test_utils=tests)
    y, diagonal, log_det, h1, h2 = mint_layer.layer_op(*arguments)
    for by_weights in (True, False):
        backward = (x, diagonal, h1, h2, y, diagonal, log_det, tensors, named, by_weights, inner)
        torch.library.opcheck(mint_layer.backward_op, backward, test_utils=tests)
    with use_backend("triton"):
        expected = everything(layer, x, context)
        layer.compile(backend="aot_eager", fullgraph=True)
        for name, value in everything(layer, x, context).items():
            torch.testing.assert_close(value, expected[name])
