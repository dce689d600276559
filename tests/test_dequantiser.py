"""Learnt noise: its log-determinant against autograd, the bound against integrals over cubes."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mintnet_triton as mint

LEVELS = 3
LAMBDA = 0.05
SIDES = 1, 2  # of images whose cubes are squares


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scatter(module: nn.Module, deviation: float = 0.3, seed: int = 0) -> None:
    """Weights as training might leave them, far from where they start."""
    source = seeded(seed)
    for name, parameter in module.named_parameters():
        mean, share = float(name.endswith(".t")), 0.3 if "context_network" in name else 1.0
        nn.init.normal_(parameter, mean, share * deviation, generator=source)


def small_flow(context: int | None = None) -> mint.MintNet:
    flow = mint.MintNet(
        1, SIDES, pairs=1, hidden=3, squeezes=0, context=context, dequantiser=2
    ).double()
    scatter(flow)
    return flow


def all_images() -> Tensor:
    each = torch.arange(LEVELS)
    return torch.cartesian_prod(each, each).reshape(-1, 1, *SIDES)


def nodes(count: int) -> tuple[Tensor, Tensor]:
    """Of a quadrature over a square: (n, 1, 1, 2), and their weights (n,), of sum 1.

    Noise is steep at the edges, as a power of the distance, so that nodes crowd there: it is
    Gauss and Legendre's rule in s, with u = s^4 (35 - 84 s + 70 s^2 - 20 s^3).
    """
    places, weights = (torch.from_numpy(one) for one in np.polynomial.legendre.leggauss(count))
    s, weights = (places + 1) / 2, weights / 2
    u = s**4 * (35 - 84 * s + 70 * s**2 - 20 * s**3)
    weights = weights * 140 * (s * (1 - s)) ** 3
    square = torch.cartesian_prod(u, u).reshape(-1, 1, *SIDES)
    return square, torch.outer(weights, weights).flatten()


def log_density(flow: mint.MintNet, values: Tensor, context: Tensor | None = None) -> Tensor:
    """Of images with noise."""
    x, log_det = mint.ImagePreprocess(LEVELS, LAMBDA).transform(values)
    return flow.log_prob(x, context) + log_det


def over_noise(
    flow: mint.MintNet, images: Tensor, count: int, context: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """log p with uniform noise, and with the flow's and its log-det, (n, B); weights (n, 1)."""
    square, weights = nodes(count)
    values = (images.double() + square.unsqueeze(1)).flatten(0, 1)
    given = None if context is None else context.repeat(len(square), 1)
    other, log_det = flow.dequantise(values, LEVELS, given)
    uniform = log_density(flow, values, given).view(-1, len(images))
    learnt = (log_density(flow, other, given) + log_det).view(-1, len(images))
    return uniform, learnt, weights.unsqueeze(1)


@pytest.mark.parametrize(
    ("channels", "size", "context"),
    [(2, (3, 2), None), (1, (1, 1), None), (2, (4,), 3), (1, (2, 1, 2), 2), (1, (2, 3), 2)],
)
@pytest.mark.parametrize("maps", [False, True])
def test_the_log_det_is_that_of_autograd(
    channels: int, size: tuple[int, ...], context: int | None, maps: bool
) -> None:
    dequantiser = mint.Dequantiser(channels, size, 2, context=context).double()
    scatter(dequantiser)
    images = torch.randint(0, 5, (3, channels, *size), generator=seeded())
    values = images + torch.rand(images.shape, generator=seeded(), dtype=torch.float64)
    given = None
    if context is not None:
        shape = (3, context, *size) if maps else (3, context)
        given = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    found, log_det = dequantiser(values, 5, given)
    assert torch.equal(found.floor().long(), images)
    if given is not None:
        assert not torch.equal(dequantiser(values, 5, given.flip(0))[1], log_det)
    for sample in range(3):
        own = None if given is None else given[sample : sample + 1]
        matrix = torch.autograd.functional.jacobian(
            lambda v, own=own: dequantiser(v, 5, own)[0], values[sample : sample + 1]
        ).reshape(values[0].numel(), -1)
        torch.testing.assert_close(log_det[sample], torch.linalg.slogdet(matrix)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_starts_as_the_identity(dtype: torch.dtype) -> None:
    flow = mint.MintNet(2, 4, pairs=2, hidden=4, squeezes=1, dequantiser=3).to(dtype)
    images = torch.randint(0, 256, (4, 2, 4, 4), generator=seeded())
    values = mint.ImagePreprocess(256).dequantise(images, seeded(), dtype)
    with torch.no_grad():
        learnt, log_det = flow.dequantise(values, 256)
    # Half of what noise can tell, at most; and as much of its volume, for each of 32 values.
    torch.testing.assert_close(learnt, values, rtol=0, atol=2.0**-16)
    assert float(log_det.abs().max()) < 32 * 2.0**-15
    bound = mint.variational_bits(flow, images, generator=seeded())
    torch.testing.assert_close(
        bound, mint.bits_per_dim(flow, images, generator=seeded()), rtol=0, atol=1e-4
    )
    bound.sum().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())
    assert flow.dequantiser is not None
    scatter(flow.dequantiser)
    assert not torch.allclose(flow.dequantise(values, 256)[0], values, atol=1e-2)
    flow.dequantiser.reset_parameters()
    torch.testing.assert_close(flow.dequantise(values, 256)[0], values, rtol=0, atol=2.0**-16)


def test_all_else_of_the_flow_is_as_without_it() -> None:
    flows = []
    for hidden in (None, 3):
        torch.manual_seed(5)
        flows.append(mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1, dequantiser=hidden))
    plain, flow = flows
    kept = {n: v for n, v in flow.state_dict().items() if not n.startswith("dequantiser.")}
    assert kept.keys() == plain.state_dict().keys()
    assert [name for name, _ in flow.stages()] == [name for name, _ in plain.stages()]
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(flow.log_prob(x), plain.log_prob(x))
    images = torch.randint(0, 256, (3, 1, 4, 4))
    assert torch.equal(
        mint.bits_per_dim(flow, images, generator=seeded()),
        mint.bits_per_dim(plain, images, generator=seeded()),
    )


@torch.no_grad()
@pytest.mark.parametrize("context", [None, 2])
def test_the_bound_is_below_the_integral_and_its_weights_are_unbiased(
    context: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steep noise leaves more of the cube aside than the margin is wide.
    monkeypatch.setattr("mintnet_triton.parts.dequantiser.MARGIN", 1e-15)
    flow, images = small_flow(context), all_images()
    given = None
    if context is not None:
        given = torch.randn(len(images), context, generator=seeded(), dtype=torch.float64)
    uniform, learnt, weights = over_noise(flow, images, 40, given)
    exact = (uniform + weights.log()).logsumexp(0)
    total = exact.exp().sum() if given is None else torch.zeros(())
    assert float(total) <= 1
    bound = (weights * learnt).sum(0)
    assert bool((bound < exact - 1e-3).all())
    torch.testing.assert_close((learnt + weights.log()).logsumexp(0), exact, rtol=0, atol=1e-3)


def test_training_by_the_bound_brings_it_near_the_integral() -> None:
    flow, images = small_flow(), all_images()
    assert flow.dequantiser is not None
    flow.dequantiser.reset_parameters()
    with torch.no_grad():
        uniform, _, weights = over_noise(flow, images, 24)
    exact = (uniform + weights.log()).logsumexp(0)
    at_start = float((exact - (weights * uniform).sum(0)).mean())
    optimiser = torch.optim.Adam(flow.dequantiser.parameters(), lr=0.03)
    for _ in range(40):
        _, learnt, few = over_noise(flow, images, 6)
        loss = -(few * learnt).sum(0).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        _, learnt, weights = over_noise(flow, images, 24)
    gap = exact - (weights * learnt).sum(0)
    assert at_start > 0.02
    assert float(gap.min()) > 0
    assert float(gap.mean()) < 0.25 * at_start


@torch.no_grad()
def test_more_draws_come_nearer_to_the_bits_of_the_integers() -> None:
    flow, repeats = small_flow(), 200
    some = all_images()[[1, 5]]
    uniform, learnt, weights = over_noise(flow, some, 40)
    nats = 2 * math.log(2)
    exact = -(uniform + weights.log()).logsumexp(0) / nats
    expected = -(weights * learnt).sum(0) / nats
    images, estimates = some.repeat(repeats, 1, 1, 1), {}
    for draws in (1, 6, 40):
        bits = mint.variational_bits(flow, images, LEVELS, LAMBDA, draws, seeded(draws))
        estimates[draws] = bits.view(repeats, 2)
    means = {draws: bits.mean(0) for draws, bits in estimates.items()}
    error = estimates[1].std(0) / math.sqrt(repeats)
    assert bool(((means[1] - expected).abs() < 4 * error).all())
    assert bool((means[1] > means[6] + 1e-3).all())
    assert bool((means[6] > means[40]).all())
    torch.testing.assert_close(means[40], exact, rtol=0, atol=0.02)
    assert bool((means[40] > exact - 4 * estimates[40].std(0) / math.sqrt(repeats)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("push", [-300.0, 0.0, 300.0])
def test_the_noise_stays_inside_its_level(dtype: torch.dtype, push: float) -> None:
    """At the ends of the noise, and wherever the network pushes it."""
    dequantiser = mint.Dequantiser(1, (2, 128), 2, pairs=1)
    scatter(dequantiser)
    with torch.no_grad():
        for layer in dequantiser.modules():
            if isinstance(layer, mint.MintLayer):
                assert layer.conv3.bias is not None
                layer.conv3.bias += push
    images = torch.arange(256, dtype=dtype).reshape(1, 1, 2, 128)
    above = torch.nextafter(images + 1, images)
    values = torch.cat([images, (images + above) / 2, above])
    found, log_det = dequantiser(values, 256)
    assert found.dtype == dtype
    assert log_det.dtype == torch.float32
    assert torch.equal(found.floor(), images.expand_as(found))
    assert bool(log_det.isfinite().all())


def test_files_and_copies_hold_it(tmp_path: Path) -> None:
    def network(outputs: int) -> nn.Module:
        return nn.Linear(2, outputs)

    for context, maker in ((None, None), (2, None), (2, network)):
        flow = mint.MintNet(
            1, 4, 2, 4, 1, context=context, context_network=maker, dequantiser=2, actnorm=True
        )
        scatter(flow, 0.1)
        mint.save(flow, path := tmp_path / "flow.safetensors")
        images = torch.randint(0, 256, (2, 1, 4, 4))
        given = None if context is None else torch.randn(2, context)
        bits = mint.variational_bits(flow, images, draws=2, generator=seeded(), context=given)
        for other in (mint.load(path, maker), copy.deepcopy(flow)):
            assert isinstance(other, mint.MintNet)
            assert other.arguments == flow.arguments
            again = mint.variational_bits(other, images, draws=2, generator=seeded(), context=given)
            assert torch.equal(again, bits)
        other_noise = mint.variational_bits(flow, images, generator=seeded(1), context=given)
        assert not torch.allclose(other_noise, bits)


def test_noise_of_many_levels_needs_float64() -> None:
    flow = mint.MintNet(1, 4, pairs=1, hidden=4, squeezes=0, dequantiser=2)
    images = torch.randint(0, 2**16, (2, 1, 4, 4))
    bits = mint.variational_bits(flow, images, 2**16, generator=seeded())
    assert bits.dtype == torch.float32
    torch.testing.assert_close(
        bits, mint.bits_per_dim(flow, images, 2**16, generator=seeded()), rtol=0, atol=1e-3
    )
    with pytest.raises(
        TypeError, match=r"room for noise beside levels=65536, .* got torch\.float32"
    ):
        flow.dequantise(images.float(), 2**16)


def test_what_does_not_fit_is_refused() -> None:
    plain = mint.MintNet(1, 4, pairs=1, hidden=4, squeezes=0)
    images = torch.randint(0, 5, (2, 1, 4, 4))
    with pytest.raises(ValueError, match="the flow has no dequantiser: make it as"):
        mint.variational_bits(plain, images, 5)
    for wrong in (0, 1.5, True):
        with pytest.raises((ValueError, TypeError), match="dequantiser must be"):
            mint.MintNet(1, 4, pairs=1, hidden=4, squeezes=0, dequantiser=wrong)  # type: ignore[arg-type]
    flow = mint.MintNet(1, 4, pairs=1, hidden=4, squeezes=0, dequantiser=2)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        mint.variational_bits(flow, images, 5, draws=0)
    values = images.float()
    with pytest.raises(ValueError, match=r"at least 0 and below levels=2, got 0\.0 to 4\.0"):
        flow.dequantise(values, 2)
    with pytest.raises(TypeError, match=r"room for noise .* got torch\.bfloat16"):
        flow.dequantise(values.bfloat16(), 5)
    with pytest.raises(ValueError, match="values must have shape"):
        flow.dequantise(values[..., :3], 5)
    with pytest.raises(mint.NonFiniteError, match="values holds 1 NaN"):
        flow.dequantise(torch.where(torch.arange(32).view(2, 1, 4, 4) == 3, math.nan, values), 5)
    with pytest.raises(TypeError, match="takes no context"):
        flow.dequantise(values, 5, torch.zeros(2, 3))
    assert flow.dequantise(values[:0], 5)[1].shape == (0,)
