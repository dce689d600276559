"""Canvases on a GPU (see :mod:`.canvas`): one row of channels for each position.

A canvas is one array (positions, S), S channels padded to a multiple of 16. So a tap of a kernel is
one offset, ``(dy * pitch + dx) * S``: inner loops know neither borders nor strides of images, and
every row begins where 16 bytes can be loaded at once.

Kernels compute the pixels of all images in one line, without the rows between images, and call
them *places*: place q is position ``q + sample * radius * pitch`` of a canvas. The columns between
rows are among them, so that a tile of places reads consecutive positions. Whoever writes a canvas
writes its zeros, too.

What has few channels is not worth a product for each tap, padded to 16 channels. It goes by
*columns* (im2col): a canvas whose channels are ``c * k * k + tap``, what all taps of a k x k kernel
see of colour c, so that a convolution becomes one product.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mintnet_triton.kernels.canvas import Canvas

#: fewer channels than this go by columns
COLUMNS_BELOW = 16
#: zeros after all else, so that a sum over positions may end with a whole block of so many
TAIL = 64
ZEROS = tl.constexpr(TAIL)


class Image(NamedTuple):
    """A tensor (B, C, H, W) of any strides, or none, as kernels take it."""

    data: Tensor | None
    sample: int = 0
    channel: int = 0
    row: int = 0
    column: int = 0

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Image":
        return cls(None) if tensor is None else cls(tensor, *tensor.stride())


def given(values: Tensor | None, like: Tensor) -> Image | None:
    """A part of a :class:`.Condition` for each pixel of images like that, without copies."""
    if values is None:
        return None
    return Image.of(values.expand(len(like), -1, *like.shape[2:]))


def by_columns(channels: int) -> bool:
    """Whether so many channels go by columns."""
    return channels < COLUMNS_BELOW


def new_canvas(
    like: Tensor, canvas: Canvas, samples: int, channels: int, dtype: torch.dtype
) -> Tensor:
    """An empty canvas (positions, channels)."""
    return like.new_empty((canvas.positions(samples) + TAIL, channels), dtype=dtype)


@triton.jit
def padded(channels):
    """The stride of a row of so many channels."""
    return tl.cdiv(channels, 16) * 16


@triton.jit
def locate(place, canvas):
    """Sample, row and column of places; columns from the width on are between images."""
    pitch = canvas.width + canvas.radius
    line = place // pitch
    return line // canvas.height, line % canvas.height, place % pitch


@triton.jit
def position(place, sample, canvas):
    """Where places are in a canvas, the guard before it included; int64."""
    pitch = canvas.width + canvas.radius
    gap = canvas.radius * pitch
    return (place + sample * gap + gap + canvas.radius).to(tl.int64)


@triton.jit
def load_given(image, sample, row, column, n, mask, other):
    """Channels n of an :class:`Image` at some pixels."""
    at = sample.to(tl.int64) * image.sample + row.to(tl.int64) * image.row + column * image.column
    at = at[:, None] + n[None, :].to(tl.int64) * image.channel
    return tl.load(image.data + at, mask=mask, other=other)


@triton.jit
def store_rows(out, value, place, last, samples, canvas, n, stride):
    """Write channels n of places up to ``last``, and the zeros that lie beside them.

    Zeros between rows are among the places; below an image, those of its last row write them;
    before and after all images, the first tile does.
    """
    pitch = canvas.width + canvas.radius
    guard = canvas.radius * (pitch + 1)
    sample, row, column = locate(place, canvas)
    inside = (place <= last) & (column < canvas.width)
    held = (n < stride)[None, :]
    rows = position(place, sample, canvas) * stride
    value = tl.where(inside[:, None], value, 0.0).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] + n[None, :], value, mask=(place <= last)[:, None] & held)
    zero = tl.zeros(value.shape, out.dtype.element_ty)
    below = (place <= last) & (row == canvas.height - 1)
    if tl.max(below.to(tl.int32), 0) > 0:
        for i in range(1, canvas.radius + 1):
            beneath = rows + tl.cast(i * pitch, tl.int64) * stride
            tl.store(out + beneath[:, None] + n[None, :], zero, mask=below[:, None] & held)
    if tl.min(place, 0) == 0:
        end = samples * (canvas.height + canvas.radius) * pitch
        lanes = tl.arange(0, value.shape[0])
        for start in range(0, 2 * guard + ZEROS, value.shape[0]):
            i = start + lanes
            at = tl.where(i < guard, i, i + end).to(tl.int64) * stride
            tl.store(
                out + at[:, None] + n[None, :], zero, mask=(i < 2 * guard + ZEROS)[:, None] & held
            )


@triton.jit
def rounded(value, TF32: tl.constexpr):
    """The nearest TensorFloat-32, where a matrix unit would cut the rest off."""
    if TF32:
        bits = value.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)  # NaN may be all ones
    return value


@triton.jit
def unit_below(largest):
    """A power of two in which a finite number is nearly the largest float16; 1 in float64."""
    if largest.dtype == tl.float64:
        unit = largest * 0 + 1
    else:
        bits = tl.maximum(largest, 2e-30).to(tl.int32, bitcast=True) & 0x7F800000  # of zero, too
        unit = bits.to(tl.float32, bitcast=True) * 2.0**-14
    return unit


@triton.jit
def fill_columns(
    out, image, place, samples, canvas, channels, KERNEL: tl.constexpr, TF32: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write what KERNEL x KERNEL taps see of an image; a kernel of 1 copies it."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    RADIUS: tl.constexpr = KERNEL // 2
    last = samples * canvas.height * (canvas.width + canvas.radius) - 1
    stride = padded(channels * TAPS)
    sample, row, column = locate(place, canvas)
    start = sample.to(tl.int64) * image.sample
    for first in range(0, stride, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        channel, tap = k // TAPS, k % TAPS
        y = row[:, None] + (tap // KERNEL - RADIUS)[None, :]
        x = column[:, None] + (tap % KERNEL - RADIUS)[None, :]
        inside = (0 <= y) & (y < canvas.height) & (0 <= x) & (x < canvas.width)
        at = start[:, None] + y.to(tl.int64) * image.row + x.to(tl.int64) * image.column
        at += channel[None, :].to(tl.int64) * image.channel
        mask = inside & (place <= last)[:, None] & (channel < channels)[None, :]
        value = tl.zeros(mask.shape, out.dtype.element_ty)
        if image.data is not None:
            value = tl.load(image.data + at, mask=mask, other=0.0).to(out.dtype.element_ty)
        store_rows(out, rounded(value, TF32), place, last, samples, canvas, k, stride)


@triton.jit(do_not_specialize=["samples"])
def columns_kernel(
    out, image, samples, canvas, channels, KERNEL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """An :class:`Image` in a canvas: by columns, or, with a kernel of 1, as it is."""
    place = tl.program_id(0) * BLOCKS[0] + tl.arange(0, BLOCKS[0])
    fill_columns(
        out, image, place, samples, canvas, channels, KERNEL, PRECISION == "tf32", BLOCKS[1]
    )


@triton.jit(do_not_specialize=["samples"])
def image_kernel(image, source, samples, canvas, channels, BLOCKS: tl.constexpr):
    """An :class:`Image`, of any strides, from a canvas."""
    place = tl.program_id(0) * BLOCKS[0] + tl.arange(0, BLOCKS[0])
    sample, row, column = locate(place, canvas)
    stride = padded(channels)
    inside = (sample < samples) & (column < canvas.width)
    rows = position(place, sample, canvas) * stride
    start = sample.to(tl.int64) * image.sample + row.to(tl.int64) * image.row
    start += column.to(tl.int64) * image.column
    for first in range(0, channels, BLOCKS[1]):
        n = first + tl.arange(0, BLOCKS[1])
        mask = inside[:, None] & (n < channels)[None, :]
        value = tl.load(source + rows[:, None] + n[None, :], mask=mask, other=0.0)
        at = start[:, None] + n[None, :].to(tl.int64) * image.channel
        tl.store(image.data + at, value, mask=mask)
