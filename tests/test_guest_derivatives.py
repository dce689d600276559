"""Derivatives of all kinds: checkpointing, torch.func, dual numbers, anomaly detection."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import mintnet_triton as mint
from tests.guest import (
    INVERTIBLE,
    KINDS,
    Calling,
    assert_rounded,
    assert_same,
    gradients,
    inputs,
    make,
    make_flow,
    make_layer,
    total,
    values,
)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_activation_checkpointing(
    kind: str, dtype: torch.dtype, recompute: bool, reentrant: bool
) -> None:
    module, x = make(kind, dtype), inputs(dtype).requires_grad_()
    for layer in module.modules():
        if isinstance(layer, mint.MintLayer):
            layer.recompute = recompute
    expected = gradients(module, module(x))
    results = checkpoint(module, x, use_reentrant=reentrant)
    found = gradients(module, results)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_rounded(found[name], gradient)
    with torch.autograd.graph.save_on_cpu():
        results = module(x)
    assert_same(tuple(gradients(module, results).values()), tuple(expected.values()))


@pytest.mark.parametrize("kind", ["layer", "flow"])
def test_a_gradient_penalty_on_an_inverse(kind: str, backend: str) -> None:
    """Also where the upstream gradient is constant, so that it has no history."""
    module = make(kind, torch.float64)
    assert isinstance(module, mint.Invertible)
    z = module(inputs(torch.float64, 1))[0].detach().requires_grad_()
    parameter = next(module.parameters())

    def penalty() -> Tensor:
        x, log_det = module.inverse(z)
        (gradient,) = torch.autograd.grad(x.sum() + log_det.sum(), z, create_graph=True)
        return total(gradient.square())

    by_z, by_parameter = torch.autograd.grad(penalty(), [z, parameter])
    step = 1e-6
    for tensor, found in ((z, by_z), (parameter, by_parameter)):
        direction = torch.randn_like(tensor)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * step * direction)
            ends.append(float(penalty().detach()))
            with torch.no_grad():
                tensor.sub_(sign * step * direction)
        slope = float((found * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", INVERTIBLE)
def test_transforms_of_inverses(kind: str, dtype: torch.dtype) -> None:
    """jacrev, jacfwd and dual numbers all give the inverse of autograd's Jacobian."""
    module = make(kind, dtype)
    assert isinstance(module, mint.Invertible)
    x = inputs(dtype, 2)
    z = module(x)[0].detach()
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v)[0], x)
    n = x.numel()
    inverse = torch.linalg.inv(jacobian.detach().reshape(n, n).double())
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}

    def run(z: Tensor) -> Tensor:
        return module.inverse(z)[0]

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_same(transform(run)(z).detach().reshape(n, n).double(), inverse, **close)
    by_log_det = [transform(lambda z: module.inverse(z)[1])(z).detach()
                  for transform in (torch.func.jacrev, torch.func.jacfwd)]  # fmt: skip
    assert_same(*by_log_det, **close)
    tangent = torch.randn_like(z)
    expected = (inverse @ tangent.double().flatten()).view(x.shape).to(dtype)
    with forward_ad.dual_level():
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                dual, dual_log_det = module.inverse(forward_ad.make_dual(z, tangent))
                assert_same(forward_ad.unpack_dual(dual).tangent, expected, **close)
                along = torch.einsum("abchw,bchw->a", by_log_det[0], tangent)
                assert_same(forward_ad.unpack_dual(dual_log_det).tangent, along, **close)


def test_gradients_by_functional_parameters(backend: str) -> None:
    flow = make_flow(torch.float64)
    z = torch.randn(2, *flow.latent_shape, dtype=torch.float64)
    for module in (
        Calling(flow, lambda: flow.inverse(z)),
        Calling(flow, lambda: flow.sample_and_log_prob(2, torch.Generator().manual_seed(1))),
    ):
        parameters = {name: one.detach() for name, one in module.named_parameters()}

        def loss(given: dict[str, Tensor], module: nn.Module = module) -> Tensor:
            return total(functional_call(module, given, ()))

        found = torch.func.grad(loss)(parameters)
        expected = gradients(module, module())
        assert_same(tuple(found.values()), tuple(expected.values()))


def test_transforms_that_an_inverse_does_not_know_are_refused() -> None:
    layer, z = make_layer(), inputs()

    def norm(z: Tensor) -> Tensor:
        return layer.inverse(z)[0].square().sum()

    with pytest.raises(NotImplementedError, match=r"vmap over an inverse, which takes a batch"):
        torch.func.vmap(layer.inverse)(z[:, None])
    with pytest.raises(NotImplementedError, match="take both in reverse mode"):
        torch.func.hessian(norm)(z)
    twice = torch.func.jacrev(torch.func.grad(norm))(z)
    assert twice.shape == z.shape * 2


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients_of_the_forward_pass(kind: str, backend: str) -> None:
    module, x = make(kind, torch.float64), inputs(torch.float64)
    parameters = {name: one.detach() for name, one in module.named_parameters()}

    def loss(given: dict[str, Tensor], one: Tensor) -> Tensor:
        return values(functional_call(module, given, (one[None],)))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    module.zero_grad()
    values(module(x))[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert_rounded(each[name].sum(0), parameter.grad)


def test_anomaly_detection_finds_nothing(backend: str) -> None:
    for kind in KINDS:
        module = make(kind)
        with torch.autograd.set_detect_anomaly(True):
            gradients(module, module(inputs()))
            if isinstance(module, mint.Invertible):
                gradients(module, module.inverse(torch.randn_like(module(inputs())[0])))
