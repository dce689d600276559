"""The Mint layer and its gradient.

Forward is three kernels: the first masked convolution with its activation; the middle one, which
also gives the diagonal; the last, which ends the map and the log-determinant.

The diagonal of the Jacobian is ``t + sum_i s2_i v_i`` with ``v_i = sum_j M_ij s1_j``, where s1, s2
are the slopes of the hidden layers, read off their values, and ``M = D3 D2 D1`` joins the units of
one colour at one pixel. v is one more product over the tile that the middle convolution reads
anyway.

Gradients, with g the gradient by the diagonal: a hidden layer h = h(a) whose slopes s multiply the
product v of the *other* hidden layer's slopes receives ``s (r + g v s')``, where r comes through
the next convolution and s' is the derivative of the slope by h. The middle and the first hidden
layer differ only in which layer is the other one, so one kernel serves both.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from mintnet_triton.kernels._library import compute_dtype, only_once, opposite, register
from mintnet_triton.kernels.gpu import configs, launching
from mintnet_triton.kernels.gpu.activation import activate, slope, slope_derivative
from mintnet_triton.kernels.gpu.masked_conv import (
    add_conv,
    add_product,
    any_running,
    locate,
    run_conv,
    run_weight_gradient,
    seen_inputs,
)
from mintnet_triton.kernels.gpu.weights import (
    centres_unit,
    kernel_size,
    pack,
    pack_centres,
    pack_transposed,
)
from mintnet_triton.kernels.reference import MintWeights, Structure, join_centres
from mintnet_triton.kernels.work import Declared


@triton.jit
def add_own_slopes(
    total,
    h,
    offset,
    valid,
    stride,
    centres,  # (outputs, stride), zero between colours
    n,
    outputs,
    units,
    colours,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``v = centres @ slope(h)`` at some pixels: within a colour, at the pixel itself."""
    first = tl.minimum(tl.min(n, 0) // units, colours - 1)
    last = tl.minimum(tl.max(n, 0) // units, colours - 1)
    low, high = seen_inputs(first, last, units, colours, 0, "own", "lower")
    return add_product(
        total,
        h + offset,
        valid,
        1,
        stride,
        centres + n * stride,
        n < outputs,
        stride,
        low,
        high,
        ACTIVATION,
        PRECISION,
        BLOCK_K,
    )


@triton.jit(
    do_not_specialize=["samples"],
    launch_metadata=Declared("middle", units_in="units", units_out="units", own=True),
)
def middle_kernel(
    h2,
    parts,  # (slots, pixels, colours)
    h1,
    weight,
    bias,
    centres,
    unit,  # of the centres: one number in memory, or None
    residual,
    tolerance,
    samples,
    height,
    width,
    stride,  # of a pixel in h1 and h2
    units,
    colours,
    ACTIVATION: tl.constexpr,
    SKIP: tl.constexpr,
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``h2 = h(conv(h1) + bias)``, and each colour's share of the diagonal, ``sum_i s2_i v_i``.

    A colour may span several tiles; each writes its part of the sum into a slot of its own, counted
    from the colour's first tile.
    """
    outputs = units * colours
    n_tiles = tl.cdiv(outputs, BLOCK_N)
    n_tile = tl.program_id(0) % n_tiles
    pixel = tl.program_id(0) // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    pixels = samples * height * width
    valid = pixel < pixels
    sample, row, column = locate(pixel, height, width)
    if SKIP:
        if not any_running(residual, sample, valid, tolerance):
            return
    offset = pixel.to(tl.int64) * stride
    total = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    total = add_conv(
        total, h1, offset, row, column, valid, height, width, width * stride, stride, 1, stride,
        weight, stride, n, outputs, units, units, colours,
        KERNEL, ORDER, TRIANGLE, PRECISION, BLOCK_K,
    )  # fmt: skip
    v = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    v = add_own_slopes(
        v, h1, offset, valid, stride, centres, n, outputs, units, colours,
        ACTIVATION, PRECISION, BLOCK_K,
    )  # fmt: skip
    if unit is not None:
        v *= tl.load(unit)
    total += tl.load(bias + n, mask=n < outputs, other=0.0).to(ACCUMULATOR)[None, :]
    h = tl.where((n < outputs)[None, :], activate(total, ACTIVATION), 0.0).to(h2.dtype.element_ty)
    tl.store(h2 + offset[:, None] + n[None, :], h, mask=valid[:, None] & (n < stride)[None, :])
    # Of the value stored, so that the backward pass, which reads it, sees the same slope.
    share = slope(h.to(ACCUMULATOR), ACTIVATION) * v
    first = tl.min(n, 0) // units
    last = tl.minimum(tl.max(n, 0) // units, colours - 1)
    for colour in range(first, last + 1):
        of_colour = tl.where((n // units == colour)[None, :], share, 0.0)
        slot = n_tile - colour * units // BLOCK_N
        tl.store(
            parts + (slot * tl.cast(pixels, tl.int64) + pixel) * colours + colour,
            tl.sum(of_colour, 1),
            mask=valid,
        )


@triton.jit
def collect_diagonal(
    parts, t, pixel, valid, pixels, area, n, units, colours,
    SLOTS: tl.constexpr, TILE: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """``t`` plus the parts of the diagonal, at some pixels and colours n; 1 outside."""
    inside = valid[:, None] & (n < colours)[None, :]
    diagonal = tl.load(t + n[None, :] * area + (pixel % area)[:, None], mask=inside, other=1.0).to(
        ACCUMULATOR
    )
    # The tiles, TILE channels wide, that hold units of the colour.
    spans = ((n + 1) * units - 1) // TILE - n * units // TILE
    for slot in tl.static_range(SLOTS):
        diagonal += tl.load(
            parts + ((slot * tl.cast(pixels, tl.int64) + pixel) * colours)[:, None] + n[None, :],
            mask=inside & (slot <= spans)[None, :],
            other=0.0,
        )
    return diagonal


@triton.jit(
    do_not_specialize=["samples"],
    launch_metadata=Declared("output", units_in="units", units_out=1, own=False),
)
def output_kernel(
    y,  # (samples, colours, height, width)
    diagonal,  # the same
    log_det,  # (samples, tiles of a sample)
    x,
    h,
    weight,
    bias,
    t,
    parts,
    samples,
    height,
    width,
    x_stride_sample,
    x_stride_row,
    x_stride_column,
    x_stride_channel,
    stride,
    units,
    colours,
    FORWARD: tl.constexpr,
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
    """``y = conv(h) + t x``. FORWARD adds the bias, and writes the diagonal and sums of its log.

    Without FORWARD it is the gradient by x of a layer: then x is the gradient by y, h that by the
    first hidden layer before its activation.
    """
    area = height * width
    m_tiles = tl.cdiv(area, BLOCK_M)
    n_tiles = tl.cdiv(colours, BLOCK_N)
    tile = tl.program_id(0) % (m_tiles * n_tiles)
    owner = tl.program_id(0) // (m_tiles * n_tiles)  # no tile spans two samples
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
    x_offset = (
        owner.to(tl.int64) * x_stride_sample
        + row.to(tl.int64) * x_stride_row
        + column.to(tl.int64) * x_stride_column
    )
    x_value = tl.load(
        x + x_offset[:, None] + n[None, :].to(tl.int64) * x_stride_channel, mask=inside, other=0.0
    ).to(ACCUMULATOR)
    place = n[None, :] * area + within[:, None]
    t_value = tl.load(t + place, mask=inside, other=0.0).to(ACCUMULATOR)
    total += t_value * x_value
    if FORWARD:
        total += tl.load(bias + n, mask=n < colours, other=0.0).to(ACCUMULATOR)[None, :]
        entries = collect_diagonal(
            parts, t, pixel, valid, samples * area, area, n, units, colours,
            SLOTS, TILE, ACCUMULATOR,
        )  # fmt: skip
        start = owner.to(tl.int64) * colours * area
        tl.store(diagonal + start + place, entries, mask=inside)
        logs = tl.where(inside, tl.log(entries), 0.0)
        tl.store(
            log_det + owner.to(tl.int64) * (m_tiles * n_tiles) + tile, tl.sum(tl.sum(logs, 1), 0)
        )
    tl.store(
        y + owner.to(tl.int64) * colours * area + place, total.to(y.dtype.element_ty), mask=inside
    )


@triton.jit(
    do_not_specialize=["samples"],
    launch_metadata=Declared("hidden_gradient", units_in="units_in", units_out="units", own=True),
)
def hidden_gradient_kernel(
    gradient,  # by this hidden layer before its activation, (pixels, stride)
    incoming,  # by what the next convolution gives
    weight,  # of the next convolution, transposed and turned
    own,  # this hidden layer, (pixels, stride)
    other,  # the other one
    centres,
    unit,  # of the centres: one number in memory, or None
    diagonal_gradient,  # (pixels, colours)
    samples,
    height,
    width,
    incoming_stride_sample,
    incoming_stride_row,
    incoming_stride_column,
    incoming_stride_channel,
    width_in,
    weights_width,
    stride,
    units_in,
    units,
    colours,
    ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OWN: tl.constexpr,  # as BLOCK_K, of hidden channels: there may be few incoming ones
):
    """``s (conv(incoming) + g v s')``; see the head of this file."""
    outputs = units * colours
    n_tiles = tl.cdiv(outputs, BLOCK_N)
    pixel = tl.program_id(0) // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = pixel < samples * height * width
    inside = valid[:, None] & (n < outputs)[None, :]
    sample, row, column = locate(pixel, height, width)
    offset = pixel.to(tl.int64) * stride
    incoming_offset = (
        sample.to(tl.int64) * incoming_stride_sample
        + row.to(tl.int64) * incoming_stride_row
        + column.to(tl.int64) * incoming_stride_column
    )
    total = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    total = add_conv(
        total, incoming, incoming_offset, row, column, valid, height, width,
        incoming_stride_row, incoming_stride_column, incoming_stride_channel, width_in,
        weight, weights_width, n, outputs, units_in, units, colours,
        KERNEL, ORDER, TRIANGLE, PRECISION, BLOCK_K,
    )  # fmt: skip
    v = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    v = add_own_slopes(
        v, other, offset, valid, stride, centres, n, outputs, units, colours,
        ACTIVATION, PRECISION, BLOCK_OWN,
    )  # fmt: skip
    if unit is not None:
        v *= tl.load(unit)
    place = offset[:, None] + n[None, :]
    g = tl.load(
        diagonal_gradient + (pixel.to(tl.int64) * colours)[:, None] + (n // units)[None, :],
        mask=inside,
        other=0.0,
    )
    # The padding is read too: a mask that ends at a multiple of 16 keeps the loads wide.
    h = tl.load(own + place, mask=valid[:, None] & (n < stride)[None, :], other=0.0)
    h = h.to(ACCUMULATOR)
    total += g * v * slope_derivative(h, ACTIVATION)
    result = tl.where(inside, total * slope(h, ACTIVATION), 0.0)
    tl.store(
        gradient + place,
        result.to(gradient.dtype.element_ty),
        mask=valid[:, None] & (n < stride)[None, :],
    )


class Packed(NamedTuple):
    """The weights of a layer as its kernels read them (see :mod:`.weights`)."""

    weight1: Tensor  # (k1 * k1, C * K, padded C)
    bias1: Tensor  # (C * K,)
    weight2: Tensor  # (k2 * k2, C * K, S), S = padded C * K
    bias2: Tensor  # (C * K,)
    weight3: Tensor  # (k3 * k3, C, S)
    bias3: Tensor  # (C,)
    centres: Tensor  # (C * K, S), in their unit
    t: Tensor  # (C, H, W)
    unit: Tensor | None  # ()


def pack_layer(weights: MintWeights, dtype: torch.dtype) -> Packed:
    """Pack a layer's weights for products of that dtype."""
    return pack_parts(*weights[:6], join_centres(weights), weights.t, dtype=dtype)


def pack_parts(
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    centres: Tensor,
    t: Tensor,
    *,
    dtype: torch.dtype,
) -> Packed:
    """The same, of weights whose centres are joined."""
    unit = centres_unit(centres, dtype)
    return Packed(
        pack(weight1, dtype),
        bias1.contiguous(),
        pack(weight2, dtype),
        bias2.contiguous(),
        pack(weight3, dtype),
        bias3.contiguous(),
        pack_centres(centres, dtype, unit),
        t.contiguous(),
        unit,
    )


def as_image(hidden: Tensor) -> Tensor:
    """A hidden layer (B, H, W, S) seen as (B, S, H, W)."""
    return hidden.permute(0, 3, 1, 2)


def new_hidden(x: Tensor, packed: Packed) -> Tensor:
    """An empty hidden layer (B, H, W, S)."""
    batch, _, height, width = x.shape
    shape = (batch, height, width, packed.weight2.shape[2])
    return x.new_empty(shape, dtype=packed.weight2.dtype)


def middle_tile(packed: Packed, colours: int, precision: str) -> configs.Tile:
    arch = configs.architecture(packed.t.device)
    operand = configs.operand(packed.weight2.dtype, precision)
    outputs, stride = packed.weight2.shape[1:]
    return configs.hidden_tile(arch, operand, colours, outputs // colours, stride)


def slots(units: int, colours: int, tile: int) -> int:
    """The most tiles that one colour's units lie in."""
    return max(((c + 1) * units - 1) // tile - c * units // tile + 1 for c in range(colours))


def run_hidden(
    x: Tensor,
    h1: Tensor,
    h2: Tensor,
    packed: Packed,
    structure: Structure,
    precision: str,
    running: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Launch the first two kernels of a layer: fill h1 and h2.

    Returns:
        The parts of the diagonal (slots, pixels, C).
    """
    batch, colours, height, width = x.shape
    order, triangle, activation = structure
    run_conv(
        as_image(h1), x, packed.weight1, packed.bias1, 1, colours, order, triangle, activation,
        precision, running,
    )  # fmt: skip
    outputs, stride = packed.weight2.shape[1:]
    units = outputs // colours
    tile = middle_tile(packed, colours, precision)
    pixels = batch * height * width
    numerics = launching.numerics(packed.weight2.dtype, precision)
    parts = x.new_empty(
        (slots(units, colours, tile.block_n), pixels, colours),
        dtype=launching.accumulator(packed.weight2.dtype),
    )
    residual, tolerance = (None, None) if running is None else running
    launching.launch(
        middle_kernel,
        (triton.cdiv(pixels, tile.block_m) * triton.cdiv(outputs, tile.block_n),),
        h2, parts, h1, packed.weight2, packed.bias2, packed.centres, packed.unit,
        residual, tolerance, batch, height, width, stride, units, colours,
        ACTIVATION=activation, SKIP=running is not None, KERNEL=kernel_size(packed.weight2),
        ORDER=order, TRIANGLE=triangle, **numerics, **launching.blocks(tile),
    )  # fmt: skip
    return parts


def _layer(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    centres: Tensor,
    t: Tensor,
    unit: Tensor | None,
    order: str,
    triangle: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    packed = Packed(weight1, bias1, weight2, bias2, weight3, bias3, centres, t, unit)
    structure = Structure(order, triangle, activation)
    precision = launching.default_precision()
    y, diagonal, _, h1, h2 = _layer_fake(x, *packed, *structure)
    parts = run_hidden(x, h1, h2, packed, structure, precision)
    log_det = run_output(y, diagonal, x, h2, parts, packed, structure, precision)
    return y, diagonal, log_det, h1, h2


def _layer_fake(
    x: Tensor, *packed_and_structure: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    packed = Packed(*packed_and_structure[:9])
    contiguous = torch.contiguous_format
    y = torch.empty_like(x, memory_format=contiguous)
    diagonal = torch.empty_like(x, dtype=packed.t.dtype, memory_format=contiguous)
    log_det = x.new_empty(len(x), dtype=packed.t.dtype)
    return y, diagonal, log_det, new_hidden(x, packed), new_hidden(x, packed)


def run_output(
    y: Tensor,
    diagonal: Tensor,
    x: Tensor,
    h2: Tensor,
    parts: Tensor,
    packed: Packed,
    structure: Structure,
    precision: str,
) -> Tensor:
    """Launch the last kernel of a layer: fill y and the diagonal.

    Returns:
        The log-determinants (B,).
    """
    batch, colours, height, width = x.shape
    outputs, stride = packed.weight2.shape[1:]
    tile = output_tile(packed.weight3, colours, height * width, precision)
    tiles = triton.cdiv(height * width, tile.block_m) * triton.cdiv(colours, tile.block_n)
    logs = diagonal.new_empty((batch, tiles))
    launching.launch(
        output_kernel,
        (batch * tiles,),
        y, diagonal, logs, x, h2, packed.weight3, packed.bias3, packed.t, parts,
        batch, height, width, x.stride(0), x.stride(2), x.stride(3), x.stride(1),
        stride, outputs // colours, colours,
        FORWARD=True, SLOTS=len(parts), TILE=middle_tile(packed, colours, precision).block_n,
        KERNEL=kernel_size(packed.weight3), ORDER=structure.order, TRIANGLE=structure.triangle,
        **launching.numerics(packed.weight3.dtype, precision), **launching.blocks(tile),
    )  # fmt: skip
    return logs.sum(1)


def output_tile(weight: Tensor, colours: int, area: int, precision: str) -> configs.Tile:
    arch = configs.architecture(weight.device)
    operand = configs.operand(weight.dtype, precision)
    return configs.output_tile(arch, operand, colours, area)


def _backward(
    x: Tensor,
    h1: Tensor,
    h2: Tensor,
    by_y: Tensor,
    by_diagonal: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    centres: Tensor,
    t: Tensor,
    order: str,
    triangle: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, colours, height, width = x.shape
    stride = h1.shape[3]
    outputs = weight2.shape[0]
    units = outputs // colours
    precision = launching.default_precision()
    dtype = h1.dtype
    back = opposite(triangle)
    numerics = launching.numerics(dtype, precision)
    by_x, by_a1, by_a2 = _backward_fake(x, h1)
    by_pixel = by_diagonal.permute(0, 2, 3, 1).contiguous()
    unit = centres_unit(centres, dtype)
    arch, operand = configs.architecture(x.device), configs.operand(dtype, precision)
    for by_a, incoming, weight, own, other, centre, units_in in (
        (by_a2, by_y, weight3, h2, h1, centres, 1),
        (by_a1, as_image(by_a2), weight2, h1, h2, centres.mT, units),
    ):
        packed = pack_transposed(weight, dtype)
        tile = configs.hidden_tile(arch, operand, colours, units, incoming.shape[1])
        own_tile = configs.hidden_tile(arch, operand, colours, units, stride)
        pixels = batch * height * width
        launching.launch(
            hidden_gradient_kernel,
            (triton.cdiv(pixels, tile.block_m) * triton.cdiv(outputs, tile.block_n),),
            by_a, incoming, packed, own, other, pack_centres(centre, dtype, unit), unit, by_pixel,
            batch, height, width,
            incoming.stride(0), incoming.stride(2), incoming.stride(3), incoming.stride(1),
            incoming.shape[1], packed.shape[2], stride, units_in, units, colours,
            ACTIVATION=activation, KERNEL=kernel_size(packed), ORDER=order, TRIANGLE=back,
            BLOCK_OWN=own_tile.block_k, **numerics, **launching.blocks(tile),
        )  # fmt: skip
    packed = pack_transposed(weight1, dtype)
    tile = output_tile(packed, colours, height * width, precision)
    tiles = triton.cdiv(height * width, tile.block_m) * triton.cdiv(colours, tile.block_n)
    launching.launch(
        output_kernel,
        (batch * tiles,),
        by_x, None, None, by_y, by_a1, packed, None, t, None, batch, height, width,
        by_y.stride(0), by_y.stride(2), by_y.stride(3), by_y.stride(1), stride, units, colours,
        FORWARD=False, SLOTS=0, TILE=0, KERNEL=kernel_size(packed), ORDER=order, TRIANGLE=back,
        **numerics, **launching.blocks(tile),
    )  # fmt: skip
    return by_x, by_a1, by_a2


def _backward_fake(x: Tensor, h1: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    by_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return by_x, torch.empty_like(h1), torch.empty_like(h1)


def _weight_gradients(
    x: Tensor,
    h1: Tensor,
    h2: Tensor,
    by_y: Tensor,
    by_a1: Tensor,
    by_a2: Tensor,
    by_diagonal: Tensor,
    units: int,
    kernels: list[int],
    order: str,
    triangle: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    colours, dtype = x.shape[1], h1.dtype
    precision = launching.default_precision()
    image1, image2 = as_image(h1), as_image(h2)
    gradients = [
        run_weight_gradient(
            gradient, inputs, None, units_out, units_in, colours, kernel, order, triangle, "none",
            dtype, precision,
        ).contiguous()
        for gradient, inputs, units_out, units_in, kernel in (
            (as_image(by_a1), x, units, 1, kernels[0]),
            (as_image(by_a2), image1, units, units, kernels[1]),
            (by_y, image2, 1, units, kernels[2]),
        )
    ]  # fmt: skip
    by_pixel = by_diagonal.permute(0, 2, 3, 1).contiguous()
    joined = run_weight_gradient(
        image2, image1, by_pixel, units, units, colours, 1, "own", triangle, activation, dtype,
        precision,
    )  # fmt: skip
    blocks = joined.reshape(colours, units, colours, units)
    centres = torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    return gradients[0], gradients[1], gradients[2], centres


def _weight_gradients_fake(
    x: Tensor, h1: Tensor, h2: Tensor, by_y: Tensor, by_a1: Tensor, by_a2: Tensor,
    by_diagonal: Tensor, units: int, kernels: list[int], *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    colours = x.shape[1]
    hidden, dtype = units * colours, launching.accumulator(h1.dtype)
    shapes = (
        (hidden, colours, kernels[0], kernels[0]),
        (hidden, hidden, kernels[1], kernels[1]),
        (colours, hidden, kernels[2], kernels[2]),
        (colours, units, units),
    )
    first, second, third, centres = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return first, second, third, centres


layer_op = register(
    "mint_layer(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
    "Tensor weight3, Tensor bias3, Tensor centres, Tensor t, Tensor? unit, str order, "
    "str triangle, str activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer,
    _layer_fake,
)
backward_op = register(
    "mint_layer_backward(Tensor x, Tensor h1, Tensor h2, Tensor by_y, Tensor by_diagonal, "
    "Tensor weight1, Tensor weight2, Tensor weight3, Tensor centres, Tensor t, str order, "
    "str triangle, str activation) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
weight_gradients_op = register(
    "mint_layer_weight_gradients(Tensor x, Tensor h1, Tensor h2, Tensor by_y, Tensor by_a1, "
    "Tensor by_a2, Tensor by_diagonal, int units, int[] kernels, str order, str triangle, "
    "str activation) -> (Tensor, Tensor, Tensor, Tensor)",
    _weight_gradients,
    _weight_gradients_fake,
)


class _MintLayer(torch.autograd.Function):
    """Saves x, the diagonal, h1 and h2, or x alone; all else of backward is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        weight3: Tensor,
        bias3: Tensor,
        centres: Tensor,
        t: Tensor,
        order: str,
        triangle: str,
        activation: str,
        recompute: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = (weight1, bias1, weight2, bias2, weight3, bias3, centres, t)
        ctx.structure = (order, triangle, activation)
        ctx.dtype, ctx.recompute = compute_dtype(weight2), recompute
        packed = pack_parts(*parts, dtype=ctx.dtype)
        y, diagonal, log_det, h1, h2 = layer_op(x, *packed, *ctx.structure)
        ctx.save_for_backward(x, *parts, *(() if recompute else (diagonal, h1, h2)))
        return y, diagonal, log_det

    @staticmethod
    @only_once
    def backward(
        ctx: Any,
        saved: tuple[Tensor, ...],
        by_y: Tensor,
        by_diagonal: Tensor,
        by_log_det: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, parts, kept = saved[0], saved[1:9], saved[9:]
        weight1, bias1, weight2, _, weight3, _, centres, t = parts
        if ctx.recompute:
            packed = pack_parts(*parts, dtype=ctx.dtype)
            _, diagonal, _, h1, h2 = layer_op(x, *packed, *ctx.structure)
        else:
            diagonal, h1, h2 = kept
        # log_det is the sum of the diagonal's logarithms.
        by_diagonal = by_diagonal + by_log_det.view(-1, 1, 1, 1) / diagonal
        by_x, by_a1, by_a2 = backward_op(
            x, h1, h2, by_y, by_diagonal, weight1, weight2, weight3, centres, t.contiguous(),
            *ctx.structure,
        )  # fmt: skip
        gradients: list[Tensor | None] = [by_x] + [None] * 8
        if any(ctx.needs_input_grad[1:8]):
            by_weights = weight_gradients_op(
                x, h1, h2, by_y, by_a1, by_a2, by_diagonal, centres.shape[-1],
                [weight.shape[-1] for weight in (weight1, weight2, weight3)], *ctx.structure,
            )  # fmt: skip
            total = t.dtype
            hidden = len(bias1)
            gradients[1:8] = [
                by_weights[0],
                by_a1.sum((0, 1, 2), dtype=total)[:hidden],
                by_weights[1],
                by_a2.sum((0, 1, 2), dtype=total)[:hidden],
                by_weights[2],
                by_y.sum((0, 2, 3), dtype=total),
                by_weights[3],
            ]
        if ctx.needs_input_grad[8]:
            gradients[8] = (by_y * x.to(t.dtype) + by_diagonal).sum(0)
        return (*gradients, None, None, None, None)


def packed_forward(
    x: Tensor, packed: Packed, structure: Structure
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mint_forward`, of weights that are packed already, and without gradients."""
    y, diagonal, log_det, _, _ = layer_op(x, *packed, *structure)
    return y, diagonal, log_det


def mint_forward(
    x: Tensor, weights: MintWeights, structure: Structure, recompute: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mintnet_triton.kernels.reference.mint_forward`, by the kernels of this room.

    Under autocast the products are of its dtype; the diagonal, its logarithm and ``t x`` are never
    below float32. Once differentiable.

    Args:
        recompute: keep x alone for the backward pass, and compute the hidden layers again there.

    Returns:
        y (B, C, H, W) in the dtype of x; the diagonal (B, C, H, W) and log_det (B,) in that of t.
    """
    results = _MintLayer.apply(
        x, weights.weight1, weights.bias1, weights.weight2, weights.bias2, weights.weight3,
        weights.bias3, join_centres(weights), weights.t, *structure, recompute,
    )  # fmt: skip
    return cast(tuple[Tensor, Tensor, Tensor], results)
