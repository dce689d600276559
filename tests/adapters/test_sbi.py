"""Flows over vectors as density estimators of sbi."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sbi")

from sbi.inference import NPE

import mintnet_triton as mint
from mintnet_triton.adapters.sbi import MintEstimator, mint_estimator
from tests.adapters.flows import assert_trains, moved

NOISE = 0.5


def simulated(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """theta ~ N(1, I) in two dimensions, and x = theta + N(0, NOISE^2) in three."""
    theta = 1 + torch.randn(count, 2, dtype=dtype)
    x = torch.cat([theta, theta.sum(1, keepdim=True)], 1)
    return theta, x + NOISE * torch.randn(count, 3, dtype=dtype)


def posterior(x: Tensor) -> torch.distributions.MultivariateNormal:
    """The exact one, of a linear model with normal noise."""
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=x.dtype)
    precision = torch.eye(2, dtype=x.dtype) + matrix.T @ matrix / NOISE**2
    mean = torch.linalg.solve(precision, 1 + x @ matrix / NOISE**2)
    return torch.distributions.MultivariateNormal(mean, precision_matrix=precision)


def make_estimator() -> tuple[Any, Tensor, Tensor]:
    theta, x = simulated(20, torch.float64)
    estimator: Any = mint_estimator(3 * theta, x, pairs=2, hidden=3)
    moved(estimator.net, 0.1)
    return estimator, 3 * theta, x


def test_densities_are_those_of_the_samples() -> None:
    estimator, theta, x = make_estimator()
    assert (estimator.input_shape, estimator.condition_shape) == ((2,), (3,))
    # A density on the plane sums up to 1.
    axis = torch.linspace(-30, 35, 261, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = estimator.log_prob(grid[:, None], x[:1]).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-2)

    samples, log_prob = estimator.sample_and_log_prob((4, 5), x)
    assert (samples.shape, log_prob.shape) == ((4, 5, 20, 2), (4, 5, 20))
    for i in range(4):
        torch.testing.assert_close(estimator.log_prob(samples[i], x), log_prob[i])
    drawn = estimator.sample((7,), x)
    assert drawn.shape == (7, 20, 2)
    assert not drawn.requires_grad
    # The log-determinant, standardisation and all, against autograd at one sample.
    noise = torch.distributions.Normal(torch.zeros(2, dtype=torch.float64), 1.0)

    def to_noise(value: Tensor) -> Tensor:
        values = ((value - estimator.mean) / estimator.std).view(1, 2, 1, 1)
        z: Tensor = estimator.net(values, estimator.embedding_net(x[:1]))[0]
        return z.flatten()

    matrix: Any = torch.autograd.functional.jacobian(to_noise, theta[0])
    expected = noise.log_prob(to_noise(theta[0])).sum() + torch.linalg.slogdet(matrix)[1]
    torch.testing.assert_close(estimator.log_prob(theta[:1], x[:1])[0, 0], expected)


def test_shapes_broadcast_as_in_sbi() -> None:
    estimator, theta, x = make_estimator()
    rows = estimator.log_prob(theta, x)
    assert rows.shape == (1, 20)
    torch.testing.assert_close(estimator.loss(theta, x), -rows[0])
    several = estimator.log_prob(theta.expand(3, 20, 2), x)
    torch.testing.assert_close(several, rows.expand(3, 20))
    own = estimator.log_prob(theta.expand(2, 20, 2), torch.stack([x, x.flip(0)]))
    torch.testing.assert_close(own[0], rows[0])
    torch.testing.assert_close(own[1], estimator.log_prob(theta, x.flip(0))[0])
    one = estimator.log_prob(theta[:, None], x[:1])
    torch.testing.assert_close(one[:, 0], estimator.log_prob(theta, x[:1].expand(20, 3))[0])
    assert estimator.sample((), x).shape == (20, 2)
    assert estimator.sample((0,), x).shape == (0, 20, 2)
    with pytest.raises(RuntimeError, match="broadcastable"):
        estimator.log_prob(theta, x[:3])
    with pytest.raises(ValueError, match="expected input dimensionality"):
        estimator.log_prob(theta[:, :1], x)
    with pytest.raises(mint.NonFiniteError):
        estimator.log_prob(theta * torch.nan, x)


def test_an_embedding_and_gradients() -> None:
    theta, x = simulated(30)
    images = x[:, :, None].expand(30, 3, 4).reshape(30, 3, 4)
    embedding = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ELU())
    estimator: Any = mint_estimator(theta, images, 2, 4, embedding_net=embedding)
    assert estimator.net.context == 5
    assert estimator.condition_shape == (3, 4)
    moved(estimator.net)
    assert_trains(
        lambda: estimator.loss(theta, images).mean(), estimator.parameters(), rate=3e-3, steps=20
    )
    for twin in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        torch.testing.assert_close(twin.loss(theta, images), estimator.loss(theta, images))


@pytest.mark.filterwarnings("ignore:Maximum number of epochs:UserWarning")
def test_posteriors_of_a_linear_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neural posterior estimation finds the posterior that is known."""
    monkeypatch.chdir(tmp_path)  # where it writes logs
    prior = torch.distributions.MultivariateNormal(torch.ones(2), torch.eye(2))
    build = partial(mint_estimator, pairs=2, hidden=8)
    inference = NPE(prior=prior, density_estimator=build, show_progress_bars=False)
    theta, x = simulated(2000)
    estimator = inference.append_simulations(theta, x).train(
        max_num_epochs=20, learning_rate=1e-2, training_batch_size=200
    )
    assert isinstance(estimator, MintEstimator)
    found = inference.build_posterior()
    for observed in simulated(3)[1]:
        exact = posterior(observed)
        samples = found.sample((1000,), x=observed, show_progress_bars=False)
        torch.testing.assert_close(samples.mean(0), exact.mean, rtol=0, atol=0.15)
        torch.testing.assert_close(torch.cov(samples.T), exact.covariance_matrix, rtol=0, atol=0.05)
        theirs = found.log_prob(exact.sample((200,)), x=observed)
        assert bool(theirs.isfinite().all())


def test_what_does_not_fit_is_refused() -> None:
    theta, x = simulated(4)
    for wrong in (theta[:1], theta[0], theta[:, :, None]):
        with pytest.raises(ValueError, match=r"theta must be \(batch, D\) with two rows"):
            mint_estimator(wrong, x)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        mint_estimator(theta, x, hidden=0)
