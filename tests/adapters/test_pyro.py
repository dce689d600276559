"""Flows as transform modules of Pyro."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("pyro")

import pyro
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO

import mintnet_triton as mint
from mintnet_triton.adapters.pyro import ConditionalMintTransform, MintTransform
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


def base(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Any:
    return dist.Normal(torch.zeros(shape, dtype=dtype), 1.0).expand(shape).to_event(len(shape))


def test_log_determinants_of_both_directions() -> None:
    model = make_flow()
    transform = MintTransform(model)
    z = samples(2, 3, shape=model.latent_shape)
    x = transform(z)
    torch.testing.assert_close(transform.inv(x), z)
    expected = exact_log_det(lambda v: model(v[None])[0][0], x.reshape(-1, *SHAPE)).view(2, 3)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), -expected)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(x, z), expected)


def test_a_module_among_pyros() -> None:
    model = make_layer()
    transform = MintTransform(model, cache_size=1)
    assert isinstance(transform, nn.Module)
    assert {name for name, _ in transform.named_parameters()} == {
        f"model.{name}" for name, _ in model.named_parameters()
    }
    distribution = dist.TransformedDistribution(base(SHAPE), [transform])
    x = samples(4)
    with counted(model) as counts:
        log_prob = distribution.log_prob(x)
    assert counts == {"forward": 1, "inverse": 0}
    z, log_det = model(x)
    torch.testing.assert_close(log_prob, base(SHAPE).log_prob(z) + log_det)
    drawn = distribution.rsample((3,))
    assert drawn.shape == (3, *SHAPE)
    by_weights = torch.autograd.grad(drawn.sum(), list(model.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in by_weights)
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        torch.testing.assert_close(twin.inv(x), z)
        assert not {id(one) for one in twin.parameters()} & {id(one) for one in model.parameters()}
    assert transform.with_cache(0).model is model


def test_a_mixed_flow_trains_and_inverts() -> None:
    pair, coupling = digit_pair(), dist.transforms.affine_coupling(8, hidden_dims=[16])
    ours = MintTransform(pair, cache_size=1)
    distribution = dist.TransformedDistribution(base((1, 8, 8), torch.float32), [coupling, ours])
    modules = nn.ModuleList([ours, coupling])

    assert_trains(lambda: -distribution.log_prob(digits()).mean(), modules.parameters())
    whole = torch.distributions.ComposeTransform(distribution.transforms)
    z = whole.inv(digits())
    torch.testing.assert_close(whole(z.clone()), digits(), rtol=1e-4, atol=1e-4)
    exact = exact_log_det(lambda v: whole.inv(v[None])[0], digits()[0])
    found = whole.inv.log_abs_det_jacobian(digits()[:1], whole.inv(digits()[:1]))
    torch.testing.assert_close(found.sum(), exact, rtol=1e-4, atol=1e-4)


def test_stochastic_variational_inference() -> None:
    """The parameters are found through Pyro's store."""
    pyro.clear_param_store()
    transform = MintTransform(digit_pair(), cache_size=1)

    def model(x: torch.Tensor) -> None:
        pyro.module("flow", transform)
        distribution = dist.TransformedDistribution(base((1, 8, 8), torch.float32), [transform])
        with pyro.plate("digits", len(x)):
            pyro.sample("x", distribution, obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(digits()) for _ in range(8)]
    assert losses[-1] < losses[0]
    pyro.clear_param_store()


def test_a_conditional_flow() -> None:
    model = make_conditional_flow()
    conditional: Any = ConditionalMintTransform(model, cache_size=1)
    assert {id(one) for one in conditional.parameters()} == {id(one) for one in model.parameters()}
    distribution = dist.ConditionalTransformedDistribution(base(model.latent_shape), [conditional])
    x, context = samples(4), samples(4, shape=(3,))
    found = distribution.condition(context).log_prob(x)
    torch.testing.assert_close(found, model.log_prob(x, context))
    drawn = distribution.condition(context).expand((4,)).rsample((2,))
    assert drawn.shape == (2, 4, *SHAPE)
    back = conditional.inv.condition(context)(x)
    torch.testing.assert_close(back, model(x, context)[0])
    assert_trains(lambda: -distribution.condition(context).log_prob(x).mean(), model.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be an Invertible, got Linear"):
        MintTransform(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must take a context, and this MintNet does not"):
        ConditionalMintTransform(make_flow())
    poor = MintTransform(make_layer(), solver=mint.FixedPoint(0.1, 1, tolerance=1e-12))
    with pytest.raises(mint.NotConvergedError):
        poor(samples(2))
