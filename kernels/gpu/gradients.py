"""What a backward pass needs beside convolutions: what comes from above, and products by weights.

The gradient by the weights of a tap is a product over all positions of two canvases, one of them
shifted by the tap. Canvases are zero between images, so nothing there counts.
"""

import triton
import triton.language as tl

from mintnet_triton.kernels.gpu.activation import slope
from mintnet_triton.kernels.gpu.canvas import fill_columns, locate, padded, rounded, store_rows
from mintnet_triton.kernels.gpu.convolution import seen_inputs
from mintnet_triton.kernels.work import Declared


@triton.jit(do_not_specialize=["samples"])
def upstream_kernel(
    x_out,  # canvas of x, as the first convolution reads it
    y_out,  # canvas of the gradient by y, as the transpose of the last one reads it
    slopes,  # canvas of the first hidden layer's slopes
    by_diagonal_out,  # canvas of colours
    largest,  # (): the largest finite size in it, zero so far
    sums,  # (tiles, colours), of the gradient by y
    x,  # images
    by_y,
    by_diagonal,
    by_log_det,  # (samples,), as an image
    diagonal,  # (samples, colours, height, width)
    h,  # canvas of the first hidden layer
    size,  # elements of that
    samples,
    canvas,
    colours,
    ACTIVATION: tl.constexpr,
    KERNELS: tl.constexpr,  # of x_out and y_out
    PRECISION: tl.constexpr,
    COLOURS: tl.constexpr,  # the colours, rounded up
    BLOCKS: tl.constexpr,  # of places, channels
):
    """Canvases of x, of its layer's slopes, and of the gradients by y and by the diagonal.

    log_det is the sum of the diagonal's logarithms.
    """
    TF32: tl.constexpr = PRECISION == "tf32"
    BLOCK_M: tl.constexpr = BLOCKS[0]
    role = tl.program_id(1)
    if role == 2:
        # Anywhere in the canvas, zeros between images as well.
        TILE: tl.constexpr = BLOCK_M * BLOCKS[1]
        first = tl.program_id(0).to(tl.int64) * TILE
        for start in range(first, size, tl.num_programs(0) * TILE):
            e = start + tl.arange(0, TILE)
            value = tl.load(h + e, mask=e < size, other=0.0)
            s = slope(value.to(by_diagonal_out.dtype.element_ty), ACTIVATION)
            tl.store(slopes + e, rounded(s, TF32).to(slopes.dtype.element_ty), mask=e < size)
        return
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    places = samples * canvas.height * (canvas.width + canvas.radius)
    if tl.program_id(0) * BLOCK_M >= places:
        return
    if role == 0:
        fill_columns(x_out, x, place, samples, canvas, colours, KERNELS[0], TF32, BLOCKS[1])
        return
    fill_columns(y_out, by_y, place, samples, canvas, colours, KERNELS[1], TF32, BLOCKS[1])
    n = tl.arange(0, COLOURS)
    sample, row, column = locate(place, canvas)
    inside = ((place < places) & (column < canvas.width))[:, None] & (n < colours)[None, :]
    sample, row, column = sample.to(tl.int64)[:, None], row[:, None], column[:, None]
    F: tl.constexpr = by_diagonal_out.dtype.element_ty
    g = tl.zeros((BLOCK_M, COLOURS), F)
    if by_log_det.data is not None:
        area = canvas.height * canvas.width
        at = (sample * colours + n[None, :]) * area + row * canvas.width + column
        entries = tl.load(diagonal + at, mask=inside, other=1.0)
        g += (
            tl.load(by_log_det.data + sample * by_log_det.sample, mask=inside, other=0.0).to(F)
            / entries
        )
    if by_diagonal.data is not None:
        at = sample * by_diagonal.sample + row * by_diagonal.row + column * by_diagonal.column
        at += n[None, :].to(tl.int64) * by_diagonal.channel
        g += tl.load(by_diagonal.data + at, mask=inside, other=0.0).to(F)
    g = tl.where(inside, g, 0.0)
    # Bits of non-negative floats are ordered as the floats are.
    INTEGER: tl.constexpr = tl.int64 if F == tl.float64 else tl.int32
    bits = tl.where(tl.abs(g) < float("inf"), tl.abs(g), 0.0).to(INTEGER, bitcast=True)
    pointer = largest.to(tl.pointer_type(INTEGER), bitcast=True)
    tl.atomic_max(pointer, tl.max(tl.max(bits, 1), 0))
    store_rows(by_diagonal_out, g, place, places - 1, samples, canvas, n, colours)
    total = tl.zeros((COLOURS,), F)
    if by_y.data is not None:
        at = sample * by_y.sample + row.to(tl.int64) * by_y.row + column * by_y.column
        at += n[None, :].to(tl.int64) * by_y.channel
        total = tl.sum(tl.load(by_y.data + at, mask=inside, other=0.0).to(F), 0)
    tl.store(sums + tl.program_id(0) * colours + n, total, mask=n < colours)


@triton.jit
def sees(
    n, k, place, units, inputs, colours, ORDER: tl.constexpr, TRIANGLE: tl.constexpr
):  # fmt: skip
    """Whether the mask leaves anything of a tile of a tap's weights; place as in seen_inputs."""
    first = tl.min(n, 0) // units
    last = tl.minimum(tl.max(n, 0) // units, colours - 1)
    low, high = seen_inputs(first, last, inputs, colours, 0, ORDER, TRIANGLE)
    if place < 0:
        low, high = seen_inputs(first, last, inputs, colours, -1, ORDER, TRIANGLE)
    if place > 0:
        low, high = seen_inputs(first, last, inputs, colours, 1, ORDER, TRIANGLE)
    # A tile may reach beyond the inputs, where a range that is empty may begin.
    return (tl.min(k, 0) < high) & (low <= tl.minimum(tl.max(k, 0), inputs * colours - 1))


@triton.jit
def load(pointers, mask, EVEN: tl.constexpr):
    """What lies there, in L1 as well; zero outside the mask, if there can be an outside."""
    if EVEN:
        value = tl.load(pointers, cache_modifier=".ca")
    else:
        value = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".ca")
    return value


@triton.jit
def multiply(
    parts, left, right, start, stop, stride, stride_in, n, k, step, mask, THREE: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``left.T @ right`` of positions from start to stop; pointers to channels of position 0.

    With THREE, of ``right`` at three positions side by side, into parts that are ``step`` apart:
    what is on the left is read once, and what is on the right is found in L1.
    """
    lane = tl.arange(0, BLOCK_M)
    F: tl.constexpr = parts.dtype.element_ty
    zero = tl.zeros((n.shape[0], k.shape[0]), F)
    total, second, third = zero, zero, zero
    for base in tl.range(start, stop, BLOCK_M):
        p = (base + lane).to(tl.int64)
        g = load(left[:, None] + p[None, :] * stride, (n < stride)[:, None], EVEN)
        at = right[None, :] + p[:, None] * stride_in
        x = load(at, (k < stride_in)[None, :], EVEN)
        total = tl.dot(g, x, total, input_precision=PRECISION, out_dtype=F)
        if THREE:
            x = load(at + stride_in, (k < stride_in)[None, :], EVEN)
            second = tl.dot(g, x, second, input_precision=PRECISION, out_dtype=F)
            x = load(at + 2 * stride_in, (k < stride_in)[None, :], EVEN)
            third = tl.dot(g, x, third, input_precision=PRECISION, out_dtype=F)
    at = parts + n[:, None] * stride_in + k[None, :]
    tl.store(at, total, mask=mask)
    if THREE:
        tl.store(at + step, second, mask=mask)
        tl.store(at + 2 * step, third, mask=mask)


@triton.jit(
    do_not_specialize=["samples", "per_split"],
    launch_metadata=Declared(
        "weight_gradient", units_in="units_in", units_out="units", own="slopes"
    ),
)
def weight_gradient_kernel(
    parts,  # (splits, taps, outputs, stride of x); with slopes, taps + 1
    gradient,  # canvas
    x,  # canvas
    slopes,  # two canvases, multiplied for one more tap, each colour with itself; or None
    pair,  # parts, gradient and x of another product, with the opposite triangle; or None
    samples,
    canvas,
    per_split,  # positions
    units,
    units_in,
    colours,
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``sum over positions p of gradient[p, n] x[p + tap, k]``, of one tap and one split of them.

    Parts are added by whoever reads them, in order. Tiles that the mask hides are not written.
    """
    BLOCK_M: tl.constexpr = BLOCKS[0]
    BLOCK_N: tl.constexpr = BLOCKS[1]
    BLOCK_K: tl.constexpr = BLOCKS[2]
    EVEN: tl.constexpr = BLOCKS[5]
    TAPS: tl.constexpr = KERNEL * KERNEL
    #: taps that a program takes
    AT_ONCE: tl.constexpr = 3 if KERNEL == 3 else 1
    TURNED: tl.constexpr = "upper" if TRIANGLE == "lower" else "lower"
    outputs, inputs = units * colours, units_in * colours
    stride, stride_in = padded(outputs), padded(inputs)
    pitch = canvas.width + canvas.radius
    tiles_n, tiles_k = tl.cdiv(outputs, BLOCK_N), tl.cdiv(inputs, BLOCK_K)
    program, split = tl.program_id(0), tl.program_id(1)
    n = program // tiles_k % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = program % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    tap = program // (tiles_k * tiles_n) * AT_ONCE
    taps = TAPS if slopes is None else TAPS + 1
    guard = canvas.radius * (pitch + 1)
    start = guard + split * per_split
    stop = tl.minimum(start + per_split, guard + samples * (canvas.height + canvas.radius) * pitch)
    step = outputs * stride_in
    place = (split.to(tl.int64) * taps + tap) * step
    mask = (n < outputs)[:, None] & (k < stride_in)[None, :]
    if slopes is not None:
        if tap == TAPS:
            if sees(n, k, 0, units, units_in, colours, "own", TRIANGLE):
                multiply(
                    parts + place, slopes[0] + n, slopes[1] + k, start, stop, stride, stride_in,
                    n, k, step, mask, False, PRECISION, EVEN, BLOCK_M,
                )  # fmt: skip
            return
    shift = (tap // KERNEL - KERNEL // 2) * pitch + tap % KERNEL - KERNEL // 2
    # The first of them, or the last, sees whatever the others see.
    EDGE: tl.constexpr = 0 if TRIANGLE == "lower" else AT_ONCE - 1
    first, last = tap + EDGE - TAPS // 2, tap + AT_ONCE - 1 - EDGE - TAPS // 2
    seen = sees(n, k, first, units, units_in, colours, ORDER, TRIANGLE)
    if pair is not None:
        # One loop for both: ptxas lets no matrix product go on behind another where there are two.
        if tl.program_id(2) == 1:
            parts, gradient, x = pair
            seen = sees(n, k, last, units, units_in, colours, ORDER, TURNED)
    if seen:
        multiply(
            parts + place, gradient + n, x + shift * stride_in + k, start, stop, stride, stride_in,
            n, k, step, mask, AT_ONCE == 3, PRECISION, EVEN, BLOCK_M,
        )  # fmt: skip
