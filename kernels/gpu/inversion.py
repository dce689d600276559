"""Algorithm 1 on a Mint layer, an iteration in three kernels.

Iteration i evaluates f at x_i by the layer's first two kernels; the third, instead of writing
f(x_i), writes the residual of x_i and ``x_{i+1} = x_i - alpha (f(x_i) - z) / diag``.

The host never waits for a residual. ``residuals`` has a row for each iteration, zero at first; row
i + 1 belongs to x_i, and row 0 is a large number, so that every sample starts. A sample runs as
long as the row before is finite and above the tolerance; after that its rows stay zero, nothing is
computed for it, and x, of which there are two copies used in turn, keeps the x_i that was good.
The host looks only now and then whether anything is left to do, and not at all while a CUDA graph
is being captured.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mintnet_triton.kernels.gpu import launching
from mintnet_triton.kernels.gpu.masked_conv import add_conv
from mintnet_triton.kernels.gpu.mint_layer import (
    Packed,
    collect_diagonal,
    middle_tile,
    new_hidden,
    output_tile,
    run_hidden,
)
from mintnet_triton.kernels.gpu.weights import kernel_size
from mintnet_triton.kernels.reference import Structure
from mintnet_triton.kernels.work import Declared

#: iterations between two looks at the residuals by the host
STRIDE = 8


@triton.jit(
    do_not_specialize=["samples"],
    launch_metadata=Declared("update", units_in="units", units_out=1, own=False),
)
def update_kernel(
    x_next,  # (samples, colours, height, width), as x and z
    residuals,  # row of this iteration, (samples,), as integers of the same bits
    log_det,  # (samples, tiles of a sample)
    x,
    z,
    scale,  # (samples,): a residual is relative to it
    previous,  # residuals of the row before
    h,
    weight,
    bias,
    t,
    parts,
    alpha,  # one number in memory, as the tolerance: an argument would be rounded to float32
    tolerance,
    samples,
    height,
    width,
    stride,
    units,
    colours,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The residual of x, its log-det, and the x after it, for one tile of one sample."""
    area = height * width
    m_tiles = tl.cdiv(area, BLOCK_M)
    n_tiles = tl.cdiv(colours, BLOCK_N)
    tile = tl.program_id(0) % (m_tiles * n_tiles)
    owner = tl.program_id(0) // (m_tiles * n_tiles)
    before = tl.load(previous + owner)
    if not ((before > tl.load(tolerance)) & (before < float("inf"))):
        return
    within = tile // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = within < area
    inside = valid[:, None] & (n < colours)[None, :]
    pixel = owner * area + within
    row, column = within // width, within % width
    total = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    total = add_conv(
        total, h, pixel.to(tl.int64) * stride, row, column, valid, height, width,
        width * stride, stride, 1, stride, weight, stride, n, colours, units, 1, colours,
        KERNEL, ORDER, TRIANGLE, PRECISION, BLOCK_K,
    )  # fmt: skip
    diagonal = collect_diagonal(
        parts, t, pixel, valid, samples * area, area, n, units, colours, SLOTS, TILE, ACCUMULATOR
    )
    within_sample = n[None, :] * area + within[:, None]
    place = owner.to(tl.int64) * colours * area + within_sample
    x_value = tl.load(x + place, mask=inside, other=0.0)
    t_value = tl.load(t + within_sample, mask=inside, other=0.0)
    total += tl.load(bias + n, mask=n < colours, other=0.0).to(ACCUMULATOR)[None, :]
    error = total + t_value * x_value - tl.load(z + place, mask=inside, other=0.0)
    tl.store(x_next + place, x_value - tl.load(alpha) * (error / diagonal), mask=inside)

    # Bits of non-negative floats are ordered as the floats are, and NaN comes last: so an integer
    # maximum, in any order of the tiles, is the maximum, or NaN if there is one.
    relative = tl.where(inside, tl.abs(error / tl.load(scale + owner)), 0.0)
    if ACCUMULATOR == tl.float64:
        bits = relative.to(tl.int64, bitcast=True)
    else:
        bits = relative.to(tl.int32, bitcast=True)
    tl.atomic_max(residuals + owner, tl.max(tl.max(bits, 1), 0))
    logs = tl.where(inside, tl.log(diagonal), 0.0)
    tl.store(log_det + owner.to(tl.int64) * (m_tiles * n_tiles) + tile, tl.sum(tl.sum(logs, 1), 0))


class Iterated(NamedTuple):
    """What came of the iteration, per sample."""

    x: Tensor  # (B, C, H, W)
    log_det: Tensor  # (B,), of the forward map at x
    residuals: Tensor  # (T + 1, B), relative, of x_0 to x_T; zero after a sample's last one
    iterations: Tensor  # (B,), int64


def fixed_point(
    z: Tensor,
    start: Tensor,
    packed: Packed,
    structure: Structure,
    alpha: float,
    iterations: int,
    tolerance: float,
) -> Iterated:
    """Solve f(x) = z for one layer, starting from ``start``; float32 is multiplied exactly.

    Args:
        z, start: (B, C, H, W), float32 or float64.
        packed: weights of the same dtype.
        iterations: most updates, T.
        tolerance: largest ``max |f(x) - z| / max(1, max |z|)`` at which a sample stops.
    """
    z = z.contiguous()
    batch, colours, height, width = z.shape
    outputs, stride = packed.weight2.shape[1:]
    integer = torch.int64 if z.dtype == torch.float64 else torch.int32
    # Rows are padded, for kernels are compiled for the alignment of what they are given.
    rows = torch.zeros(iterations + 2, launching.padded(batch), dtype=z.dtype, device=z.device)
    residuals = rows[:, :batch]
    residuals[0] = torch.finfo(z.dtype).max
    scale = z.abs().flatten(1).amax(1).clamp(min=1)
    copies = (start.clone(memory_format=torch.contiguous_format), torch.empty_like(z))
    h1, h2 = new_hidden(z, packed), new_hidden(z, packed)
    tile = output_tile(packed.weight3, colours, height * width, "ieee")
    tiles = triton.cdiv(height * width, tile.block_m) * triton.cdiv(colours, tile.block_n)
    logs = z.new_empty((batch, tiles))
    step, limit = z.new_full((), alpha), z.new_full((), tolerance)
    capturing = z.is_cuda and torch.cuda.is_current_stream_capturing()
    for i in range(iterations + 1):
        x, x_next = copies[i % 2], copies[1 - i % 2]
        running = (residuals[i], limit)
        if i % STRIDE == STRIDE - 1 and not capturing and not bool(is_running(*running).any()):
            break
        parts = run_hidden(x, h1, h2, packed, structure, "ieee", running)
        launching.launch(
            update_kernel,
            (batch * tiles,),
            x_next, residuals[i + 1].view(integer), logs, x, z, scale, residuals[i], h2,
            packed.weight3, packed.bias3, packed.t, parts, step, limit,
            batch, height, width, stride, outputs // colours, colours,
            SLOTS=len(parts), TILE=middle_tile(packed, colours, "ieee").block_n,
            KERNEL=kernel_size(packed.weight3), ORDER=structure.order, TRIANGLE=structure.triangle,
            **launching.numerics(z.dtype, "ieee"), **launching.blocks(tile),
        )  # fmt: skip
    steps = is_running(residuals[:-1], limit).sum(0) - 1
    answer = torch.where((steps % 2 == 0).view(-1, 1, 1, 1), *copies)
    return Iterated(answer, logs.sum(1), residuals[1:], steps)


def is_running(residual: Tensor, tolerance: Tensor) -> Tensor:
    """Which samples go on after that residual: not those with NaN."""
    return residual.isfinite() & (residual > tolerance)
