"""Parts that are replaced, and modules of a user's own: called, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mintnet_triton as mint
from mintnet_triton.calculus import Compose, Elementwise, MaskedAffine, Sum
from tests.guest import (
    Doubled,
    assert_same,
    inputs,
    make,
    make_flow,
    make_layer,
)


@pytest.mark.parametrize(
    "head",
    [nn.Identity(), nn.Sequential(nn.Dropout(), nn.Linear(16, 7)), nn.Linear(16, 7, bias=False)],
    ids=["none", "two", "another"],
)
def test_a_replaced_head(head: nn.Module) -> None:
    classifier = make("classifier")
    classifier.fc = head.eval()
    log_probs = classifier(inputs())
    assert log_probs.shape[0] == 3
    assert_same(log_probs.exp().sum(1), torch.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda one: setattr(one, "t", nn.Parameter(torch.ones(2, 1, 1))),
            r"t of a MintLayer must",
        ),
        (lambda one: setattr(one, "t", nn.Parameter(torch.ones(1, 2, 4, 4))), r"t of .* must have"),
        (
            lambda one: setattr(one.conv1, "bias", nn.Parameter(torch.ones(1))),
            r"bias1 of a MintLayer must",
        ),
        (
            lambda one: setattr(one, "conv1", mint.MaskedConv2d(2, 2, 3, colours=2)),
            r"weight2 of a MintLayer must",
        ),
        (
            lambda one: setattr(one, "conv3", mint.MaskedConv2d(6, 4, 3, colours=2)),
            r"weight3 of a MintLayer must",
        ),
        (
            lambda one: setattr(one.conv1, "weight", nn.Parameter(torch.ones(6, 2, 1, 1))),
            r"weight must have shape \(6, 2, 3, 3\), got \(6, 2, 1, 1\)",
        ),
        (lambda one: one.conv3.to("meta"), r"weight3 of a MintLayer is on meta"),
        (lambda one: one.conv2.double(), r"weight2 of a MintLayer is torch.float64"),
        (
            lambda one: setattr(one, "t", nn.Parameter(one.t.double())),
            r"t of .* is torch.float64|parameters are torch",
        ),
        (
            lambda one: setattr(one, "conv2", mint.MaskedConv2d(6, 6, 3, colours=1)),
            "conv2 of a MintLayer must be a MaskedConv2d of its order and colours",
        ),
        (
            lambda one: setattr(
                one, "conv2", mint.MaskedConv2d(6, 6, 3, colours=2, triangle="upper")
            ),
            "conv2 of a MintLayer must be a MaskedConv2d of its order and colours",
        ),
        (lambda one: setattr(one, "conv2", nn.Conv2d(6, 6, 3)), "conv2 .* must be a MaskedConv2d"),
        (lambda one: setattr(one, "conv2", nn.Sequential(one.conv2)), "must be a MaskedConv2d"),
        (lambda one: setattr(one, "conv2", Adapted(6, 6, 3, colours=2)), "forward of its own"),
        (lambda one: setattr(one.conv2, "forward", lambda x: x), "forward of its own"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "transform", "inverse", "frozen"])
def test_a_part_that_does_not_fit_is_refused(
    change: Callable[[mint.MintLayer], None], message: str, call: str, backend: str
) -> None:
    """Compiled kernels would read beyond it, and a forward of its own would not be called."""
    layer = make_layer()
    change(layer)
    with pytest.raises((TypeError, ValueError), match=message):
        mint.frozen(layer).__enter__() if call == "frozen" else getattr(layer, call)(inputs())


class Adapted(mint.MaskedConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 100


class LowRank(mint.MaskedConv2d):
    """What is right: a weight of another making."""

    def masked_weight(self) -> Tensor:
        return 2 * super().masked_weight()


def test_a_convolution_with_a_weight_of_another_making(backend: str) -> None:
    layer, x = make_layer(), inputs()
    state = layer.conv2.state_dict()
    layer.conv2 = LowRank(6, 6, 3, colours=2)
    layer.conv2.load_state_dict(state)
    other = make_layer()
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        other.conv2.weight.mul_(2)
    assert_same(layer(x), other(x))
    assert_same(layer.inverse(x), other.inverse(x))


class Twice(mint.TriangularMap):
    """A map of a user's own, that has another inside."""

    def __init__(self, module: mint.MintLayer) -> None:
        super().__init__()
        self.module, self.ordering = module, module.ordering

    def evaluator(self) -> Any:
        evaluate = self.module.evaluator()
        return lambda x: tuple(2 * one for one in evaluate(x))


def test_a_map_with_another_inside_is_not_taken_for_it() -> None:
    map_, x = Twice(make_layer(torch.float64)), inputs(torch.float64)
    z = map_(x)[0].detach()
    assert_same(mint.invert(map_, z, mint.FixedPoint(alpha=0.7, iterations=900)).x, x)


class Residual(mint.TriangularMap):
    """A map of a user's own, that calls a module."""

    def __init__(self) -> None:
        super().__init__()
        self.ordering = None
        self.child = Doubled()

    def evaluator(self) -> Any:
        return lambda x: (3 * x + self.child(x), torch.full_like(x, 5))


def test_hooks_of_what_a_map_calls_are_part_of_it() -> None:
    map_, x = Residual(), inputs()
    map_.child.register_forward_hook(lambda module, given, output: output / 2)
    z, _ = map_(x)
    assert_same(z, 4 * x)
    assert_same(mint.invert(map_, z, mint.FixedPoint(alpha=0.9)).x, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learnt", [True, False])
def test_gradients_of_inverses_of_constant_slope(learnt: bool) -> None:
    ordering = mint.Ordering("channel", "lower")
    affine = MaskedAffine(torch.eye(2)[..., None, None], torch.randn(2), ordering).double()
    affine.requires_grad_(learnt)
    x = inputs(torch.float64, 1)
    for map_ in (
        affine,
        Compose(make_layer(torch.float64), affine),
        Sum(Elementwise("identity"), affine),
        Elementwise("identity"),
        Elementwise("leaky_relu"),
    ):
        z = map_(x)[0].detach().requires_grad_()
        found, *_ = torch.autograd.grad(map_.inverse(z)[0].sum(), z)
        by_x = torch.autograd.functional.jacobian(lambda v, map_=map_: map_(v)[0], x)
        n = x.numel()
        expected = torch.linalg.solve(by_x.reshape(n, n).T, torch.ones(n, dtype=torch.float64))
        assert_same(found.flatten(), expected, rtol=1e-6, atol=1e-6)


class Bent(mint.MintLayer):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward(x)
        return y + 1, log_det


def test_a_layer_with_a_forward_of_its_own_is_called_by_a_classifier() -> None:
    classifier, x = make("classifier"), inputs()
    layer = classifier.get_submodule("layers.0.1")
    assert isinstance(layer, mint.MintLayer)
    handle = layer.register_forward_hook(lambda module, given, out: (out[0] + 1, out[1]))
    expected = classifier(x)
    handle.remove()
    bent = Bent(4, 4, 1, activation="leaky_relu")
    bent.load_state_dict(layer.state_dict())
    block = classifier.get_submodule("layers.0")
    setattr(block, "1", bent)
    assert_same(classifier(x), expected)


def test_verify_sees_what_is_around_the_layers() -> None:
    flow, x = make_flow(), inputs(batch=1)
    assert mint.verify(flow, x).ok
    layer = flow.get_submodule("layers.0.0")
    handle = layer.register_forward_hook(
        lambda module, given, results: (2 * results[0], results[1])
    )
    report = mint.verify(flow, x)
    assert not report.ok
    assert float(report.forward_error) > 0.1
    handle.remove()
    handle = flow.register_forward_pre_hook(lambda module, given: (given[0] / 2,))
    assert not mint.verify(flow, x).ok
    handle.remove()
    layer.register_forward_hook(lambda module, given, results: (results[0], results[1] + 1))
    assert not mint.verify(flow, x).ok


def test_a_flow_that_is_cut() -> None:
    flow, x = make_flow(), inputs()
    assert flow.latent_shape == (8, 2, 2)
    flow.layers = flow.layers[:1]
    assert flow.latent_shape == (2, 4, 4)
    assert_same(flow.inverse(flow(x)[0].detach())[0], x, rtol=1e-4, atol=1e-4)
    assert flow.sample(2).shape == (2, 2, 4, 4)
    with pytest.raises(TypeError, match=r"a MintPair is not sliced"):
        mint.MintPair(2, 4, 3)[:1]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.ao")
def test_a_quantised_head() -> None:
    classifier, x = make("classifier"), inputs()
    quantised = torch.ao.quantization.quantize_dynamic(classifier, {nn.Linear})
    assert_same(quantised(x), classifier(x), rtol=0.1, atol=0.1)
    with pytest.raises(TypeError, match=r"images is torch.float64"):
        quantised(x.double())
