"""The masked convolution on canvases: one loop, and what is done with its sums.

A tile holds BLOCK_M places times BLOCK_N output channels. Channels are colour-major, so what the
mask leaves of a tap is one range of input channels (:mod:`.ranges`): lower colours at every tap,
the own colour at the causal taps. Nothing outside of it is loaded or multiplied; within it, weights
beyond the mask are zeros. Blocks of inputs are the outer loop and taps the inner one, so that the
taps of a block read the same lines one after the other, which they find in L1.

The gradient by the input is the same convolution with the opposite triangle, its weights transposed
and turned by 180 degrees.

The diagonal of a Mint layer's Jacobian is ``t + sum_i s2_i D3_i v_i`` with
``v_i = sum_j D2_ij D1_j s1_j``, where s1, s2 are the slopes of the hidden layers, read off their
values, and D1, D2, D3 join the units of one colour at one pixel. v is one more product, with a
canvas of slopes, which is written beside that of the layer. With g the gradient by the diagonal,
a hidden layer ``h = h(a)`` receives ``s (r + g d v s')``, where r comes through the next
convolution, v is that of the *other* hidden layer, d the D of this one, and s' the derivative of
the slope by h. Of the second layer ``g s2`` is written, in a unit in which the largest g is nearly
the largest float16: so the first layer's v, and the gradient by D2, have g in them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mintnet_triton.kernels import ranges
from mintnet_triton.kernels.gpu.activation import activate, slope, slope_derivative
from mintnet_triton.kernels.gpu.canvas import (
    load_given,
    locate,
    padded,
    position,
    rounded,
    store_rows,
    unit_below,
)
from mintnet_triton.kernels.work import Declared

seen_inputs, first_block = triton.jit(ranges.seen_inputs), triton.jit(ranges.first_block)


class Diagonal(NamedTuple):
    """What a hidden layer has to do with the diagonal of the Jacobian, if anything."""

    slopes: Tensor | None = None  # canvas, of the other hidden layer
    centres: Tensor | None = None  # (C*K, S), zero between colours: join that layer to this one
    ends: Tensor | None = None  # (C*K,): join this one to the pixel
    sums: Tensor | None = None  # (slots, places, C): shares of it, to be written
    by: Tensor | None = None  # canvas of colours: the gradient by it, if not among the slopes
    unit: Tensor | None = None  # (): of the slopes that have it, or are to have it


@triton.jit
def add_taps(
    total,
    rows,  # pointers to channel 0 of BLOCK_M positions
    weights,  # pointers to input 0 of BLOCK_N outputs, of tap 0
    start,  # first block of inputs, and where they end
    stop,
    stride,  # of a position, and of an output's weights
    tap_stride,  # of a tap's weights
    pitch,
    FIRST: tl.constexpr,  # tap, and how many
    TAPS: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # the stride is a multiple of BLOCK_K
    BLOCK_K: tl.constexpr,
):
    """Add the products of some taps with the inputs from ``start`` to ``stop``, in whole blocks."""
    k = tl.arange(0, BLOCK_K)
    x = rows[:, None] + k[None, :]
    w = weights[None, :] + k[:, None]
    first = start // BLOCK_K
    blocks = tl.maximum((stop + BLOCK_K - 1) // BLOCK_K - first, 0)
    # Where the next product is: addresses are counted up, for divisions cost more.
    corner = ((FIRST // KERNEL - KERNEL // 2) * pitch + FIRST % KERNEL - KERNEL // 2) * stride
    x_at, w_at = corner + first * BLOCK_K, FIRST * tap_stride + first * BLOCK_K
    tap, column, block = 0, FIRST % KERNEL, first * BLOCK_K
    for _ in tl.range(0, TAPS * blocks):
        if EVEN:
            a = tl.load(x + x_at, cache_modifier=".ca")
            b = tl.load(w + w_at)
        else:
            held = block + k < stride
            a = tl.load(x + x_at, mask=held[None, :], other=0.0, cache_modifier=".ca")
            b = tl.load(w + w_at, mask=held[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
        tap, column = tap + 1, column + 1
        row_ends, block_ends = column == KERNEL, tap == TAPS
        x_at += tl.where(row_ends, (pitch - KERNEL + 1) * stride, stride)
        w_at += tap_stride
        column = tl.where(row_ends, 0, column)
        block += tl.where(block_ends, BLOCK_K, 0)
        x_at = tl.where(block_ends, corner + block, x_at)
        w_at = tl.where(block_ends, FIRST * tap_stride + block, w_at)
        column = tl.where(block_ends, FIRST % KERNEL, column)
        tap = tl.where(block_ends, 0, tap)
    return total


@triton.jit
def add_conv(
    total, rows, weights, first, last, units, colours, stride, tap_stride, pitch,
    KERNEL: tl.constexpr, ORDER: tl.constexpr, TRIANGLE: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the masked convolution, for output colours ``first`` to ``last``."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    CENTRE: tl.constexpr = TAPS // 2
    low, high = seen_inputs(first, last, units, colours, 0, ORDER, TRIANGLE)
    if TAPS == 1:
        return add_taps(
            total, rows, weights, low, high, stride, tap_stride, pitch,
            0, 1, 1, PRECISION, EVEN, BLOCK_K,
        )  # fmt: skip
    # First what all taps see, or taps that see everything; then the rest.
    PIXEL: tl.constexpr = ORDER == "pixel"
    UPPER: tl.constexpr = TRIANGLE == "upper"
    FIRST: tl.constexpr = CENTRE + 1 if PIXEL and UPPER else 0
    MANY: tl.constexpr = CENTRE if PIXEL else TAPS
    THEN: tl.constexpr = CENTRE if PIXEL or UPPER else 0
    REST: tl.constexpr = 1 if PIXEL else CENTRE + (TRIANGLE != "below")
    if PIXEL:
        start, stop = 0 * high, units * colours
    elif UPPER:
        start, stop = seen_inputs(first, last, units, colours, -1, ORDER, TRIANGLE)
        start = first_block(start, stop, BLOCK_K)
        high = start
    else:
        _, high = seen_inputs(first, last, units, colours, -1, ORDER, TRIANGLE)
        start, stop = seen_inputs(first, last, units, colours, 1, ORDER, TRIANGLE)
        low = (stop + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    total = add_taps(
        total, rows, weights, start, stop, stride, tap_stride, pitch,
        FIRST, MANY, KERNEL, PRECISION, EVEN, BLOCK_K,
    )  # fmt: skip
    return add_taps(
        total, rows, weights, low, high, stride, tap_stride, pitch,
        THEN, REST, KERNEL, PRECISION, EVEN, BLOCK_K,
    )  # fmt: skip


@triton.jit
def is_running(residuals, sample, samples, limits):
    """Which samples go on after two residuals: finite, above the tolerance, and with some gain."""
    before = tl.load(residuals + sample)
    r = tl.load(residuals + padded(samples) + sample)
    return (r > tl.load(limits + 1)) & (r < float("inf")) & (r <= tl.load(limits + 2) * before)


@triton.jit
def store_shares(
    sums, share, place, valid, places, n, tile_n, first, last, units, colours,
    PRECISION: tl.constexpr, COLOURS: tl.constexpr,
):  # fmt: skip
    """Each colour's share of the diagonal, in a slot counted from the colour's first tile.

    Sums of a colour's columns, as a product with zeros and ones.
    """
    colour = first + tl.arange(0, COLOURS)
    ones = tl.where((n // units)[:, None] == colour[None, :], 1.0, 0.0).to(share.dtype)
    of_colour = tl.dot(share, ones, input_precision=PRECISION, out_dtype=share.dtype)
    slot = tile_n - colour * units // share.shape[1]
    at = (slot.to(tl.int64)[None, :] * places + place[:, None]) * colours + colour[None, :]
    tl.store(sums + at, of_colour, mask=valid[:, None] & (colour <= last)[None, :])


@triton.jit
def scale_colours(total, values, p, n, first, last, units, colours):
    """Channels n of some positions times their colour's value; values: a canvas of colours."""
    for colour in range(first, last + 1):
        one = tl.load(values + p * colours + colour)
        total = tl.where((n // units == colour)[None, :], total * one[:, None], total)
    return total


@triton.jit(
    do_not_specialize=["samples"],
    launch_metadata=Declared("hidden", units_in="units_in", units_out="units", own="diagonal"),
)
def hidden_kernel(
    out,  # canvas of a hidden layer; or of the gradient by it, before its activation
    slopes,  # canvas of this layer's slopes, to be written; or None
    x,  # canvas of what is convolved
    weight,  # (taps, outputs, stride of x)
    bias,  # (outputs,), or None
    shift,  # what a context adds, as an Image; or None
    diagonal,  # a Diagonal
    own,  # canvas of this layer, for its gradient; or None
    sums,  # (tiles, outputs): that gradient, summed over places
    residuals,  # as of :func:`output_kernel`: tiles without a running sample do nothing; or None
    limits,
    samples,
    canvas,
    units_in,
    units,
    colours,
    ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,  # see :class:`.configs.Blocks`
):
    """``out = h(conv(x) + bias)``, with the diagonal; or the gradient by such a layer.

    A colour may span several tiles; each writes its share of the diagonal into a slot of its own.
    """
    BLOCK_M: tl.constexpr = BLOCKS[0]
    BLOCK_N: tl.constexpr = BLOCKS[1]
    BLOCK_K: tl.constexpr = BLOCKS[2]
    BLOCK_OWN: tl.constexpr = BLOCKS[3]
    EVEN: tl.constexpr = BLOCKS[5]
    TF32: tl.constexpr = PRECISION == "tf32"
    F: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    outputs = units * colours
    stride, stride_in = padded(outputs), padded(units_in * colours)
    tiles = tl.cdiv(stride, BLOCK_N)
    # The tiles of the same places are neighbours, so that they find the input in the cache.
    tile_m, tile_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    places = samples * canvas.height * (canvas.width + canvas.radius)
    place = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = place < places
    # Lanes beyond the places, or the outputs, do what the last one does.
    here = tl.minimum(place, places - 1)
    sample, row, column = locate(here, canvas)
    if residuals is not None:
        running = is_running(residuals, sample, samples, limits) & valid
        if tl.max(running.to(tl.int32), 0) == 0:
            return
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    output = tl.minimum(n, outputs - 1)
    first = tile_n * BLOCK_N // units
    last = tl.minimum((tile_n * BLOCK_N + BLOCK_N - 1) // units, colours - 1)
    p = position(here, sample, canvas)
    pixel = p[:, None] * stride + n[None, :]
    held = (n < stride)[None, :]  # the padding, too, so that 16 bytes are read at once

    if own is not None:
        if slopes is not None:
            s = slope(tl.load(own + pixel, mask=held, other=0.0).to(F), ACTIVATION)
            s /= unit_below(tl.load(diagonal.unit))
            s = scale_colours(s, diagonal.by, p, n, first, last, units, colours)
            store_rows(slopes, rounded(s, TF32), place, places - 1, samples, canvas, n, stride)
    total = tl.zeros((BLOCK_M, BLOCK_N), F)
    if own is not None:
        # Before the convolution, which goes on in the same registers.
        total = add_taps(
            total, diagonal.slopes + p * stride, diagonal.centres + output * stride, first * units,
            (last + 1) * units, stride, 0, 0, 0, 1, 1, PRECISION, EVEN, BLOCK_OWN,
        )  # fmt: skip
        d = tl.load(diagonal.ends + output)
        if diagonal.by is not None:
            total = scale_colours(total, diagonal.by, p, n, first, last, units, colours)
        else:
            d *= unit_below(tl.load(diagonal.unit))
        h = tl.load(own + pixel, mask=held, other=0.0).to(F)
        total *= d[None, :] * slope_derivative(h, ACTIVATION)
    total = add_conv(
        total, x + p * stride_in, weight + output * stride_in, first, last, units_in, colours,
        stride_in, outputs * stride_in, canvas.width + canvas.radius,
        KERNEL, ORDER, TRIANGLE, PRECISION, EVEN, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + output).to(F)[None, :]
    seen = (valid & (column < canvas.width))[:, None] & (n < outputs)[None, :]
    if shift is not None:
        total += load_given(shift, sample, row, column, n, seen, 0.0).to(F)
    if own is not None:
        s = slope(tl.load(own + pixel, mask=held, other=0.0).to(F), ACTIVATION)
        total = tl.where(seen, total * s, 0.0)
        tl.store(sums + tile_m * outputs + n, tl.sum(total, 0), mask=n < outputs)
    else:
        total = tl.where(seen, activate(total, ACTIVATION), 0.0)
    total = rounded(total, TF32).to(out.dtype.element_ty)
    store_rows(out, total, place, places - 1, samples, canvas, n, stride)
    if own is None:
        if slopes is not None:
            # Of the value stored, so that the backward pass, which reads it, sees the same slope.
            s = rounded(slope(total.to(F), ACTIVATION), TF32)
            store_rows(slopes, s, place, places - 1, samples, canvas, n, stride)
    if diagonal.slopes is not None and own is None:
        # After the layer is stored, so that its sums need not be held beside these.
        tl.debug_barrier()
        v = add_taps(
            tl.zeros((BLOCK_M, BLOCK_N), F), diagonal.slopes + p * stride,
            diagonal.centres + output * stride, first * units, (last + 1) * units, stride, 0, 0,
            0, 1, 1, PRECISION, EVEN, BLOCK_OWN,
        )  # fmt: skip
        s = slope(tl.load(out + pixel, mask=held, other=0.0).to(F), ACTIVATION)
        share = v * s * tl.load(diagonal.ends + output)[None, :]
        EXACT: tl.constexpr = PRECISION == "ieee" and weight.dtype.element_ty == F
        store_shares(
            diagonal.sums, rounded(share, not EXACT), place, valid, places, n, tile_n, first, last,
            units, colours, "ieee" if EXACT else "tf32", BLOCKS[4],
        )  # fmt: skip


@triton.jit
def collect_diagonal(
    shares, t, factor, place, places, pixel, inside, n, units, colours, SHARES: tl.constexpr
):
    """``t`` plus the shares of the diagonal at some places, for colours n; 1 outside."""
    total = tl.load(t + pixel, mask=inside, other=1.0)
    if factor is not None:
        total *= factor
    # The tiles, SHARES[1] channels wide, that hold units of the colour.
    spans = ((n + 1) * units - 1) // SHARES[1] - n * units // SHARES[1]
    SLOTS: tl.constexpr = SHARES[0]
    for slot in tl.static_range(SLOTS):
        at = (slot * tl.cast(places, tl.int64) + place)[:, None] * colours + n[None, :]
        total += tl.load(shares + at, mask=inside & (slot <= spans)[None, :], other=0.0)
    return total


@triton.jit(
    do_not_specialize=["samples"],
    launch_metadata=Declared("output", units_in="units", units_out=1),
)
def output_kernel(
    y,  # (samples, colours, height, width), contiguous
    diagonal,  # the same, to be written; or None
    logs,  # (tiles of colours, places): the diagonal's logarithms, summed over colours
    h,  # canvas of what is convolved
    weight,  # (taps, colours, stride of h)
    bias,  # (colours,), or None
    t,  # (colours, height, width)
    scale,  # what a context multiplies t by, as an Image; or None
    shares,  # of the diagonal (slots, places, colours)
    x,  # an Image
    z,  # as y, for an update; or None
    size,  # (samples,): a residual is relative to it
    residuals,  # (3, padded samples): of the two iterations before; of this one, zero so far
    limits,  # (3,): alpha, tolerance, gain
    samples,
    canvas,
    units,
    colours,
    SHARES: tl.constexpr,  # slots, and the width of the tiles that wrote them
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``y = conv(h) + bias + t x``, with the diagonal and its logarithm.

    Without a diagonal it is the gradient by x of a layer: then x is the gradient by y, h that by
    the first hidden layer before its activation. With z, y becomes the x of the next iteration,
    ``x - alpha (f(x) - z) / diagonal``, for samples that are running.
    """
    BLOCK_M: tl.constexpr = BLOCKS[0]
    BLOCK_N: tl.constexpr = BLOCKS[1]
    F: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    stride = padded(units * colours)
    pitch = canvas.width + canvas.radius
    area = canvas.height * canvas.width
    tiles = tl.cdiv(colours, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    places = samples * canvas.height * pitch
    place = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(place, places - 1)
    sample, row, column = locate(here, canvas)
    written = place < places
    if z is not None:
        written &= is_running(residuals, sample, samples, limits)
        if tl.max(written.to(tl.int32), 0) == 0:
            return
    valid = written & (column < canvas.width)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = valid[:, None] & (n < colours)[None, :]
    first, last = tile_n * BLOCK_N, tl.minimum(tile_n * BLOCK_N + BLOCK_N, colours) - 1
    p = position(here, sample, canvas)
    total = add_conv(
        tl.zeros((BLOCK_M, BLOCK_N), F), h + p * stride,
        weight + tl.minimum(n, colours - 1) * stride, first, last, units, colours, stride,
        colours * stride, pitch, KERNEL, ORDER, TRIANGLE, PRECISION, BLOCKS[5], BLOCKS[2],
    )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + n, mask=n < colours, other=0.0).to(F)[None, :]
    pixel = n[None, :] * area + (row * canvas.width + column)[:, None]
    at = sample.to(tl.int64)[:, None] * (colours * area) + pixel
    factor = None
    if scale is not None:
        factor = load_given(scale, sample, row, column, n, inside, 1.0).to(F)
    if x.data is not None:
        x_at = sample.to(tl.int64) * x.sample + row.to(tl.int64) * x.row + column * x.column
        x_at = x_at[:, None] + n[None, :].to(tl.int64) * x.channel
        x_value = tl.load(x.data + x_at, mask=inside, other=0.0).to(F)
        own_t = tl.load(t + pixel, mask=inside, other=0.0)
        if scale is not None:
            own_t *= factor
        total += own_t * x_value
    if shares is not None:
        entries = collect_diagonal(
            shares, t, factor, place, places, pixel, inside, n, units, colours, SHARES
        )
        log = tl.sum(tl.where(inside, tl.log(entries), 0.0), 1)
        if z is None:
            tl.store(diagonal + at, entries, mask=inside)
        else:
            error = total - tl.load(z + at, mask=inside, other=0.0)
            total = x_value - tl.load(limits) * (error / entries)
            relative = tl.abs(error / tl.load(size + sample)[:, None])
            # Bits of non-negative floats are ordered as the floats are, and NaN comes last: so an
            # integer maximum, in any order of the tiles, is the maximum, or NaN if there is one.
            INTEGER: tl.constexpr = tl.int64 if F == tl.float64 else tl.int32
            bits = tl.where(inside, relative, 0.0).to(INTEGER, bitcast=True)
            largest = tl.max(bits, 1)
            now = (residuals + 2 * padded(samples)).to(tl.pointer_type(INTEGER), bitcast=True)
            for one in range(tl.min(sample, 0), tl.max(sample, 0) + 1):
                tl.atomic_max(now + one, tl.max(tl.where(sample == one, largest, 0), 0))
        tl.store(logs + tl.cast(tile_n, tl.int64) * places + place, log, mask=written)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
