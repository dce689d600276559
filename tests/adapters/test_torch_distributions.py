"""Flows as transforms of ``torch.distributions``."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform, ComposeTransform, Transform

import mintnet_triton as mint
from mintnet_triton.adapters.torch_distributions import MintTransform
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
    moved,
    samples,
)


def base(shape: tuple[int, ...], *batch: int, dtype: torch.dtype = torch.float64) -> Any:
    zeros = torch.zeros(*batch, *shape, dtype=dtype)
    return Independent(Normal(zeros, torch.ones_like(zeros)), len(shape))


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_both_directions_for_batches_of_any_shape(batch: tuple[int, ...], cache_size: int) -> None:
    flow = make_flow()
    transform: Transform = MintTransform(flow, cache_size)
    z = samples(*batch, shape=flow.latent_shape)
    x = transform(z)
    assert x.shape == (*batch, *SHAPE)
    assert (transform.domain.event_dim, transform.codomain.event_dim) == (3, 3)
    torch.testing.assert_close(transform.inv(x), z)
    log_det = transform.log_abs_det_jacobian(z, x)
    assert log_det.shape == batch
    flat, size = z.reshape(-1, 16) if z.numel() else z.reshape(0, 16), flow.latent_shape
    exact = [exact_log_det(lambda v: flow.inverse(v[None])[0][0], one.view(size)) for one in flat]
    expected = torch.stack(exact).view(batch) if exact else log_det
    assert not exact or float(expected.abs().min()) > 0.1
    torch.testing.assert_close(log_det, expected)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(x, z), -expected)
    # At another place, where nothing is cached.
    other = samples(*batch)
    torch.testing.assert_close(
        transform.log_abs_det_jacobian(transform.inv(other.clone()), other).reshape(-1),
        -flow(other.reshape(-1, *SHAPE))[1] if other.numel() else log_det.reshape(-1),
    )


def test_shapes() -> None:
    flow = make_flow()
    transform = MintTransform(flow)
    assert transform.forward_shape((5, *flow.latent_shape)) == (5, *SHAPE)
    assert transform.inverse_shape((5, 6, *SHAPE)) == (5, 6, *flow.latent_shape)
    for shape in ((5, *SHAPE), SHAPE[1:]):
        with pytest.raises(ValueError, match=r"shape must end with \(8, 2, 1\), got"):
            transform.forward_shape(shape)


def test_what_is_cached_costs_no_second_pass() -> None:
    layer = make_layer()
    x = samples(3)
    for size, passes in ((0, 2), (1, 1)):
        distribution = TransformedDistribution(base(SHAPE), MintTransform(layer, size))
        with counted(layer) as counts:
            found = distribution.log_prob(x)
        assert counts == {"forward": passes, "inverse": 0}
        z, log_det = layer(x)
        torch.testing.assert_close(found, base(SHAPE).log_prob(z) + log_det)
    transform = MintTransform(layer, 1)
    with counted(layer) as counts:
        y = transform(x)
        assert transform.inv(y) is x
        transform.log_abs_det_jacobian(x, y)
        assert counts == {"forward": 0, "inverse": 1}
        # An equal tensor is another one, whose gradients are other ones.
        transform.log_abs_det_jacobian(x.clone(), y)
        assert counts == {"forward": 1, "inverse": 1}
    assert transform.with_cache(1) is transform
    assert transform.with_cache(0).model is layer
    assert transform.with_cache(0)._cache_size == 0


def test_nothing_cached_outlives_a_step() -> None:
    """A whole set of data is the same tensor at every step of training."""
    layer, x = make_layer(), samples(3)
    transform = MintTransform(layer, 1)
    z = transform.inv(x)
    log_det = transform.log_abs_det_jacobian(z, x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), -layer(x)[1])
    with torch.no_grad():
        assert not transform.inv(x).requires_grad
    again = transform.inv(x)
    assert again.requires_grad
    torch.testing.assert_close(again, layer(x)[0])
    assert not torch.allclose(again, z)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), -layer(x)[1])
    assert not torch.allclose(transform.log_abs_det_jacobian(z, x), log_det)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(how: str) -> None:
    transform = MintTransform(make_flow(), 1, mint.Wavefront())
    z = samples(2, shape=(8, 2, 1))
    x = transform(z)  # which is part of a graph, and cached
    assert x.requires_grad
    twin = pickle.loads(pickle.dumps(transform)) if how == "pickle" else copy.deepcopy(transform)
    torch.testing.assert_close(twin(z), x)
    assert twin.solver == transform.solver
    with torch.no_grad():
        next(twin.model.parameters()).add_(1)
    assert not torch.allclose(twin(z.clone()), x)


def test_a_transformed_distribution() -> None:
    flow = make_flow()
    distribution = TransformedDistribution(base(flow.latent_shape), MintTransform(flow, 1))
    assert (distribution.batch_shape, distribution.event_shape) == ((), SHAPE)
    x = distribution.rsample((3, 2))
    assert x.shape == (3, 2, *SHAPE)
    expected = flow.log_prob(x.detach().flatten(0, 1)).view(3, 2)
    torch.testing.assert_close(distribution.log_prob(x.detach()), expected)
    wide = distribution.expand((4,))
    assert (wide.batch_shape, wide.event_shape) == ((4,), SHAPE)
    assert wide.sample((5,)).shape == (5, 4, *SHAPE)
    assert wide.log_prob(samples(4)).shape == (4,)

    # Samples are differentiable by the parameters, as those of a reparametrised distribution are.
    torch.manual_seed(3)
    value = distribution.rsample((4,)).sin().sum()
    found = torch.autograd.grad(value, list(flow.parameters()))
    torch.manual_seed(3)
    again, _ = flow.sample_and_log_prob(4)
    wanted = torch.autograd.grad(again.sin().sum(), list(flow.parameters()))
    torch.testing.assert_close(found, wanted)


def test_a_mixed_flow_trains_and_inverts() -> None:
    pair = digit_pair()
    scale, shift = nn.Parameter(torch.ones(1, 8, 8)), nn.Parameter(torch.zeros(1, 8, 8))

    def distribution() -> TransformedDistribution:
        affine = AffineTransform(shift, scale, event_dim=3)
        return TransformedDistribution(
            base((1, 8, 8), dtype=torch.float32), [affine, MintTransform(pair, 1)]
        )

    assert_trains(
        lambda: -distribution().log_prob(digits()).mean(), [*pair.parameters(), scale, shift]
    )
    whole = ComposeTransform(distribution().transforms)
    z = whole.inv(digits())
    torch.testing.assert_close(whole(z), digits(), rtol=1e-4, atol=1e-4)
    exact = exact_log_det(lambda v: whole.inv(v[None])[0], digits()[0])
    found = whole.inv.log_abs_det_jacobian(digits()[:1], whole.inv(digits()[:1]))
    torch.testing.assert_close(found[0], exact, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_log_determinant() -> None:
    layer = make_layer()
    upstream = samples(3, shape=())
    z = samples(3).requires_grad_()

    def by(size: int) -> tuple[Tensor, ...]:
        transform = MintTransform(layer, size)
        log_det = transform.log_abs_det_jacobian(z, transform(z))
        return torch.autograd.grad(log_det, [z, *layer.parameters()], upstream)

    _, log_det = layer.inverse(z)
    wanted = torch.autograd.grad(log_det, [z, *layer.parameters()], upstream)
    for size in (0, 1):
        torch.testing.assert_close(by(size), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("map_", [False, True])
def test_contexts_broadcast_to_batches(map_: bool) -> None:
    flow = make_conditional_flow()
    size = (3, *SHAPE[1:]) if map_ else (3,)
    context, one = samples(4, shape=size), samples(shape=size)
    z = samples(5, 4, shape=flow.latent_shape)  # five samples for each context
    transform = MintTransform(flow, 1, context=context)
    x = transform(z)
    flat = z.flatten(0, 1), context.expand(5, 4, *size).flatten(0, 1)
    expected, log_det = flow.inverse(flat[0], context=flat[1])
    torch.testing.assert_close(x, expected.view(5, 4, *SHAPE))
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), log_det.view(5, 4))
    torch.testing.assert_close(transform.inv(x.clone()), z)
    torch.testing.assert_close(MintTransform(flow, context=context)(z[0]), x[0])
    alone = MintTransform(flow, context=one)(z)
    torch.testing.assert_close(alone[2, 3], flow.inverse(z[2, 3:4], context=one[None])[0][0])
    with pytest.raises(ValueError, match=r"one for each of a batch of \(5, 3\), got \(4, 3"):
        transform(z[:, :3])
    with pytest.raises(TypeError, match="was made for a context, and needs one"):
        MintTransform(flow)(z)

    distribution = TransformedDistribution(base(flow.latent_shape, 4), transform)
    assert (distribution.batch_shape, distribution.event_shape) == ((4,), SHAPE)
    drawn = distribution.rsample((2,))
    assert drawn.shape == (2, 4, *SHAPE)
    wanted = flow.log_prob(drawn[1].detach(), context)
    torch.testing.assert_close(distribution.log_prob(drawn.detach())[1], wanted)


def test_nothing_cached_outlives_a_context() -> None:
    flow, context, x = make_conditional_flow(), samples(shape=(3,)), samples(4)
    transform = MintTransform(flow, 1, context=context)
    z = transform.inv(x)
    context.add_(1)
    expected, log_det = flow(x, context.expand(4, 3))
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), -log_det)
    torch.testing.assert_close(transform.inv(x), expected)
    with torch.inference_mode():  # whose tensors count no changes
        transform.context = context.clone()
        z = transform.inv(x)
        torch.testing.assert_close(z, expected)
        transform.context.sub_(1)
        expected, log_det = flow(x, context.expand(4, 3) - 1)
        torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), -log_det)
        torch.testing.assert_close(transform.inv(x), expected)


def test_vectors_that_look_like_a_map() -> None:
    """Four contexts of four channels, for a series of four."""
    flow = mint.MintNet(1, (4,), pairs=1, hidden=2, squeezes=0, context=4)
    flow = moved(flow).double()
    context = samples(4, shape=(4,))
    transform = MintTransform(flow, context=context)
    x = samples(4, shape=(1, 4))
    torch.testing.assert_close(transform.inv(x), flow(x, context)[0])
    as_map = flow(x[:3], context.expand(3, 4, 4))[0]
    torch.testing.assert_close(transform.inv(x[:3]), as_map)
    several = samples(2, 4, shape=(1, 4))
    with pytest.raises(ValueError, match=r"\(4, 4\) may be vectors \(4,\) or maps \(4, 4\) for"):
        transform.inv(several)
    whole = MintTransform(flow, context=context.expand(2, 4, 4)).inv(several)
    torch.testing.assert_close(whole[1], flow(several[1], context)[0])
    with pytest.raises(TypeError, match=r"context must be a torch\.Tensor, got list"):
        MintTransform(flow, context=[1.0] * 4).inv(x)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be an Invertible, got Linear"):
        MintTransform(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be an Invertible, got str"):
        MintTransform("flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples of one shape, and this Squeeze is not"):
        MintTransform(mint.Squeeze())
    with pytest.raises(ValueError, match="cache_size must be 0 or 1"):
        MintTransform(make_layer(), 2)
    with pytest.raises(ValueError, match="context must be None, for this MintLayer takes none"):
        MintTransform(make_layer(), context=torch.zeros(2, 3))
    transform = MintTransform(make_layer())
    with pytest.raises(ValueError, match=r"z must have shape \(\.\.\., 2, 4, 2\), got \(3, 2, 4\)"):
        transform(torch.zeros(3, 2, 4).double())
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        transform.inv([1.0])
    with pytest.raises(mint.NonFiniteError):
        transform(samples(2).fill_(torch.nan))
    poor = MintTransform(make_layer(), solver=mint.FixedPoint(0.1, 1, tolerance=1e-12))
    with pytest.raises(mint.NotConvergedError):
        poor(samples(2))
