"""Gradients of inverses against finite differences and against the forward map's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import mintnet_triton as mint
from mintnet_triton.calculus import Compose, Elementwise, MaskedAffine, Sum
from mintnet_triton.ordering import Order, Triangle
from tests.test_fronts import random_layer


def by_parameters(
    module: mint.Invertible, z: Tensor, solver: mint.Solver | None = None
) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """The inverse as a function of z and all parameters, and where to take it."""
    names, values = zip(*module.named_parameters(), strict=True)

    class Inverting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.module.inverse(z, solver)

    holder = Inverting()

    def function(z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        given = {f"module.{name}": value for name, value in zip(names, parameters, strict=True)}
        x, log_det = functional_call(holder, given, (z,))
        return x, log_det

    inputs = [z.detach().clone().requires_grad_()]
    inputs += [value.detach().clone().requires_grad_() for value in values]
    return function, tuple(inputs)


def assert_gradients(module: mint.Invertible, z: Tensor, solver: mint.Solver | None = None) -> None:
    function, inputs = by_parameters(module, z, solver)
    # Weights that the mask hides have no effect, and the others one of any size.
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("order", ["channel", "pixel"])
def test_gradients_of_a_layer(order: Order, triangle: Triangle) -> None:
    layer = random_layer(2, (3, 2), 2, order, triangle, (3, 1, 3))
    z = layer(torch.randn(2, 2, 3, 2, dtype=torch.float64))[0].detach()
    assert_gradients(layer, z)


@pytest.mark.parametrize(
    "solver", [mint.FixedPoint(alpha=0.7, iterations=500), mint.Wavefront()], ids=str
)
def test_gradients_do_not_depend_on_the_solver(solver: mint.Solver) -> None:
    layer = random_layer(1, (3, 3), 2, activation="tanh")
    z = layer(torch.randn(2, 1, 3, 3, dtype=torch.float64))[0].detach()
    assert_gradients(layer, z, solver)


def test_gradients_of_a_network() -> None:
    flow = mint.MintNet(1, (4, 2), pairs=2, hidden=4, squeezes=1, kernel_size=(3, 1, 1)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    z = torch.randn(1, *flow.latent_shape, dtype=torch.float64)
    assert_gradients(flow, z)


def test_gradients_in_the_calculus() -> None:
    lower = mint.Ordering("channel", "lower")
    conv = MaskedAffine(0.3 * torch.randn(2, 2, 3, 3), torch.randn(2), lower).double()
    residual = Sum(Elementwise("identity"), Compose(Elementwise("tanh"), conv), (2.0, 0.1))
    assert_gradients(residual, torch.randn(2, 2, 2, 3, dtype=torch.float64))
    upper = MaskedAffine(torch.randn(4, 4).triu() + 3 * torch.eye(4), torch.randn(4),
                         mint.Ordering(triangle="upper")).double()  # fmt: skip
    assert_gradients(upper, torch.randn(2, 4, dtype=torch.float64))


def test_a_round_trip_has_the_gradient_of_the_identity() -> None:
    flow = mint.MintNet(3, 4, pairs=2, hidden=4, squeezes=1)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    z, log_det = flow(x)
    again, inverse_log_det = flow.inverse(z)
    upstream = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((again, log_det + inverse_log_det), x,
                                      (upstream, torch.randn(2)))  # fmt: skip
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, upstream, rtol=1e-4, atol=1e-4)


def test_training_by_reverse_kl() -> None:
    """A flow learns a shifted, scaled normal density that it never sees a sample of."""
    torch.manual_seed(0)
    flow = mint.MintNet(1, 2, pairs=1, hidden=4, squeezes=0)
    optimiser = torch.optim.Adam(flow.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        x, log_prob = flow.sample_and_log_prob(64)
        target = torch.distributions.Normal(1.0, 0.5).log_prob(x).flatten(1).sum(1)
        loss = (log_prob - target).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 5
    assert losses[-1] < 0.3


def test_samples_carry_no_gradient_and_those_with_a_density_do() -> None:
    flow = mint.MintNet(1, 2, pairs=1, hidden=2, squeezes=0)
    assert not flow.sample(2).requires_grad
    assert all(one.requires_grad for one in flow.sample_and_log_prob(2))
    with torch.no_grad():
        assert not flow.inverse(torch.randn(1, 1, 2, 2))[0].requires_grad
    for parameter in flow.parameters():
        parameter.requires_grad_(False)
    assert not flow.inverse(torch.randn(1, 1, 2, 2))[0].requires_grad


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_second_derivatives(backend: str) -> None:
    layer = random_layer(1, (2, 2), 2)
    z = layer(torch.randn(1, 1, 2, 2, dtype=torch.float64))[0].detach()
    with mint.use_backend(backend):
        function, inputs = by_parameters(layer, z)
        assert torch.autograd.gradgradcheck(function, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_what_is_kept_for_gradients_does_not_grow_with_iterations() -> None:
    layer = random_layer(1, (3, 3), 2)
    z = layer(torch.randn(2, 1, 3, 3, dtype=torch.float64))[0].detach()
    kept = []
    for iterations in (300, 600):
        sizes: list[int] = []

        def pack(values: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(values.numel())
            return values

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            layer.inverse(z, mint.FixedPoint(alpha=0.5, iterations=iterations))
        kept.append(sum(sizes))
    # x, the effective weights, and what they are made of
    assert kept[0] == kept[1] <= 2 * z.numel() + 2 * sum(one.numel() for one in layer.parameters())


def test_frozen_weights_give_no_gradients_and_are_the_ones_used() -> None:
    layer = random_layer(1, (3, 3), 2).float()
    z = torch.randn(2, 1, 3, 3)
    expected = mint.invert(layer, z).x
    with mint.frozen(layer):
        with torch.no_grad():
            layer.t.mul_(2)
        x, _ = layer.inverse(z)
        assert not x.requires_grad
        assert torch.equal(x, expected)
    assert not torch.allclose(mint.invert(layer, z).x, expected)
