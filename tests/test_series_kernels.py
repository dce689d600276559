"""Layers of series by the Triton kernels, which take them for images of one row, against torch."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import mintnet_triton as mint
from mintnet_triton.calculus import TriangularMap
from tests import grid

# Of the interpreter, where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

ORDERINGS = list(product(("channel", "pixel"), ("lower", "upper")))

SOLVERS = (mint.Wavefront(), mint.FixedPoint(iterations=60, coarse=True), mint.Auto())


def make_layer(
    ordering: Any, kernels: Any, numbers: str = "float64", **arguments: Any
) -> mint.MintLayer:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"channels": 3, "size": (7,), "hidden": 3, "kernel_size": kernels}
    order, triangle = ordering
    layer = mint.MintLayer(
        **shape, order=order, triangle=triangle, initialisation="classifier", **arguments
    )
    with torch.no_grad():
        layer.t.uniform_(0.5, 2).mul_(torch.randn_like(layer.t).sign())
        if layer.context_network is not None:
            for parameter in layer.context_network.parameters():
                parameter.normal_(std=0.5)
    return layer.to(grid.DEVICE, grid.dtype_of(numbers))


def everything(module: torch.nn.Module, x: Tensor, *context: Tensor) -> dict[str, Tensor]:
    """Results and all gradients, by random ones from above."""
    generator = torch.Generator().manual_seed(1)
    module.zero_grad()
    x = x.clone().requires_grad_()
    given = [one.clone().requires_grad_() for one in context]
    results = module(x, *given)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [torch.randn(one.shape, generator=generator).to(one) for one in results]
    torch.autograd.backward(results, upstream)
    leaves = {"x": x, **dict(module.named_parameters())}
    leaves |= {f"context {i}": one for i, one in enumerate(given)}
    found = {f"by {name}": one.grad for name, one in leaves.items() if one.grad is not None}
    found |= {f"result {i}": one for i, one in enumerate(results)}
    return {name: one.detach().clone() for name, one in found.items()}


def assert_same(module: torch.nn.Module, x: Tensor, *context: Tensor, numbers: str) -> None:
    with mint.use_backend("torch"):
        expected = everything(module, x, *context)
    with mint.use_backend("triton"):
        found = everything(module, x, *context)
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert one.shape == expected[name].shape
        grid.assert_near(name, one, expected[name], grid.TOLERANCES[numbers])


@pytest.mark.parametrize(
    ("ordering", "kernels", "numbers"),
    grid.thinned(
        (
            (ordering, *layer)
            for ordering in ORDERINGS
            for layer in ((3, "float64"), (1, "float32"), ((5, 1, 3), "float64"))
        ),
        kept=[
            (ORDERINGS[0], 3, "float64"),
            (ORDERINGS[1], (5, 1, 3), "float64"),
            (ORDERINGS[2], 1, "float32"),
            (ORDERINGS[3], (5, 1, 3), "float64"),
        ],
    ),
)
def test_a_layer_and_its_gradients(
    ordering: Any, kernels: Any, numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(ordering, kernels, numbers)
    x = torch.randn(2, 3, 7, device=grid.DEVICE, dtype=layer.t.dtype)
    with grid.guarded(monkeypatch) as launched:
        assert_same(layer, x, numbers=numbers)
    assert "output_kernel" in launched


@pytest.mark.parametrize("size", [(), (7,)])
def test_a_context(size: tuple[int, ...]) -> None:
    layer = make_layer(ORDERINGS[0], 3, context=2)
    x = torch.randn(3, 3, 7, device=grid.DEVICE, dtype=torch.float64)
    context = torch.randn(3, 2, *size, device=grid.DEVICE, dtype=torch.float64)
    assert_same(layer, x, context, numbers="float64")
    with torch.no_grad():
        z, _ = layer(x, context)
        with mint.use_backend("triton"):
            back, _ = layer.inverse(z, mint.Wavefront(), context)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)


def test_a_convolution_by_itself() -> None:
    conv = mint.MaskedConv1d(6, 9, 3, colours=3).to(grid.DEVICE, torch.float64)
    x = torch.randn(2, 6, 5, device=grid.DEVICE, dtype=torch.float64)
    assert_same(conv, x, numbers="float64")


@torch.no_grad()
@pytest.mark.parametrize(
    ("ordering", "solver"),
    grid.thinned(
        product(ORDERINGS, SOLVERS),
        kept=[*product(ORDERINGS[:1], SOLVERS), *product(ORDERINGS[1:], SOLVERS[:1])],
    ),
)
def test_inverses(ordering: Any, solver: Any) -> None:
    layer = make_layer(ordering, (3, 1, 3), "float32")
    for conv in (layer.conv1, layer.conv2, layer.conv3):
        conv.weight.mul_(0.7)
    x = torch.randn(3, 3, 7, device=grid.DEVICE)
    with mint.use_backend("torch"):
        z = layer.double()(x.double())[0].float()
        layer.float()
    with mint.use_backend("triton"), mint.frozen(layer):
        result = mint.invert(layer, z, solver)
    assert bool(result.converged.all())
    assert result.x.shape == x.shape
    torch.testing.assert_close(result.x, x, rtol=1e-3, atol=1e-3)


def test_gradients_of_an_inverse() -> None:
    layer = make_layer(ORDERINGS[3], 3)
    inverse = Inverse(layer)
    z = torch.randn(2, 3, 7, device=grid.DEVICE, dtype=torch.float64)
    assert_same(inverse, z, numbers="float64")


class Inverse(torch.nn.Module):
    def __init__(self, layer: TriangularMap) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor) -> Any:
        return self.layer.inverse(z, mint.Wavefront())
