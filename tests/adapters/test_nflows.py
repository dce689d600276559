"""Flows as transforms of nflows."""

import pytest
import torch
from torch import nn

pytest.importorskip("nflows")

from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, InverseTransform
from nflows.transforms.coupling import AffineCouplingTransform
from nflows.transforms.reshape import SqueezeTransform

import mintnet_triton as mint
from mintnet_triton.adapters.nflows import MintTransform
from tests.adapters.flows import (
    SHAPE,
    assert_trains,
    digits,
    exact_log_det,
    make_conditional_flow,
    make_flow,
    samples,
)


def test_log_determinants_of_the_direction_called() -> None:
    model = make_flow()
    transform = MintTransform(model)
    x = samples(3)
    z, log_det = transform(x)
    expected = exact_log_det(lambda v: model(v[None])[0][0], x)
    torch.testing.assert_close(log_det, expected)
    again, back = transform.inverse(z)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(back, -expected)
    torch.testing.assert_close(InverseTransform(transform).inverse(x), (z, log_det))


def test_a_flow_with_squeezes() -> None:
    model = make_flow()
    flow = Flow(MintTransform(model), StandardNormal(model.latent_shape)).double()
    x = samples(4)
    torch.testing.assert_close(flow.log_prob(x), model.log_prob(x), rtol=1e-6, atol=1e-6)
    upstream = samples(4, shape=())
    found, wanted = (
        torch.autograd.grad(log_prob, list(model.parameters()), upstream)
        for log_prob in (flow.log_prob(x), model.log_prob(x))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    # It draws noise in the default dtype.
    single = Flow(MintTransform(model.float()), StandardNormal(model.latent_shape))
    drawn, log_prob = single.sample_and_log_prob(5)
    assert drawn.shape == (5, *SHAPE)
    torch.testing.assert_close(log_prob, model.log_prob(drawn), rtol=1e-4, atol=1e-4)


class Network(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.conv(x)
        return out


def test_a_mixed_flow_trains_and_inverts() -> None:
    coupling = AffineCouplingTransform(torch.tensor([0, 1, 0, 1]), Network)
    parts = [SqueezeTransform(), coupling, MintTransform(mint.MintPair(4, 4, 4))]
    transform = CompositeTransform(parts)
    flow = Flow(transform, StandardNormal((4, 4, 4)))
    assert_trains(lambda: -flow.log_prob(digits()).mean(), flow.parameters())
    z, log_det = transform(digits())
    again, back = transform.inverse(z)
    torch.testing.assert_close(again, digits(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back, -log_det, rtol=1e-4, atol=1e-4)
    exact = exact_log_det(lambda v: transform(v[None])[0][0], digits()[0])
    torch.testing.assert_close(log_det[0], exact, rtol=1e-4, atol=1e-4)


def test_a_conditional_flow() -> None:
    """Its context goes to all parts; ours without one ignore it, as theirs do."""
    model = make_conditional_flow().float()
    transform = CompositeTransform(
        [MintTransform(mint.MintLayer(SHAPE[0], SHAPE[1:], 3)), MintTransform(model)]
    )
    flow = Flow(transform, StandardNormal(model.latent_shape))
    x, context = samples(4).float(), samples(4, shape=(3,)).float()
    z, log_det = transform(x, context)
    again, back = transform.inverse(z, context)
    torch.testing.assert_close((again, back), (x, -log_det), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.log_prob(x, context)[:2], flow.log_prob(x[:2], context[:2]))
    assert not torch.allclose(flow.log_prob(x, context), flow.log_prob(x, context.flip(0)))
    drawn, log_prob = flow.sample_and_log_prob(5, context)
    assert drawn.shape == (4, 5, *SHAPE)
    rows = context.repeat_interleave(5, 0)
    expected = flow.log_prob(drawn.flatten(0, 1), rows).view(4, 5)
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)
    assert_trains(lambda: -flow.log_prob(x, context).mean(), flow.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be an Invertible, got Linear"):
        MintTransform(nn.Linear(2, 2))
    poor = MintTransform(make_flow(), mint.FixedPoint(0.1, 1, tolerance=1e-12))
    with pytest.raises(mint.NotConvergedError):
        poor.inverse(samples(2, shape=(8, 2, 1)))
