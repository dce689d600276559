import pytest
import torch

import mintnet_triton as mint
from mintnet_triton.kernels import Activation, find_activation

NAMES = ["elu", "leaky_relu", "softplus", "tanh", "sigmoid", "identity"]


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_that_of_autograd(name: str) -> None:
    a = torch.linspace(-8, 8, 401, dtype=torch.float64, requires_grad=True)
    activation = find_activation(name)
    (expected,) = torch.autograd.grad(activation.function(a).sum(), a)
    torch.testing.assert_close(activation.derivative(a), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_slope_reads_the_derivative_off_the_output(name: str) -> None:
    a = torch.linspace(-12, 12, 401, dtype=torch.float64)
    activation = find_activation(name)
    assert activation.slope is not None
    slope = activation.slope(activation.function(a))
    torch.testing.assert_close(slope, activation.derivative(a), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_differentiable(name: str) -> None:
    activation = find_activation(name)
    slope = activation.slope
    assert slope is not None
    a = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: slope(activation.function(a)), a)


@pytest.mark.parametrize("name", NAMES)
def test_inverse(name: str) -> None:
    a = torch.linspace(-5, 5, 101, dtype=torch.float64)
    activation = find_activation(name)
    assert activation.inverse is not None
    torch.testing.assert_close(activation.inverse(activation.function(a)), a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "outside"),
    [("elu", -1.5), ("softplus", -0.1), ("tanh", 1.5), ("tanh", 1.0), ("sigmoid", 1.2)],
)
def test_inverse_outside_the_range_is_not_finite(name: str, outside: float) -> None:
    value = torch.tensor([outside], dtype=torch.float64)
    inverse = find_activation(name).inverse
    assert inverse is not None
    assert not bool(inverse(value).isfinite())


def test_unknown_and_non_monotone_names_raise() -> None:
    with pytest.raises(ValueError, match=r"activation must be monotone and one of .*'elu'.*'gelu'"):
        find_activation("gelu")
    with pytest.raises(TypeError, match="activation must be a name or an Activation, got int"):
        find_activation(3)  # type: ignore[arg-type]


def test_a_non_monotone_activation_raises() -> None:
    with pytest.raises(ValueError, match="'sine' is not monotone: its derivative at"):
        Activation("sine", torch.sin, torch.cos, torch.cos, torch.asin)


def test_an_activation_of_the_users_needs_only_its_derivative() -> None:
    cubic = Activation("cubic", lambda a: a**3 + a, lambda a: 3 * a**2 + 1)
    assert find_activation(cubic) is cubic
    layer = mint.Elementwise(cubic)
    x = torch.randn(3, 5, dtype=torch.float64)
    y, _ = layer(x)
    result = mint.invert(layer, y, mint.FixedPoint(alpha=0.5, iterations=200))
    assert result.converged.all()
    torch.testing.assert_close(result.x, x, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="'cubic' must have a slope for use in a Mint layer"):
        mint.MintLayer(1, 2, 2, activation=cubic)


def test_a_wrong_derivative_or_slope_raises() -> None:
    with pytest.raises(ValueError, match="its derivative differs from the derivative of its func"):
        Activation("wrong", torch.tanh, torch.sigmoid)
    with pytest.raises(ValueError, match="its slope differs from the derivative"):
        Activation("wrong", torch.tanh, find_activation("tanh").derivative, slope=torch.ones_like)
