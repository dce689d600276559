"""Monotone activations h: their values, derivatives and inverses.

A Mint layer needs h' >= 0. Being monotone, h' can also be read off the *output* of h, so that a
layer keeps its activations and never its pre-activations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class Activation:
    """An elementwise, differentiable, non-decreasing function h.

    Args:
        name: how messages and checkpoints call it.
        function: a -> h(a).
        derivative: a -> h'(a), exact also where h saturates.
        slope: h(a) -> h'(a), from the output alone; accurate to rounding of the *output*. A Mint
            layer needs it.
        inverse: h(a) -> a; NaN or infinite outside the range of h. None leaves it to Algorithm 1.
        steepest: a bound of the derivative, which an inverse that is sure to converge needs.

    Raises:
        ValueError: on [-30, 30], the derivative is negative or not that of the function, the slope
            is not the derivative, or the derivative exceeds its bound.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None = None
    inverse: Callable[[Tensor], Tensor] | None = None
    steepest: float | None = None

    def __post_init__(self) -> None:
        # An even number of points: 0, where a kink may be, is not among them.
        grid = torch.linspace(-30, 30, 6000, dtype=torch.float64, device="cpu")
        slopes = self.derivative(grid)
        if not bool((slopes >= 0).all()):
            worst = int(slopes.nan_to_num(nan=-torch.inf).argmin())
            raise ValueError(
                f"activation {self.name!r} is not monotone: its derivative at {grid[worst]:.2f} is "
                f"{slopes[worst]:.3g}, and a Mint layer needs h' >= 0 everywhere"
            )
        with torch.enable_grad():
            a = grid.clone().requires_grad_()
            h = self.function(a)
            (exact,) = torch.autograd.grad(h.sum(), a)
        self._compare("derivative", slopes, exact)
        if self.slope is not None:
            self._compare("slope", self.slope(h.detach()), exact)
        if self.steepest is not None and not float(slopes.max()) <= self.steepest < torch.inf:
            raise ValueError(
                f"activation {self.name!r}: steepest must be finite and bound the derivative, "
                f"which reaches {float(slopes.max()):.3g}, got {self.steepest}"
            )

    def _compare(self, name: str, computed: Tensor, exact: Tensor) -> None:
        error = (computed - exact).abs() / exact.abs().clamp(min=1)
        if not bool((error <= 1e-6).all()):
            raise ValueError(
                f"activation {self.name!r}: its {name} differs from the derivative of its function "
                f"by up to {float(error.max()):.3g}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        if is_known(self):  # by name, for the functions have none of their own
            return find_activation, (self.name,)
        return Activation, (
            self.name,
            self.function,
            self.derivative,
            self.slope,
            self.inverse,
            self.steepest,
        )


def _leaky_slope(a: Tensor) -> Tensor:
    """The derivative at a, which is also that at h(a): both have one sign."""
    # Not of two Python floats: torch.where would round them to float32.
    return torch.where(a > 0, torch.ones_like(a), torch.full_like(a, LEAKY_SLOPE))


_KNOWN = {
    activation.name: activation
    for activation in (
        Activation(
            "elu",
            function=F.elu,
            derivative=lambda a: a.clamp(max=0).exp(),
            slope=lambda h: h.clamp(max=0).add_(1),
            inverse=lambda h: torch.where(h > 0, h, h.clamp(max=0).log1p()),
            steepest=1.0,
        ),
        Activation(
            "leaky_relu",
            function=lambda a: F.leaky_relu(a, LEAKY_SLOPE),
            derivative=_leaky_slope,
            slope=_leaky_slope,
            inverse=lambda h: torch.where(h > 0, h, h / LEAKY_SLOPE),
            steepest=1.0,
        ),
        Activation(
            "softplus",
            # logaddexp, unlike F.softplus, has no threshold beyond which it becomes the identity.
            function=lambda a: torch.logaddexp(a, torch.zeros_like(a)),
            derivative=torch.sigmoid,
            slope=lambda h: -torch.expm1(-h),
            inverse=lambda h: h + torch.log(-torch.expm1(-h)),
            steepest=1.0,
        ),
        Activation(
            "tanh",
            function=torch.tanh,
            derivative=lambda a: 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a),
            slope=lambda h: 1 - h * h,
            inverse=torch.atanh,
            steepest=1.0,
        ),
        Activation(
            "sigmoid",
            function=torch.sigmoid,
            derivative=lambda a: torch.sigmoid(a) * torch.sigmoid(-a),
            slope=lambda h: h * (1 - h),
            inverse=torch.logit,
            steepest=0.25,
        ),
        Activation(
            "identity",
            function=lambda a: a,
            derivative=torch.ones_like,
            slope=torch.ones_like,
            inverse=lambda h: h,
            steepest=1.0,
        ),
    )
}


#: names of the activations of this package, which the kernels know too
NAMES = tuple(sorted(_KNOWN))


def is_known(activation: Activation) -> bool:
    """Whether it is one of this module's own, and not another that has the name of one."""
    return _KNOWN.get(activation.name) is activation


def find_activation(activation: str | Activation) -> Activation:
    """The :class:`Activation` of that name, or the one given.

    Raises:
        ValueError: the name is not one of the monotone activations known here.
        TypeError: ``activation`` is neither a string nor an :class:`Activation`.
    """
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(
            f"activation must be a name or an Activation, got {type(activation).__name__}"
        )
    if activation not in _KNOWN:
        raise ValueError(
            f"activation must be monotone and one of {sorted(_KNOWN)}, got {activation!r}; "
            "any other monotone function can be given as an Activation"
        )
    return _KNOWN[activation]
