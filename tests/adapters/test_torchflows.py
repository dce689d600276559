"""Flows as bijections of torchflows."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchflows")

from torchflows.bijections.base import BijectiveComposition
from torchflows.bijections.finite.autoregressive.layers import AffineCoupling
from torchflows.flows import Flow

import mintnet_triton as mint
from mintnet_triton.adapters.torchflows import MintBijection
from tests.adapters.flows import (
    SHAPE,
    assert_trains,
    digit_pair,
    digits,
    exact_log_det,
    make_conditional_flow,
    make_flow,
    samples,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # theirs


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_log_determinants_of_both_directions(batch: tuple[int, ...]) -> None:
    model = make_flow()
    bijection = MintBijection(model)
    x = samples(*batch)
    z, log_det = bijection(x)
    assert z.shape == x.shape  # of the latents, in another shape than the model's
    assert log_det.shape == batch
    flat = x.reshape(-1, *SHAPE)
    torch.testing.assert_close(z.reshape(len(flat), -1), model(flat)[0].flatten(1))
    expected = exact_log_det(lambda v: bijection(v)[0], flat)
    torch.testing.assert_close(log_det.reshape(-1), expected)
    again, back = bijection.inverse(z)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(back, -log_det)


def test_a_flow() -> None:
    model = make_flow()
    flow = Flow(MintBijection(model)).double()
    x = samples(4)
    torch.testing.assert_close(flow.log_prob(x), model.log_prob(x))
    upstream = samples(4, shape=())
    found, wanted = (
        torch.autograd.grad(log_prob, list(model.parameters()), upstream)
        for log_prob in (flow.log_prob(x), model.log_prob(x))
    )
    torch.testing.assert_close(found, wanted)
    drawn = Flow(MintBijection(model.float())).sample((5,))
    assert drawn.shape == (5, *SHAPE)
    assert bool(drawn.isfinite().all())


def test_a_mixed_flow_trains_and_inverts() -> None:
    coupling = AffineCoupling(event_shape=(1, 8, 8))
    whole = BijectiveComposition([MintBijection(digit_pair()), coupling])
    flow = Flow(whole)
    assert_trains(lambda: -flow.log_prob(digits()).mean(), flow.parameters())
    z, log_det = whole(digits())
    again, back = whole.inverse(z)
    torch.testing.assert_close(again, digits(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back, -log_det, rtol=1e-4, atol=1e-4)
    exact = exact_log_det(lambda v: whole(v[None])[0][0], digits()[0])
    torch.testing.assert_close(log_det[0], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
def test_their_own_training_loop() -> None:
    flow = Flow(MintBijection(digit_pair()))
    before = flow.log_prob(digits()).mean().item()
    flow.fit(digits(), n_epochs=3, lr=1e-2, batch_size=64)
    assert flow.log_prob(digits()).mean().item() > before


def test_a_conditional_flow() -> None:
    model = make_conditional_flow()
    bijection = MintBijection(model, context_shape=(3,))
    x, context = samples(2, 3), samples(2, 3, shape=(3,))
    z, log_det = bijection(x, context)
    again, back = bijection.inverse(z, context)
    torch.testing.assert_close((again, back), (x, -log_det))
    one, _ = model(x[1, 2:], context[1, 2:])
    torch.testing.assert_close(z[1, 2].flatten(), one.flatten())
    flow = Flow(bijection).double()
    rows, contexts = x.flatten(0, 1), context.flatten(0, 1)
    torch.testing.assert_close(
        flow.log_prob(rows, context=contexts), model.log_prob(rows, contexts)
    )
    assert_trains(lambda: -flow.log_prob(rows, context=contexts).mean(), flow.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be an Invertible, got Linear"):
        MintBijection(nn.Linear(2, 2))
    poor = MintBijection(make_flow(), solver=mint.FixedPoint(0.1, 1, tolerance=1e-12))
    with pytest.raises(mint.NotConvergedError):
        poor.inverse(samples(2))
