"""What a density says of single samples, and what lies between samples in latent space.

Scores take any model with ``log_prob(x)`` of shape (B,): a flow of this library or of another one,
or a distribution; with a context, ``log_prob(x, context=context)``. None of them is a probability
of being an outlier: samples are compared.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from mintnet_triton.checks import NonFiniteError, check_integer, check_number, is_traced
from mintnet_triton.inverse import InversionResult, invert
from mintnet_triton.invertible import Invertible
from mintnet_triton.solvers import Solver


class HasLogProb(Protocol):
    """What a score can be taken of."""

    def log_prob(self, x: Tensor, /) -> Tensor:
        """Log-density at x (B, ...) in nats, (B,); where it is conditional, of ``context``, too."""


def log_prob_per_dim(model: HasLogProb, x: Tensor, context: Tensor | None = None) -> Tensor:
    """``log p(x) / D`` (B,), in nats, of samples x (B, ...) of D values each.

    Raises:
        TypeError, ValueError: x is no tensor of at least one dimension, or ``log_prob`` does not
            return one value a sample; and all that the model raises.
        NonFiniteError: a log-density is NaN.
    """
    return _log_prob("model", model, x, context) / x.shape[1:].numel()


@torch.no_grad()
def entropy_estimate(model: HasLogProb, x: Tensor, context: Tensor | None = None) -> Tensor:
    """``-mean log p(x)``, a scalar in nats, for :func:`typicality`; without gradients.

    It estimates the model's entropy where x (N, ...) are samples of the model, or of what the model
    was trained on (equation 4 of Nalisnick et al. 2019, arXiv:1906.02994).

    Raises:
        TypeError, ValueError, NonFiniteError: as :func:`log_prob_per_dim`; or x is empty.
    """
    log_prob = _log_prob("model", model, x, context)
    if not len(x):
        raise ValueError("x must hold at least one sample, got none")
    return -log_prob.mean()


def typicality(
    model: HasLogProb, x: Tensor, entropy: Tensor | float, context: Tensor | None = None
) -> Tensor:
    """``|-log p(x) - H|`` (B,), in nats: how far a sample is from what the model is used to.

    A sample may be too likely as well as too unlikely (Nalisnick et al. 2019, arXiv:1906.02994,
    with one sample a test): larger is more of an outlier.

    Args:
        model: the density.
        x: (B, ...).
        entropy: H in nats, as :func:`entropy_estimate` has it.
        context: of a conditional density, one row a sample.

    Raises:
        TypeError, ValueError, NonFiniteError: as :func:`log_prob_per_dim`; or the entropy is not a
            finite number.
    """
    entropy = check_number("entropy", entropy)
    if not math.isfinite(entropy):
        raise ValueError(f"entropy must be finite, got {entropy}")
    return (-_log_prob("model", model, x, context) - entropy).abs()


def likelihood_ratio(
    model: HasLogProb, background: HasLogProb, x: Tensor, context: Tensor | None = None
) -> Tensor:
    """``log p(x) - log p_background(x)`` (B,), in nats: smaller is more of an outlier.

    The background model sees what all images have in common: it is trained as the model is, on
    images some of whose pixels are replaced at random (Ren et al. 2019, arXiv:1906.02845). A
    context is given to both.

    Raises:
        TypeError, ValueError, NonFiniteError: as :func:`log_prob_per_dim`; or the difference is
            NaN, where both densities are zero.
    """
    ratio = _log_prob("model", model, x, context)
    ratio = ratio - _log_prob("background", background, x, context)
    _check_not_nan("log p - log p_background", ratio)
    return ratio


@torch.no_grad()
def reconstruct(
    model: Invertible, x: Tensor, solver: Solver | None = None, context: Tensor | None = None
) -> InversionResult:
    """Map samples to latents and back; the result's ``x`` is the reconstruction.

    Args:
        model: a layer or a network.
        x: (B, ...), inputs of the model.
        solver: of the inverse; ``Auto()`` if None.
        context: as the model takes it, one row a sample.

    Raises:
        TypeError, ValueError: as the model and :func:`mintnet_triton.invert`.
    """
    z, _ = model(x) if context is None else model(x, context)
    return invert(model, z, solver, context=context)


@torch.no_grad()
def interpolate(
    model: Invertible,
    corners: Tensor,
    steps: int = 8,
    solver: Solver | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """Samples between 2, 4 or 2^k others, by way of their latents (Figure 5 of the paper).

    Between two, the latents are ``cos a z_1 + sin a z_2`` for angles a from 0 to pi / 2, which
    keeps the norm of independent normal latents. Between four, they are
    ``cos a (cos b z_1 + sin b z_2) + sin a (cos b z_3 + sin b z_4)``, and so on. Contexts are
    averaged with the squares of these weights, whose sum is 1.

    Args:
        model: a layer or a network.
        corners: (2^k, ...), inputs of the model.
        steps: samples a side.
        solver: of the inverse; ``Auto()`` if None.
        context: of the corners (2^k, ...), as the model takes it.

    Returns:
        (steps^k, ...); the first angle changes most slowly.

    Raises:
        NotConvergedError: the inverse of some sample did not converge.
        TypeError, ValueError: as the model; no 2^k corners, or steps below 1.
    """
    steps = check_integer("steps", steps, least=1)
    if not isinstance(corners, Tensor):
        raise TypeError(f"corners must be a torch.Tensor, got {type(corners).__name__}")
    count = len(corners) if corners.ndim else 0
    angles_needed = count.bit_length() - 1
    if count < 2 or count != 2**angles_needed:
        raise ValueError(f"corners must be 2, 4, 8, ... samples, got {count}")
    z, _ = model(corners) if context is None else model(corners, context)
    angles = torch.linspace(0, math.pi / 2, steps, dtype=z.dtype, device=z.device)
    weights = torch.stack([angles.cos(), angles.sin()])

    def mixed(values: Tensor, weights: Tensor) -> Tensor:
        mixture = values.reshape(*(2,) * angles_needed, *values.shape[1:])
        for _ in range(angles_needed):  # each takes the leading corners, and leaves steps last
            mixture = torch.tensordot(mixture, weights.to(values.dtype), dims=([0], [0]))
        return mixture.flatten(values.ndim - 1).movedim(-1, 0)

    between = None if context is None else mixed(context, weights.square())
    return model.inverse(mixed(z, weights), solver, between)[0]


def _log_prob(name: str, model: HasLogProb, x: Tensor, context: Tensor | None) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not x.ndim:
        raise ValueError("x must have shape (batch, ...), got a scalar")
    method: Any = getattr(model, "log_prob", None)
    if not callable(method):
        raise TypeError(f"{name} must have a method log_prob, got {type(model).__name__}")
    log_prob = method(x) if context is None else method(x, context=context)
    if not isinstance(log_prob, Tensor) or log_prob.shape != x.shape[:1]:
        got = tuple(log_prob.shape) if isinstance(log_prob, Tensor) else type(log_prob).__name__
        raise ValueError(
            f"log_prob of {name} must return one value a sample, shape ({len(x)},), got {got}; "
            "torch.distributions.Independent sums over the values of a sample"
        )
    _check_not_nan(f"log_prob of {name}", log_prob)
    return log_prob


def _check_not_nan(name: str, values: Tensor) -> None:
    """A log-density may be infinite, where the density is zero."""
    if not is_traced(values) and bool(values.isnan().any()):
        first = int(values.isnan().nonzero()[0])
        raise NonFiniteError(f"{name} is NaN for {int(values.isnan().sum())} samples, e.g. {first}")
