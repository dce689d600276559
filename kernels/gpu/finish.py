"""The gradients by a layer's parameters from their parts, by one launch.

Parts are sums over some of the positions; here they are added up, in order, so that runs agree to
the bit. What the mask hides receives zero; what was corrected on the way to the kernels
(:mod:`.weights`), its derivative.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.gpu import launching
from mintnet_triton.kernels.gpu.canvas import Image, by_columns, given, padded, unit_below
from mintnet_triton.kernels.gpu.weights import (
    ELEMENTS,
    LEAST_T,
    UNITS,
    centre1,
    centre3,
    corrected,
    is_seen,
    sign,
)
from mintnet_triton.kernels.reference import Structure, Weights


class Parts(NamedTuple):
    """What the gradient kernels leave: sums over parts of the batch, to be added up in order."""

    first: Tensor  # (splits, k1 * k1 or 1, C*K, S1), gradient by weight1
    middle: Tensor  # (splits, k2 * k2 + 1, C*K, S), by weight2, and products of slopes
    last: Tensor  # (splits, k3 * k3 or 1, C*K, S1), by weight3, hidden units first, taps turned
    bias1: Tensor  # (tiles, C*K)
    bias2: Tensor  # (tiles, C*K)
    bias3: Tensor  # (tiles, C)
    by_diagonal: Tensor  # a canvas of colours
    unit: Tensor | None  # (), of the products of slopes


class Counts(NamedTuple):
    """How many parts there are of each."""

    first: int
    middle: int
    last: int
    bias1: int
    bias2: int
    bias3: int


@triton.jit
def add_parts(parts, at, step, count, mask):
    """The sum of ``parts[at]`` over parts that are ``step`` apart."""
    total = tl.load(parts + at, mask=mask, other=0.0)
    for part in range(1, count):
        total += tl.load(parts + tl.cast(part, tl.int64) * step + at, mask=mask, other=0.0)
    return total


@triton.jit
def finish_outer(
    out, weights, parts, count, ends, n, units, colours, KERNEL: tl.constexpr,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr, ORDER: tl.constexpr, TRIANGLE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient by the outer weights of hidden units n, to which that by their ends is added."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    hidden = units * colours
    stride = padded(colours * TAPS) if COLUMNS else padded(colours)
    taps = 1 if COLUMNS else TAPS
    for start in range(0, colours * TAPS, WIDTH):
        e = start + tl.arange(0, WIDTH)
        c, tap = e // TAPS, e % TAPS
        mask = (n < hidden)[:, None] & (c < colours)[None, :]
        turned = tap if FIRST else TAPS - 1 - tap
        column = c * TAPS + turned if COLUMNS else turned * hidden * stride + c
        total = add_parts(
            parts, n[:, None] * stride + column[None, :], taps * hidden * stride, count, mask
        )
        own = (n // units)[:, None] + 0 * c[None, :]
        c = c[None, :] + 0 * own
        tap = tap[None, :] + 0 * own
        if FIRST:
            seen = is_seen(own, c, tap, TAPS, ORDER, TRIANGLE)
            at = (n[:, None] * colours + c) * TAPS + tap
        else:
            seen = is_seen(c, own, tap, TAPS, ORDER, TRIANGLE)
            at = (c * hidden + n[:, None]) * TAPS + tap
        total += tl.where((own == c) & (tap == TAPS // 2), ends[:, None], 0.0)
        total = tl.where(seen, total, 0.0)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish_kernel(
    gradients, weights, parts, counts, x, by_y, scale, samples, canvas, units, colours,
    KERNELS: tl.constexpr, COLUMNS: tl.constexpr, ORDER: tl.constexpr, TRIANGLE: tl.constexpr,
    ENDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients by a layer's parameters, from their parts.

    With Q the products of the slopes of two hidden units, scaled by the gradient by the diagonal,
    the diagonal gives ``D3_i D1_j Q_ij`` to ``D2_ij``, ``sum_i D3_i D2_ij Q_ij`` to ``D1_j`` and
    ``sum_j D2_ij D1_j Q_ij`` to ``D3_i``.
    """
    F: tl.constexpr = parts.middle.dtype.element_ty
    TAPS: tl.constexpr = KERNELS[1] * KERNELS[1]
    TAPS1: tl.constexpr = KERNELS[0] * KERNELS[0]
    TAPS3: tl.constexpr = KERNELS[2] * KERNELS[2]
    hidden = units * colours
    stride = padded(hidden)
    step = (TAPS + 1) * hidden * stride
    slopes = TAPS * hidden * stride
    unit = unit_below(tl.load(parts.unit))
    role = tl.program_id(1)
    if role == 0:
        if tl.program_id(0) * ENDS >= hidden:
            return
        n = tl.program_id(0) * ENDS + tl.arange(0, ENDS)
        own = n < hidden
        by_end1 = tl.zeros((ENDS, WIDTH), F)
        by_end3 = tl.zeros((ENDS, WIDTH), F)
        for start in range(0, units, WIDTH):
            u = start + tl.arange(0, WIDTH)
            mask = own[:, None] & (u < units)[None, :]
            other = (n // units * units)[:, None] + u[None, :]
            one = n[:, None] + 0 * other
            # As the first of two units, and as the second.
            w = tl.load(
                weights.weight2 + (other * hidden + one) * TAPS + TAPS // 2, mask=mask, other=0.0
            )
            w *= corrected(weights, other, one, w, units, colours, KERNELS, mask)
            w = w.to(F) * centre3(weights, other, units, colours, TAPS3, mask).to(F)
            q = add_parts(parts.middle, slopes + other * stride + one, step, counts.middle, mask)
            by_end1 += w * q
            w = tl.load(
                weights.weight2 + (one * hidden + other) * TAPS + TAPS // 2, mask=mask, other=0.0
            )
            w *= corrected(weights, one, other, w, units, colours, KERNELS, mask)
            w = w.to(F) * centre1(weights, other, units, colours, TAPS1, mask).to(F)
            q = add_parts(parts.middle, slopes + one * stride + other, step, counts.middle, mask)
            by_end3 += w * q
        # Summed here: of products that become one multiply-add with the sum, threads that hold the
        # same sum would round it differently.
        by_end1, by_end3 = unit * tl.sum(by_end1, 1), unit * tl.sum(by_end3, 1)
        finish_outer(
            gradients.weight1, weights, parts.first, counts.first, by_end1, n, units,
            colours, KERNELS[0], COLUMNS, True, ORDER, TRIANGLE, WIDTH,
        )  # fmt: skip
        finish_outer(
            gradients.weight3, weights, parts.last, counts.last, by_end3, n, units, colours,
            KERNELS[2], COLUMNS, False, ORDER, TRIANGLE, WIDTH,
        )  # fmt: skip
        if gradients.bias1 is not None:
            total = add_parts(parts.bias1, n, hidden, counts.bias1, own)
            tl.store(gradients.bias1 + n, total.to(gradients.bias1.dtype.element_ty), mask=own)
        if gradients.bias2 is not None:
            total = add_parts(parts.bias2, n, hidden, counts.bias2, own)
            tl.store(gradients.bias2 + n, total.to(gradients.bias2.dtype.element_ty), mask=own)
        return
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if role == 1:
        o, i, tap = e // TAPS // hidden, e // TAPS % hidden, e % TAPS
        mask = o < hidden
        seen = mask & is_seen(o // units, i // units, tap, TAPS, ORDER, TRIANGLE)
        at = (tap * hidden + o) * stride + i
        total = add_parts(parts.middle, at, step, counts.middle, seen)
        joins = mask & (tap == TAPS // 2) & (o // units == i // units)
        w = tl.load(weights.weight2 + e, mask=joins, other=0.0)
        d1 = centre1(weights, i, units, colours, TAPS1, joins).to(F)
        d3 = centre3(weights, o, units, colours, TAPS3, joins).to(F)
        at = slopes + o * stride + i
        total += unit * d1 * d3 * add_parts(parts.middle, at, step, counts.middle, joins)
        total *= tl.where(joins, corrected(weights, o, i, w, units, colours, KERNELS, joins), 1.0)
        tl.store(gradients.weight2 + e, total.to(gradients.weight2.dtype.element_ty), mask=mask)
    if role == 2:
        area = canvas.height * canvas.width
        if tl.program_id(0) * BLOCK >= colours * area:
            return
        mask = e < colours * area
        c, row, column = e // area, e % area // canvas.width, e % canvas.width
        pitch = canvas.width + canvas.radius
        p = canvas.radius * (pitch + 1) + row * pitch + column
        total = tl.zeros((BLOCK,), F)
        for number in range(samples):
            sample = tl.cast(number, tl.int64)
            at = (p + sample * (canvas.height + canvas.radius) * pitch) * colours + c
            by_diagonal = tl.load(parts.by_diagonal + at, mask=mask, other=0.0)
            if scale is not None:
                at = sample * scale.sample + c.to(tl.int64) * scale.channel
                at += row.to(tl.int64) * scale.row + column.to(tl.int64) * scale.column
                factor = tl.load(scale.data + at, mask=mask, other=0.0).to(F)
                by_diagonal *= factor
            total += by_diagonal
            if by_y.data is not None:
                at = sample * by_y.sample + c.to(tl.int64) * by_y.channel
                at += row.to(tl.int64) * by_y.row + column.to(tl.int64) * by_y.column
                g = tl.load(by_y.data + at, mask=mask, other=0.0).to(F)
                if scale is not None:
                    g *= factor
                at = sample * x.sample + c.to(tl.int64) * x.channel
                at += row.to(tl.int64) * x.row + column.to(tl.int64) * x.column
                total += g * tl.load(x.data + at, mask=mask, other=0.0).to(F)
        # |t|, and no less than the least.
        t = tl.load(weights.t + e, mask=mask, other=1.0)
        total = tl.where(tl.abs(t) < LEAST_T, 0.0, total * sign(t))
        tl.store(gradients.t + e, total.to(gradients.t.dtype.element_ty), mask=mask)
        if gradients.bias3 is not None:
            total = add_parts(parts.bias3, e, colours, counts.bias3, e < colours)
            total = total.to(gradients.bias3.dtype.element_ty)
            tl.store(gradients.bias3 + e, total, mask=e < colours)


def finish(
    weights: Weights, parts: Parts, x: Tensor, by_y: Tensor | None, canvas: Canvas,
    structure: Structure, scale: Tensor | None,
) -> Weights:  # fmt: skip
    """Gradients by the weights, each in its dtype."""
    colours = len(weights.t)
    gradients = Weights.of(None if one is None else torch.empty_like(one) for one in weights)
    hidden = len(weights.weight1)
    most = max(weights.weight2.numel(), weights.t.numel())
    counts = Counts(*(len(part) for part in (*parts[:3], parts.bias1, parts.bias2, parts.bias3)))
    launching.launch(
        finish_kernel,
        (max(triton.cdiv(hidden, UNITS), triton.cdiv(most, ELEMENTS)), 3),
        gradients, weights, parts, counts, Image.of(x), Image.of(by_y), given(scale, x),
        len(x), canvas,
        hidden // colours, colours,
        KERNELS=weights.kernels, COLUMNS=by_columns(colours), ORDER=structure.order,
        TRIANGLE=structure.triangle, ENDS=UNITS, WIDTH=64, BLOCK=ELEMENTS, num_warps=4,
    )  # fmt: skip
    return gradients
