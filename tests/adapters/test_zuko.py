"""Flows as lazy transforms of zuko."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions.transforms import ReshapeTransform

pytest.importorskip("zuko")

import zuko

import mintnet_triton as mint
from mintnet_triton.adapters.zuko import MintTransform
from tests.adapters.flows import (
    SHAPE,
    assert_trains,
    counted,
    digit_pair,
    digits,
    exact_log_det,
    make_conditional_flow,
    make_flow,
    make_layer,
    samples,
)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Any:
    parameters = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    normal = zuko.distributions.DiagNormal
    return zuko.lazy.UnconditionalDistribution(normal, *parameters, ndims=len(shape), buffer=True)


def test_both_directions_in_one_pass_each() -> None:
    layer = make_layer()
    lazy: Any = MintTransform(layer)
    transform = lazy()
    for batch in ((), (3,), (2, 3)):
        x = samples(*batch)
        with counted(layer) as counts:
            z, log_det = transform.call_and_ladj(x)
        assert counts == {"forward": 1, "inverse": 0}
        expected = exact_log_det(lambda v: layer(v[None])[0][0], x.reshape(-1, *SHAPE))
        torch.testing.assert_close(log_det.reshape(-1), expected)
        for inverse in (transform.inv, lazy.inv()):
            z = z.clone()  # nothing is cached of it
            with counted(layer) as counts:
                again, back = inverse.call_and_ladj(z)
            assert counts == {"forward": 0, "inverse": 1}
            torch.testing.assert_close(again, x)
            torch.testing.assert_close(back, -log_det)
    with counted(layer) as counts:
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, z), log_det)
    assert counts["inverse"] == 0


def test_a_flow_with_squeezes() -> None:
    model = make_flow()
    flow = zuko.lazy.Flow(MintTransform(model), normal(*model.latent_shape))
    x = samples(3)
    torch.testing.assert_close(flow().log_prob(x), model.log_prob(x))
    assert flow().event_shape == SHAPE
    drawn, log_prob = flow().rsample_and_log_prob((2, 5))
    assert drawn.shape == (2, 5, *SHAPE)
    torch.testing.assert_close(model.log_prob(drawn.flatten(0, 1)).view(2, 5), log_prob)
    assert {id(one) for one in flow.parameters()} == {id(one) for one in model.parameters()}
    by_weights = torch.autograd.grad(drawn.sum(), list(model.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in by_weights)


def test_a_mixed_flow_trains_and_inverts() -> None:
    pair = digit_pair()
    flatten = zuko.lazy.UnconditionalTransform(
        ReshapeTransform, torch.Size((1, 8, 8)), torch.Size((64,))
    )
    coupling = zuko.flows.NICE(64, transforms=2, hidden_features=[16]).transform
    flow = zuko.lazy.Flow([MintTransform(pair), flatten, coupling], normal(64, dtype=torch.float32))
    assert_trains(lambda: -flow().log_prob(digits()).mean(), flow.parameters())
    transform = flow().transform
    z, log_det = transform.call_and_ladj(digits())
    torch.testing.assert_close(transform.inv(z), digits(), rtol=1e-4, atol=1e-4)
    exact = exact_log_det(lambda v: transform(v[None])[0], digits()[0])
    torch.testing.assert_close(log_det[0], exact, rtol=1e-4, atol=1e-4)


def test_a_conditional_flow() -> None:
    """Its context goes to all parts; ours without one ignore it, as theirs do."""
    model, plain = make_conditional_flow(), make_layer()
    flow = zuko.lazy.Flow([MintTransform(plain), MintTransform(model)], normal(*model.latent_shape))
    x, context = samples(4), samples(4, shape=(3,))
    y, log_det = plain(x)
    found = flow(context).log_prob(x)
    torch.testing.assert_close(found, model.log_prob(y, context) + log_det)
    torch.testing.assert_close(flow(context[0]).log_prob(x)[:1], found[:1])
    assert flow(context).sample((2,)).shape == (2, 4, *SHAPE)
    drawn, log_prob = flow(context).rsample_and_log_prob((2,))
    torch.testing.assert_close(flow(context).log_prob(drawn), log_prob)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be an Invertible, got Linear"):
        MintTransform(nn.Linear(2, 2))
    transform = MintTransform(make_layer(), mint.FixedPoint(0.1, 1, tolerance=1e-12))()
    with pytest.raises(mint.NotConvergedError):
        transform.inv(samples(2))
