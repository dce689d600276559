"""What the tests of what people do to modules share: small modules, and what is the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mintnet_triton as mint

KINDS = ["layer", "pair", "flow", "classifier"]
INVERTIBLE = KINDS[:3]

#: what torch's compiler does itself to a function with a gradient of its own
TORCHS_OWN = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

CONSTRUCTORS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: mint.MintLayer(2, 4, 3),
    "pair": lambda: mint.MintPair(2, 4, 3),
    "flow": lambda: mint.MintNet(2, 4, 2, 4, squeezes=1),
    "classifier": lambda: mint.MintClassifier(2, 4, 3, pairs=2, squeezes=1, width=4),
    "conv": lambda: mint.MaskedConv2d(2, 6, 3, colours=2),
}


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small module whose weights all matter."""
    module = CONSTRUCTORS[kind]().to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def make_layer(dtype: torch.dtype = torch.float32) -> mint.MintLayer:
    layer = make("layer", dtype)
    assert isinstance(layer, mint.MintLayer)
    return layer


def make_flow(dtype: torch.dtype = torch.float32) -> mint.MintNet:
    flow = make("flow", dtype)
    assert isinstance(flow, mint.MintNet)
    return flow


class Calling(nn.Module):
    """A module that calls a method of another."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor | None = None) -> Any:
        return self.call() if x is None else self.call(x)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 4, 4, dtype=dtype)


def values(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same(
    computed: Any, expected: Any, rtol: float | None = None, atol: float | None = None
) -> None:
    for one, other in zip(values(computed), values(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def assert_rounded(computed: Any, expected: Any) -> None:
    """The same but for rounding, which is relative to the largest value."""
    for one, other in zip(values(computed), values(expected), strict=True):
        size = float(other.detach().abs().max()) if other.numel() else 0.0
        eps = torch.finfo(other.dtype).eps
        assert_same(one, other, rtol=0, atol=100 * eps * max(1.0, size))


def total(results: Any) -> Tensor:
    """A number that depends on all results, each with a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    terms = [
        (one * torch.randn(one.shape, generator=generator, dtype=one.dtype)).sum()
        for one in values(results)
    ]
    return torch.stack([term.double() for term in terms]).sum()


def gradients(module: nn.Module, results: Any) -> dict[str, Tensor]:
    module.zero_grad()
    total(results).backward()
    found = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items()}


def convs_of(module: nn.Module) -> list[mint.MaskedConv2d]:
    return [one for one in module.modules() if isinstance(one, mint.MaskedConv2d)]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def doubled(module: nn.Module, _: Any) -> None:
    module.weight = 2 * module.raw  # type: ignore[assignment,operator]


def compute_by_hook(conv: nn.Module) -> None:
    """The weight is twice a parameter, by a hook of the user's own."""
    weight = conv.weight
    del conv.weight
    conv.raw = nn.Parameter(weight.detach() / 2)  # type: ignore[operator]
    conv.register_forward_pre_hook(doubled)
