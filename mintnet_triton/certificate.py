"""A bound of the error of an inverse, from residuals in float64.

To first order the error of x in f(x) = z is ``J^-1 (r + e)``, with r = f(x) - z the residual and e
the error of z, which is the x of the layer after. So errors are carried from the latent to the data
by one triangular solve a layer. The second order is found by a further one, from what is left at
``x - error``; where it is not small beside the first, no bound is given. What rounding in float64
adds to the residuals cannot be known; random numbers of its size are carried along.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mintnet_triton.solvers import Evaluator, LinearSolver

#: sets of random numbers
PROBES = 2
#: how often what the random numbers do rounding may do: an equation is solved to 8 units only
SAFETY = 64
#: how much of the first order the second may be, and the first of x: further off, slopes may change
SECOND_ORDER, FIRST_ORDER = 0.05, 0.1
#: how large the effect of rounding may be, relative to x, where it has not been tried out
TINY = 1e-6


class Certifiable(Protocol):
    """What is asked of a stage in float64."""

    def evaluator(self) -> Evaluator:
        """x -> (f(x), diagonal)."""

    def jacobian_solver(self, x: Tensor) -> LinearSolver:
        """right -> v with ``J v = right`` at x."""

    def magnitude(self, x: Tensor) -> Tensor:
        """What rounding in f(x) is relative to."""


class ErrorBound:
    """The error of x, carried through the layers of an inversion.

    Args:
        z: (B, ...), where the inversion starts, and is exact.
    """

    def __init__(self, z: Tensor) -> None:
        self.error = torch.zeros_like(z, dtype=torch.float64)
        self.noise = self.error.repeat(PROBES, *[1] * (z.ndim - 1))
        self.valid = torch.ones(len(z), dtype=torch.bool, device=z.device)
        self._generator = torch.Generator(z.device).manual_seed(0)

    def reshape(self, move: Callable[[Tensor], Tensor]) -> None:
        """Go through a stage that only moves values."""
        self.error, self.noise = move(self.error), move(self.noise)

    def through(self, stage: Certifiable, x: Tensor, z: Tensor) -> None:
        """Go through a stage, in float64, that has been solved for x with f(x) near z."""
        x, z = x.double(), z.double()
        evaluate = stage.evaluator()
        rounding = torch.finfo(torch.float64).eps * (stage.magnitude(x) + z.abs())
        rounding = rounding.repeat(PROBES, *[1] * (x.ndim - 1))
        signs = (
            2
            * torch.randint(
                2, rounding.shape, generator=self._generator, device=x.device, dtype=torch.float64
            )
            - 1
        )
        right = torch.cat([evaluate(x)[0] - z + self.error, self.noise + signs * rounding])
        solve = stage.jacobian_solver(x)
        solved = solve(right)
        first, self.noise = solved[: len(x)], solved[len(x) :]
        left = evaluate(x - first)[0] - (z - self.error)
        second = solve(left)
        self.error = first + second

        noise = SAFETY * self._noise().flatten(1).amax(1)
        size = first.abs().flatten(1).amax(1)
        # Second order cannot be told from noise.
        certain = second.abs().flatten(1).amax(1) <= SECOND_ORDER * size + noise
        tried = torch.maximum(size, TINY * x.abs().flatten(1).amax(1).clamp(min=1))
        near = size <= FIRST_ORDER * x.abs().flatten(1).amax(1).clamp(min=1)
        self.valid = self.valid & certain & near & (noise <= tried)

    def _noise(self) -> Tensor:
        probes: Tensor = self.noise.abs().unflatten(0, (PROBES, -1))
        return probes.amax(0)

    def value(self) -> Tensor:
        """The bound of ``max |error|`` (B,), float64; infinite where there is none."""
        # Twice, for what the orders beyond the second may add at kinks.
        error = 2 * self.error.abs() + SAFETY * self._noise()
        largest = error.flatten(1).amax(1)
        return torch.where(self.valid & largest.isfinite(), largest, torch.inf)
