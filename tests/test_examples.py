"""The examples run, at a tiny size."""

import math

import pytest
import torch


def test_series() -> None:
    from examples import series

    nats = series.main(number=64, steps=2)
    assert nats.keys() == {"truth", "Gaussians", "flow"}
    assert all(map(math.isfinite, nats.values()))


def test_the_density_of_the_series_is_exact() -> None:
    """By the change of variables the other way, from the series to what is bent."""
    from examples import series

    drawn, log_density = series.draw(100)
    bent = drawn.squeeze(1).double()
    unbent = series.hidden_process().log_prob(torch.asinh(bent))
    expected = unbent - 0.5 * bent.square().log1p().sum(1)
    torch.testing.assert_close(log_density, expected, rtol=1e-3, atol=1e-2)


def test_volume() -> None:
    pytest.importorskip("sklearn")
    from examples import volume

    bits = volume.main(steps=2)
    assert bits.keys() == {"frames", "films"}
    assert all(map(math.isfinite, bits.values()))


def test_films_drift() -> None:
    pytest.importorskip("sklearn")
    from examples import volume

    image = torch.arange(64).view(1, 8, 8)
    (film,) = volume.films(image)[0]
    assert film.shape == (volume.FRAMES, 8, 8)
    moves = [image[0].roll(way, (0, 1)) for way in volume.DIRECTIONS]
    assert torch.equal(film[0], image[0])
    assert any(torch.equal(film[1], move) for move in moves)
