"""Weights as the kernels read them, by one launch.

Packed weights have a row of inputs for each tap and output, padded as canvases are; where inputs go
by columns, one row for all taps. What the mask hides is zero, whatever the parameter holds there;
the centre weights of the middle convolution take the sign of the outer ones
(:meth:`.mint.MintLayer.effective_weights`); t is made positive. All this changes nothing in weights
that are masked and corrected already, so that both kinds may come.

The centres join the hidden units of a colour at one pixel: row i holds ``D2_ij D1_j``, in a unit of
its own, a power of two, so that no product is too small for float16; the ends hold ``D3_i`` in that
unit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mintnet_triton.kernels.gpu import launching
from mintnet_triton.kernels.gpu.canvas import by_columns, padded, rounded, unit_below
from mintnet_triton.kernels.reference import Structure, Weights

#: elements, and hidden units, that a program packs
ELEMENTS, UNITS = 1024, 4
LEAST_T = tl.constexpr(1e-12)


class Packed(NamedTuple):
    """The weights of a layer as its kernels read them; S is C*K padded, S1 that of the inputs."""

    weight1: Tensor  # (k1 * k1 or 1, C*K, S1)
    weight2: Tensor  # (k2 * k2, C*K, S)
    weight3: Tensor  # (k3 * k3, C, S)
    centres: Tensor  # (C*K, S)
    ends: Tensor  # (C*K,), at least float32
    t: Tensor  # (C, H, W), at least float32
    #: of the transposed layer, beside those of the layer itself
    turned_centres: Tensor | None = None
    turned_ends: Tensor | None = None
    largest: Tensor | None = None  # (), zero


@triton.jit
def is_seen(output, input, tap, TAPS: tl.constexpr, ORDER: tl.constexpr, TRIANGLE: tl.constexpr):
    """Whether an output colour sees an input colour at that tap."""
    CENTRE: tl.constexpr = TAPS // 2
    before = (input < output) if TRIANGLE == "lower" else (input > output)
    causal = (tap < CENTRE) if TRIANGLE == "lower" else (tap > CENTRE)
    if ORDER == "pixel":
        return causal | ((tap == CENTRE) & (before | (input == output)))
    return before | ((input == output) & (causal | (tap == CENTRE)))


@triton.jit
def sign(x):
    """-1, 0 or 1; NaN of NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def centre1(weights, hidden, units, colours, TAPS: tl.constexpr, mask):
    """D1 of hidden units."""
    at = (hidden * colours + hidden // units) * TAPS + TAPS // 2
    return tl.load(weights.weight1 + at, mask=mask, other=0.0)


@triton.jit
def centre3(weights, hidden, units, colours, TAPS: tl.constexpr, mask):
    """D3 of hidden units."""
    at = (hidden // units * units * colours + hidden) * TAPS + TAPS // 2
    return tl.load(weights.weight3 + at, mask=mask, other=0.0)


@triton.jit
def corrected(weights, i, j, w, units, colours, KERNELS: tl.constexpr, mask):
    """The sign by which centre weights w of the middle convolution, from j to i, are multiplied."""
    d1 = centre1(weights, j, units, colours, KERNELS[0] * KERNELS[0], mask)
    d3 = centre3(weights, i, units, colours, KERNELS[2] * KERNELS[2], mask)
    return sign(d1) * sign(d3) * sign(w)


@triton.jit
def entry(
    e, units_out, units_in, colours, KERNEL: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Output, input and tap of elements e of packed weights; which are not padding; how many."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    rows, inputs = units_out * colours, units_in * colours
    if TRANSPOSED:
        rows, inputs = inputs, rows
    if COLUMNS:
        stride = padded(inputs * TAPS)
        n, k, tap = e // stride, e % stride // TAPS, e % stride % TAPS
        held = (n < rows) & (k < inputs)
        size = rows * stride
    else:
        stride = padded(inputs)
        n, k, tap = e // stride % rows, e % stride, e // stride // rows
        held = (tap < TAPS) & (k < inputs)
        size = TAPS * rows * stride
    if TRANSPOSED:
        n, k, tap = k, n, TAPS - 1 - tap
    return n, k, tap, held, size


@triton.jit
def pack_conv(
    out, weight, e, units_out, units_in, colours, KERNEL: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr, ORDER: tl.constexpr, TRIANGLE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Elements e of the packed weights of one convolution, or of its transpose."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    o, i, tap, held, size = entry(e, units_out, units_in, colours, KERNEL, COLUMNS, TRANSPOSED)
    held &= is_seen(o // units_out, i // units_in, tap, TAPS, ORDER, TRIANGLE)
    at = (o * (units_in * colours) + i) * TAPS + tap
    w = tl.load(weight + at, mask=held, other=0.0).to(out.dtype.element_ty)
    tl.store(out + e, rounded(w, TF32), mask=e < size)


@triton.jit
def pack_middle(
    out, weights, e, units, colours, KERNELS: tl.constexpr, TRANSPOSED: tl.constexpr,
    ORDER: tl.constexpr, TRIANGLE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """The same of a layer's middle convolution, whose centres are corrected."""
    TAPS: tl.constexpr = KERNELS[1] * KERNELS[1]
    o, i, tap, held, size = entry(e, units, units, colours, KERNELS[1], False, TRANSPOSED)
    held &= is_seen(o // units, i // units, tap, TAPS, ORDER, TRIANGLE)
    w = tl.load(weights.weight2 + (o * (units * colours) + i) * TAPS + tap, mask=held, other=0.0)
    joins = held & (tap == TAPS // 2) & (o // units == i // units)
    w *= tl.where(joins, corrected(weights, o, i, w, units, colours, KERNELS, joins), 1.0)
    tl.store(out + e, rounded(w.to(out.dtype.element_ty), TF32), mask=e < size)


@triton.jit
def pack_conv_kernel(
    out, weight, units_out, units_in, colours, KERNEL: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr, ORDER: tl.constexpr, TRIANGLE: tl.constexpr, TF32: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The packed weights of a convolution by itself."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pack_conv(
        out, weight, e, units_out, units_in, colours, KERNEL, COLUMNS, TRANSPOSED, ORDER, TRIANGLE,
        TF32,
    )  # fmt: skip


@triton.jit
def pack_centres(
    centres, ends, weights, n, units, colours, KERNELS: tl.constexpr, TRANSPOSED: tl.constexpr,
    TF32: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows n of the centres, and their ends."""
    F: tl.constexpr = ends.dtype.element_ty
    TAPS: tl.constexpr = KERNELS[1] * KERNELS[1]
    hidden = units * colours
    stride = padded(hidden)
    own = n < hidden
    largest = tl.zeros(n.shape, F)
    unit = tl.full(n.shape, 1.0, F)
    # Twice: to find the largest of each row, and to write it.
    for write in tl.static_range(2):
        for start in range(0, stride, WIDTH):
            k = start + tl.arange(0, WIDTH)
            joins = own[:, None] & (k < hidden)[None, :] & ((n // units)[:, None] == (k // units))
            i, j = n[:, None] + 0 * k[None, :], k[None, :] + 0 * n[:, None]
            if TRANSPOSED:
                i, j = j, i
            at = (i * hidden + j) * TAPS + TAPS // 2
            w = tl.load(weights.weight2 + at, mask=joins, other=0.0)
            w *= corrected(weights, i, j, w, units, colours, KERNELS, joins)
            if TRANSPOSED:
                d = centre3(weights, i, units, colours, KERNELS[2] * KERNELS[2], joins)
            else:
                d = centre1(weights, j, units, colours, KERNELS[0] * KERNELS[0], joins)
            value = w.to(F) * d.to(F)
            if write == 0:
                largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
            else:
                value = (value / unit[:, None]).to(centres.dtype.element_ty)
                at = n[:, None] * stride + k[None, :]
                mask = own[:, None] & (k < stride)[None, :]
                tl.store(centres + at, rounded(value, TF32), mask=mask)
        if centres.dtype.element_ty == tl.float16:
            unit = unit_below(tl.where(largest < float("inf"), largest, 0.0))
    if TRANSPOSED:
        end = centre1(weights, n, units, colours, KERNELS[0] * KERNELS[0], own)
    else:
        end = centre3(weights, n, units, colours, KERNELS[2] * KERNELS[2], own)
    tl.store(ends + n, end.to(F) * unit, mask=own)


@triton.jit
def pack_kernel(
    packed, weights, units, colours, pixels, KERNELS: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr, ORDER: tl.constexpr, TRIANGLE: tl.constexpr, TF32: tl.constexpr,
    ENDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All of :class:`Packed`: some programs for the centres, some for the middle convolution, and
    some for all else."""
    program, role = tl.program_id(0), tl.program_id(1)
    n = program * ENDS + tl.arange(0, ENDS)
    e = program * BLOCK + tl.arange(0, BLOCK)
    if role == 0:
        if program * ENDS >= units * colours:
            return
        pack_centres(
            packed.centres, packed.ends, weights, n, units, colours, KERNELS, False, TF32, WIDTH
        )
        if TRANSPOSED:
            pack_centres(
                packed.turned_centres, packed.turned_ends, weights, n, units, colours, KERNELS,
                True, TF32, WIDTH,
            )  # fmt: skip
            if program == 0:
                tl.store(packed.largest, 0.0)
    elif role == 1:
        pack_middle(
            packed.weight2, weights, e, units, colours, KERNELS, TRANSPOSED, ORDER, TRIANGLE, TF32
        )
    else:
        pack_conv(
            packed.weight1, weights.weight1, e, units, 1, colours, KERNELS[0],
            COLUMNS and not TRANSPOSED, TRANSPOSED, ORDER, TRIANGLE, TF32,
        )  # fmt: skip
        pack_conv(
            packed.weight3, weights.weight3, e, 1, units, colours, KERNELS[2],
            COLUMNS and TRANSPOSED, TRANSPOSED, ORDER, TRIANGLE, TF32,
        )  # fmt: skip
        t = tl.abs(tl.load(weights.t + e, mask=e < colours * pixels, other=1.0))
        t = t.to(packed.t.dtype.element_ty)
        t = tl.where(t < LEAST_T, tl.full((BLOCK,), LEAST_T, t.dtype), t)  # which keeps NaN
        tl.store(packed.t + e, t, mask=e < colours * pixels)


def empty_packed(weights: Weights, dtype: torch.dtype, transposed: bool) -> Packed:
    """Packed weights of a layer, or of its transpose, without values."""
    colours, hidden = weights.t.shape[0], weights.weight1.shape[0]
    total = launching.accumulator(dtype)
    #: those whose inputs go by columns
    first = (2 if transposed else 0) if by_columns(colours) else None

    def empty(number: int, rows: int, inputs: int) -> Tensor:
        taps = weights.kernels[number] ** 2
        shape = (1, rows, inputs * taps) if number == first else (taps, rows, inputs)
        shape = (*shape[:2], launching.padded(shape[2]))
        return weights.t.new_empty(shape, dtype=dtype)

    def centres() -> tuple[Tensor, Tensor]:
        square = weights.t.new_empty((hidden, launching.padded(hidden)), dtype=dtype)
        return square, weights.t.new_empty((hidden,), dtype=total)

    outer, inner = (colours, hidden) if transposed else (hidden, colours)
    return Packed(
        empty(0, outer, inner), empty(1, hidden, hidden), empty(2, inner, outer),
        *centres(), weights.t.new_empty(weights.t.shape, dtype=total),
        *((*centres(), weights.t.new_empty((), dtype=total)) if transposed else ()),
    )  # fmt: skip


def pack(
    weights: Weights, structure: Structure, dtype: torch.dtype, precision: str, transposed: bool
) -> Packed:
    """Pack the weights of a layer, or of its transpose, for products of that dtype."""
    colours, height, width = weights.t.shape
    hidden = len(weights.weight1)
    packed = empty_packed(weights, dtype, transposed)
    most = max(
        packed.weight1.numel(), packed.weight2.numel(), packed.weight3.numel(), weights.t.numel()
    )
    launching.launch(
        pack_kernel,
        (max(triton.cdiv(hidden, UNITS), triton.cdiv(most, ELEMENTS)), 3),
        packed, weights, hidden // colours, colours, height * width,
        KERNELS=weights.kernels, COLUMNS=by_columns(colours), TRANSPOSED=transposed,
        ORDER=structure.order, TRIANGLE=structure.triangle,
        TF32=dtype == torch.float32 and precision == "tf32", ENDS=UNITS, WIDTH=64, BLOCK=ELEMENTS,
        num_warps=4,
    )  # fmt: skip
    return packed


def pack_alone(
    weight: Tensor, colours: int, ordering: tuple[str, str], dtype: torch.dtype, precision: str,
    transposed: bool, columns: bool | None = None,
) -> Tensor:  # fmt: skip
    """Packed weights of a convolution by itself, (outputs, inputs, k, k), or of its transpose.

    Args:
        columns: whether inputs go by columns; by default, where they are few.
    """
    outputs, inputs, kernel, _ = weight.shape
    rows, width = (inputs, outputs) if transposed else (outputs, inputs)
    columns, taps = by_columns(width) if columns is None else columns, kernel**2
    stride = launching.padded(width * taps if columns else width)
    packed = weight.new_empty((1 if columns else taps, rows, stride), dtype=dtype)
    launching.launch(
        pack_conv_kernel, (triton.cdiv(packed.numel(), ELEMENTS),),
        packed, weight, outputs // colours, inputs // colours, colours,
        KERNEL=kernel, COLUMNS=columns, TRANSPOSED=transposed, ORDER=ordering[0],
        TRIANGLE=ordering[1], TF32=dtype == torch.float32 and precision == "tf32", BLOCK=ELEMENTS,
        num_warps=4,
    )  # fmt: skip
    return packed
