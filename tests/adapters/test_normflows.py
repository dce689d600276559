"""Flows as flows of normflows."""

import pytest
import torch
from torch import nn

pytest.importorskip("normflows")

import normflows

import mintnet_triton as mint
from mintnet_triton.adapters.normflows import MintFlow
from tests.adapters.flows import (
    SHAPE,
    assert_trains,
    digits,
    exact_log_det,
    make_conditional_flow,
    make_flow,
    moved,
    samples,
)


def test_log_determinants_of_the_direction_called() -> None:
    model = make_flow()
    flow = MintFlow(model)
    x = samples(3)
    z, log_det = flow.inverse(x)  # from data to latent
    torch.testing.assert_close(z, model(x)[0])
    expected = exact_log_det(lambda v: model(v[None])[0][0], x)
    torch.testing.assert_close(log_det, expected)
    again, back = flow(z)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(back, -expected)
    reverse = normflows.flows.Reverse(flow)
    torch.testing.assert_close(reverse(x), (z, log_det))


def test_a_flow_in_float64() -> None:
    """normflows adds up in the default dtype."""
    model = make_flow()
    base = normflows.distributions.base.DiagGaussian(model.latent_shape, trainable=False)
    flow = normflows.NormalizingFlow(base.double(), [MintFlow(model)])
    x = samples(4)
    found = flow.log_prob(x)
    torch.testing.assert_close(found.double(), model.log_prob(x), rtol=1e-5, atol=1e-4)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(flow.log_prob(x), model.log_prob(x))
    finally:
        torch.set_default_dtype(torch.float32)
    drawn, log_prob = flow.sample(5)
    assert drawn.shape == (5, *SHAPE)
    torch.testing.assert_close(
        log_prob.double(), model.log_prob(drawn), rtol=1e-5, atol=1e-4, check_dtype=False
    )
    loss = flow.forward_kld(x)
    found_gradients = torch.autograd.grad(loss, list(model.parameters()))
    wanted = torch.autograd.grad(-model.log_prob(x).mean(), list(model.parameters()))
    torch.testing.assert_close(found_gradients, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # of its Glow
def test_a_mixed_flow_trains_and_inverts() -> None:
    """From latent to data: a step of Glow, two Mint layers, and the squeeze undone."""
    pair = mint.MintPair(4, 4, 4)
    glow = normflows.flows.GlowBlock(4, 8, split_mode="channel", scale=True)
    base = normflows.distributions.base.DiagGaussian((4, 4, 4), trainable=False)
    flow = normflows.NormalizingFlow(base, [glow, MintFlow(pair), normflows.flows.Squeeze()])
    flow.forward_kld(digits())  # an ActNorm takes its values from the first batch
    assert_trains(lambda: flow.forward_kld(digits()), flow.parameters())
    z, log_det = flow.inverse_and_log_det(digits())
    again, back = flow.forward_and_log_det(z)
    torch.testing.assert_close(again, digits(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back, -log_det, rtol=1e-3, atol=1e-3)
    exact = exact_log_det(lambda v: flow.inverse(v[None])[0], digits()[0])
    torch.testing.assert_close(log_det[0], exact, rtol=1e-3, atol=1e-3)


def test_a_conditional_flow() -> None:
    model = make_conditional_flow().float()
    base = normflows.distributions.base.DiagGaussian(model.latent_shape, trainable=False)
    flow = normflows.ConditionalNormalizingFlow(base, [MintFlow(model)])
    x, context = samples(4).float(), samples(4, shape=(3,)).float()
    torch.testing.assert_close(
        flow.log_prob(x, context), model.log_prob(x, context), rtol=1e-4, atol=1e-4
    )
    drawn, log_prob = flow.sample(4, context)
    torch.testing.assert_close(log_prob, model.log_prob(drawn, context), rtol=1e-3, atol=1e-3)
    assert_trains(lambda: flow.forward_kld(x, context), flow.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be an Invertible, got Linear"):
        MintFlow(nn.Linear(2, 2))
    poor = MintFlow(make_flow(), mint.FixedPoint(0.1, 1, tolerance=1e-12))
    with pytest.raises(mint.NotConvergedError):
        poor(samples(2, shape=(8, 2, 1)))
    assert MintFlow(moved(mint.MintLayer(1, 2, 1)))(torch.zeros(0, 1, 2, 2))[1].shape == (0,)
