"""Algorithm 1 on a Mint layer, an iteration in four kernels.

Iteration i evaluates f at x_i by the layer's own kernels; the last of them, instead of writing
f(x_i), writes the residual of x_i and ``x_{i+1} = x_i - alpha (f(x_i) - z) / diag``.

The host never waits for a residual. ``residuals`` has a row for each iteration, zero at first; row
i + 1 belongs to x_i, and what precedes it is large, so that every sample starts. A sample runs as
long as the row before is finite, above the tolerance, and small enough beside the one before that;
then its rows stay zero, nothing is computed for it, and x, of which there are two copies used in
turn, keeps the x_i that was good.
The host looks only now and then whether anything is left to do, and not at all while a CUDA graph
is being captured.
"""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from mintnet_triton.kernels.backend import is_capturing
from mintnet_triton.kernels.gpu.launching import padded
from mintnet_triton.kernels.gpu.mint_layer import Shape, run_hidden, run_output
from mintnet_triton.kernels.gpu.weights import Packed
from mintnet_triton.kernels.reference import Condition, Structure, Weights

#: iterations between two looks at the residuals by the host
STRIDE = 8


class Iterated(NamedTuple):
    """What came of the iteration, per sample."""

    x: Tensor  # (B, C, H, W)
    log_det: Tensor  # (B,), of the forward map at x
    residuals: Tensor  # (T + 1, B), relative, of x_0 to x_T; zero after a sample's last one
    iterations: Tensor  # (B,), int64


def fixed_point(
    z: Tensor, start: Tensor, packed: Packed, weights: Weights, structure: Structure, alpha: float,
    iterations: int, tolerance: float, gain: float = inf, condition: Condition | None = None,
) -> Iterated:  # fmt: skip
    """Solve f(x) = z for one layer, starting from ``start``.

    Args:
        z, start: (B, C, H, W), float32 or float64.
        packed: weights in the dtype of the products, which may be less exact than z.
        iterations: most updates, T.
        tolerance: largest ``max |f(x) - z| / max(1, max |z|)`` at which a sample stops.
        gain: a sample stops, too, whose residual is larger than that times the one before.
        condition: of the samples, where a context gives one.
    """
    z = z.contiguous()
    batch = len(z)
    dtype = packed.weight2.dtype
    shape = Shape.of(z, len(packed.ends), weights.kernels, dtype, "ieee", structure)
    # Rows are padded, for kernels are compiled for the alignment of what they are given.
    rows = z.new_zeros(iterations + 3, padded(batch))
    rows[0], rows[1] = inf, torch.finfo(z.dtype).max
    before, residuals = rows[:-1, :batch], rows[1:, :batch]
    size = z.abs().flatten(1).amax(1).clamp(min=1)
    shift1, shift2, shift3, scale = condition or (None,) * 4
    z = z if shift3 is None else z - shift3
    copies = (start.clone(memory_format=torch.contiguous_format), torch.empty_like(z))
    h1, h2 = shape.new_hidden(z), shape.new_hidden(z)
    logs = shape.new_logs(packed.t)
    limits = torch.stack([z.new_full((), limit) for limit in (alpha, tolerance, gain)])
    for i in range(iterations + 1):
        x, x_next = copies[i % 2], copies[1 - i % 2]
        looks = i % STRIDE == STRIDE - 1 and not is_capturing(z)
        if looks and not bool(is_running(before[i], residuals[i], limits).any()):
            break
        run = (rows[i : i + 3], limits)
        shares = run_hidden(x, h1, h2, packed, weights.biases[:2], shape, (shift1, shift2), run)
        run_output(
            x_next, None, logs, x, h2, shares, packed, weights.bias3, shape, scale, (z, size, *run)
        )
    steps = is_running(before[:-1], residuals[:-1], limits).sum(0) - 1
    answer = torch.where((steps % 2 == 0).view(-1, 1, 1, 1), *copies)
    return Iterated(answer, logs.sum((0, 2)), residuals[1:], steps)


def is_running(before: Tensor, residual: Tensor, limits: Tensor) -> Tensor:
    """Which samples go on after those two residuals: not those with NaN."""
    return residual.isfinite() & (residual > limits[1]) & (residual <= limits[2] * before)
