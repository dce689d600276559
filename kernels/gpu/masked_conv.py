"""Masked convolution as an implicit matrix product that skips what the mask hides.

A tile of the output holds ``BLOCK_M`` pixels times ``BLOCK_N`` channels. For every tap of the
kernel it multiplies the shifted pixels, a row of input channels each, by that tap's weights. The
channels are colour-major, so what the mask leaves of a tap is one range of input channels
(:mod:`.ranges`): lower colours at every tap, the own colour at the causal taps. Nothing outside the
range is loaded or multiplied; within it, weights beyond the mask are zeros.

The gradient by the input is the same convolution with the opposite triangle, its weights transposed
and turned by 180 degrees. So this room has two kernels: the convolution, and the gradient by the
weights.
"""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from mintnet_triton.kernels import ranges
from mintnet_triton.kernels._library import compute_dtype, only_once, opposite, register
from mintnet_triton.kernels.gpu import configs, launching
from mintnet_triton.kernels.gpu.activation import activate, slope
from mintnet_triton.kernels.gpu.weights import kernel_size, pack, pack_transposed, unpack
from mintnet_triton.kernels.work import Declared

seen_inputs, first_block = triton.jit(ranges.seen_inputs), triton.jit(ranges.first_block)

#: programs that a gradient by weights is split into, at least, so as to fill a GPU
GRADIENT_PROGRAMS = 512


@triton.jit
def locate(pixel, height, width):
    """Sample, row and column of pixels counted through the batch."""
    within = pixel % (height * width)
    return pixel // (height * width), within // width, within % width


@triton.jit
def any_running(residual, sample, valid, tolerance):
    """Whether a pixel belongs to a sample whose residual is finite and above the tolerance."""
    r = tl.load(residual + sample, mask=valid, other=0.0)
    return tl.max(((r > tl.load(tolerance)) & (r < float("inf"))).to(tl.int32), 0) > 0


@triton.jit
def add_product(
    total,
    rows,  # pointers to channel 0 of BLOCK_M pixels
    rows_valid,
    stride_channel,
    width_in,  # channels that may be read
    weights,  # pointers to input 0 of BLOCK_N outputs
    weights_valid,
    weights_width,
    low,
    high,
    SLOPE: tl.constexpr,  # an activation: multiply its slopes, not its values
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``total + rows[:, low:high] @ weights[:, low:high].T``, rounded out to whole blocks."""
    for start in range(first_block(low, high, BLOCK_K), high, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            rows[:, None] + k[None, :].to(tl.int64) * stride_channel,
            mask=rows_valid[:, None] & (k < width_in)[None, :],
            other=0.0,
        )
        w = tl.load(
            weights[None, :] + k[:, None],
            mask=weights_valid[None, :] & (k < weights_width)[:, None],
            other=0.0,
        )
        if SLOPE != "none":
            a = slope(a.to(total.dtype), SLOPE)
        total = tl.dot(a.to(w.dtype), w, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def add_conv(
    total,
    x,
    offset,  # of BLOCK_M pixels in x, int64
    row,
    column,
    valid,
    height,
    width,
    stride_row,
    stride_column,
    stride_channel,
    width_in,
    weight,  # (taps, outputs, weights_width)
    weights_width,
    n,
    outputs,
    units_in,
    units_out,
    colours,
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the masked convolution of x at some pixels and output channels to ``total``."""
    first = tl.minimum(tl.min(n, 0) // units_out, colours - 1)
    last = tl.minimum(tl.max(n, 0) // units_out, colours - 1)
    RADIUS: tl.constexpr = KERNEL // 2
    # Taps are unrolled: a tap of the mask's own centre row is a case of its own at compile time,
    # and one flat loop over taps and channels has been seen to miscompile.
    for dy in tl.static_range(-RADIUS, RADIUS + 1):
        for dx in tl.static_range(-RADIUS, RADIUS + 1):
            low, high = seen_inputs(
                first, last, units_in, colours, dy * KERNEL + dx, ORDER, TRIANGLE
            )
            inside = (
                valid
                & (row + dy >= 0)
                & (row + dy < height)
                & (column + dx >= 0)
                & (column + dx < width)
            )
            tap = (dy + RADIUS) * KERNEL + dx + RADIUS
            total = add_product(
                total,
                x + (offset + dy * stride_row + dx * stride_column),
                inside,
                stride_channel,
                width_in,
                weight + (tap * outputs + n) * weights_width,
                n < outputs,
                weights_width,
                low,
                high,
                "none",
                PRECISION,
                BLOCK_K,
            )
    return total


@triton.jit(
    do_not_specialize=["samples"],
    launch_metadata=Declared("masked_conv", units_in="units_in", units_out="units_out", own=False),
)
def masked_conv_kernel(
    out,
    x,
    weight,
    bias,
    residual,  # (samples,), and one number, with SKIP
    tolerance,
    samples,
    height,
    width,
    out_stride_sample,
    out_stride_row,
    out_stride_column,
    out_stride_channel,
    width_out,
    x_stride_sample,
    x_stride_row,
    x_stride_column,
    x_stride_channel,
    width_in,
    weights_width,
    bias_stride,
    units_in,
    units_out,
    colours,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    """``out = activation(conv(x) + bias)``; channels from ``outputs`` to ``width_out`` become 0.

    With SKIP, tiles without a running sample do nothing.
    """
    outputs = units_out * colours
    n_tiles = tl.cdiv(width_out, BLOCK_N)
    # The tiles of the same pixels are neighbours, so that they find the input in the cache.
    pixel = tl.program_id(0) // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = pixel < samples * height * width
    sample, row, column = locate(pixel, height, width)
    if SKIP:
        if not any_running(residual, sample, valid, tolerance):
            return
    sample, row64, column64 = sample.to(tl.int64), row.to(tl.int64), column.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    total = add_conv(
        total,
        x,
        sample * x_stride_sample + row64 * x_stride_row + column64 * x_stride_column,
        row,
        column,
        valid,
        height,
        width,
        x_stride_row,
        x_stride_column,
        x_stride_channel,
        width_in,
        weight,
        weights_width,
        n,
        outputs,
        units_in,
        units_out,
        colours,
        KERNEL,
        ORDER,
        TRIANGLE,
        PRECISION,
        BLOCK_K,
    )
    if HAS_BIAS:
        total += tl.load(
            bias + sample[:, None] * bias_stride + n[None, :],
            mask=valid[:, None] & (n < outputs)[None, :],
            other=0.0,
        ).to(ACCUMULATOR)
    h = tl.where((n < outputs)[None, :], activate(total, ACTIVATION), 0.0)
    target = sample * out_stride_sample + row64 * out_stride_row + column64 * out_stride_column
    tl.store(
        out + target[:, None] + n[None, :].to(tl.int64) * out_stride_channel,
        h.to(out.dtype.element_ty),
        mask=valid[:, None] & (n < width_out)[None, :],
    )


@triton.jit(
    do_not_specialize=["samples"],
    launch_metadata=Declared(
        "weight_gradient", units_in="units_in", units_out="units_out", own=False
    ),
)
def weight_gradient_kernel(
    partial,  # (splits, taps, outputs, inputs)
    gradient,
    x,
    scale,  # (pixels, colours), with SLOPES
    samples,
    height,
    width,
    gradient_stride_sample,
    gradient_stride_row,
    gradient_stride_column,
    gradient_stride_channel,
    x_stride_sample,
    x_stride_row,
    x_stride_column,
    x_stride_channel,
    gradient_width,
    x_width,
    pixels_per_split,
    units_in,
    units_out,
    colours,
    SLOPES: tl.constexpr,
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient by the weights of one tap, over one part (split) of the pixels.

    ``partial[split, tap, n, k] = sum of gradient[pixel, n] x[pixel + tap, k]``; zero in tiles that
    the mask hides wholly, which are not computed. The parts are added by the caller, in order.
    With SLOPES, an activation, both operands are activations of that kind, their slopes are
    multiplied instead, and each pixel is scaled by its colour's ``scale``.
    """
    outputs = units_out * colours
    inputs = units_in * colours
    k_tiles = tl.cdiv(inputs, BLOCK_K)
    n_tiles = tl.cdiv(outputs, BLOCK_N)
    program = tl.program_id(0)
    split = tl.program_id(1)
    k = program % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    n = program // k_tiles % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = program // (k_tiles * n_tiles)
    RADIUS: tl.constexpr = KERNEL // 2
    dy = tap // KERNEL - RADIUS
    dx = tap % KERNEL - RADIUS

    first = tl.min(n, 0) // units_out
    last = tl.minimum(tl.max(n, 0) // units_out, colours - 1)
    before, after = seen_inputs(first, last, units_in, colours, -1, ORDER, TRIANGLE)
    low, high = seen_inputs(first, last, units_in, colours, 0, ORDER, TRIANGLE)
    if dy * KERNEL + dx < 0:
        low, high = before, after
    if dy * KERNEL + dx > 0:
        low, high = seen_inputs(first, last, units_in, colours, 1, ORDER, TRIANGLE)

    start = split * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, samples * height * width)
    # A tile may reach beyond the inputs, where a range that is empty may begin.
    if (tl.min(k, 0) >= high) | (tl.minimum(tl.max(k, 0), inputs - 1) < low):
        stop = start
    total = tl.zeros((BLOCK_N, BLOCK_K), partial.dtype.element_ty)
    for base in range(start, stop, BLOCK_M):
        pixel = base + tl.arange(0, BLOCK_M)
        valid = pixel < stop
        sample, row, column = locate(pixel, height, width)
        inside = (
            valid
            & (row + dy >= 0)
            & (row + dy < height)
            & (column + dx >= 0)
            & (column + dx < width)
        )
        sample, row, column = sample.to(tl.int64), row.to(tl.int64), column.to(tl.int64)
        g_row = (
            sample * gradient_stride_sample
            + row * gradient_stride_row
            + column * gradient_stride_column
        )
        g = tl.load(
            gradient + g_row[None, :] + n[:, None].to(tl.int64) * gradient_stride_channel,
            mask=valid[None, :] & (n < gradient_width)[:, None],
            other=0.0,
        )
        x_row = (
            sample * x_stride_sample + (row + dy) * x_stride_row + (column + dx) * x_stride_column
        )
        a = tl.load(
            x + x_row[:, None] + k[None, :].to(tl.int64) * x_stride_channel,
            mask=inside[:, None] & (k < x_width)[None, :],
            other=0.0,
        )
        if SLOPES != "none":
            s = tl.load(
                scale + pixel[None, :].to(tl.int64) * colours + (n // units_out)[:, None],
                mask=valid[None, :] & (n < outputs)[:, None],
                other=0.0,
            )
            g = slope(g.to(total.dtype), SLOPES) * s
            a = slope(a.to(total.dtype), SLOPES)
        total = tl.dot(
            g.to(OPERAND), a.to(OPERAND), total, input_precision=PRECISION, out_dtype=total.dtype
        )
    place = (split.to(tl.int64) * KERNEL * KERNEL + tap) * outputs
    tl.store(
        partial + (place + n[:, None]) * inputs + k[None, :],
        total,
        mask=(n < outputs)[:, None] & (k < inputs)[None, :],
    )


def run_conv(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    units_in: int,
    colours: int,
    order: str,
    triangle: str,
    activation: str,
    precision: str,
    running: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launch the convolution.

    Args:
        out: (B, outputs or more, H, W), any strides; channels beyond the outputs become zeros.
        x: (B, inputs or more, H, W), any strides; channels beyond the inputs are read as they are.
        weight: packed, (k * k, outputs, padded inputs).
        bias: (outputs,) or (B, outputs).
        units_in: input channels of a colour.
        running: residuals (B,) and a tolerance (); samples within it are skipped.
    """
    batch, width_in, height, width = x.shape
    arch, operand = configs.architecture(x.device), configs.operand(weight.dtype, precision)
    units_out = weight.shape[1] // colours
    tile = configs.hidden_tile(arch, operand, colours, units_out, width_in)
    m_tiles = triton.cdiv(batch * height * width, tile.block_m)
    residual, tolerance = (None, None) if running is None else running
    launching.launch(
        masked_conv_kernel,
        (m_tiles * triton.cdiv(out.shape[1], tile.block_n),),
        out, x, weight, bias, residual, tolerance, batch, height, width,
        out.stride(0), out.stride(2), out.stride(3), out.stride(1), out.shape[1],
        x.stride(0), x.stride(2), x.stride(3), x.stride(1), width_in,
        weight.shape[2], bias.stride(0) if bias is not None and bias.ndim == 2 else 0,
        units_in, units_out, colours,
        ACTIVATION=activation, HAS_BIAS=bias is not None, SKIP=running is not None,
        KERNEL=kernel_size(weight), ORDER=order, TRIANGLE=triangle,
        **launching.numerics(weight.dtype, precision), **launching.blocks(tile),
    )  # fmt: skip


def run_weight_gradient(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor | None,
    units_out: int,
    units_in: int,
    colours: int,
    kernel: int,
    order: str,
    triangle: str,
    slopes: str,
    dtype: torch.dtype,
    precision: str,
) -> Tensor:
    """Gradient by the weights (outputs, inputs, k, k), in the accumulator's dtype.

    Args:
        gradient: by the output, (B, outputs or more, H, W), any strides.
        x: input, (B, inputs or more, H, W), any strides.
        scale, slopes: see :func:`weight_gradient_kernel`; None and "none".
        dtype: of the products' operands.
    """
    batch, width_in, height, width = x.shape
    outputs, inputs = units_out * colours, units_in * colours
    arch, operand = configs.architecture(x.device), configs.operand(dtype, precision)
    tile = configs.gradient_tile(arch, operand, inputs, outputs)
    tiles = triton.cdiv(inputs, tile.block_k) * triton.cdiv(outputs, tile.block_n) * kernel**2
    pixels = batch * height * width
    # A part is never so short that its sum costs more than its products.
    most = max(1, pixels // (8 * tile.block_m))
    splits = min(triton.cdiv(GRADIENT_PROGRAMS, tiles), most)
    total = launching.accumulator(dtype)
    partial = x.new_empty((splits, kernel**2, outputs, inputs), dtype=total)
    per_split = triton.cdiv(triton.cdiv(pixels, splits), tile.block_m) * tile.block_m
    numerics = launching.numerics(dtype, precision)
    launching.launch(
        weight_gradient_kernel,
        (tiles, splits),
        partial, gradient, x, scale, batch, height, width,
        gradient.stride(0), gradient.stride(2), gradient.stride(3), gradient.stride(1),
        x.stride(0), x.stride(2), x.stride(3), x.stride(1),
        gradient.shape[1], width_in, per_split, units_in, units_out, colours,
        SLOPES=slopes, KERNEL=kernel, ORDER=order, TRIANGLE=triangle,
        PRECISION=numerics["PRECISION"], OPERAND=launching.TL_DTYPES[dtype],
        **launching.blocks(tile),
    )  # fmt: skip
    return unpack(partial.sum(0))


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    units_in: int,
    colours: int,
    order: str,
    triangle: str,
    activation: str,
) -> Tensor:
    out = _conv_fake(x, weight, bias, units_in, colours, order, triangle, activation)
    precision = launching.default_precision()
    run_conv(out, x, weight, bias, units_in, colours, order, triangle, activation, precision)
    return out


def _conv_fake(x: Tensor, weight: Tensor, bias: Tensor | None, units_in: int, *_: Any) -> Tensor:
    # As torch's own convolutions do, keep the layout of the input.
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty(
        (x.shape[0], weight.shape[1], *x.shape[2:]),
        dtype=weight.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _weight_gradient(
    gradient: Tensor,
    x: Tensor,
    colours: int,
    kernel: int,
    order: str,
    triangle: str,
    dtype: torch.dtype,
) -> Tensor:
    return run_weight_gradient(
        gradient, x, None, gradient.shape[1] // colours, x.shape[1] // colours, colours, kernel,
        order, triangle, "none", dtype, launching.default_precision(),
    ).contiguous()  # fmt: skip


def _weight_gradient_fake(
    gradient: Tensor,
    x: Tensor,
    colours: int,
    kernel: int,
    order: str,
    triangle: str,
    dtype: torch.dtype,
) -> Tensor:
    shape = (gradient.shape[1], x.shape[1], kernel, kernel)
    return x.new_empty(shape, dtype=launching.accumulator(dtype))


conv_op = register(
    "masked_conv(Tensor x, Tensor weight, Tensor? bias, int units_in, int colours, str order, "
    "str triangle, str activation) -> Tensor",
    _conv,
    _conv_fake,
)
weight_gradient_op = register(
    "masked_conv_weight_gradient(Tensor gradient, Tensor x, int colours, int kernel, str order, "
    "str triangle, ScalarType dtype) -> Tensor",
    _weight_gradient,
    _weight_gradient_fake,
)


class _MaskedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, order: str, triangle: str
    ) -> Tensor:
        dtype = compute_dtype(weight)
        units = weight.shape[1] // colours
        packed = pack(weight, dtype)
        bias = None if bias is None else bias.contiguous()
        return cast(Tensor, conv_op(x, packed, bias, units, colours, order, triangle, "identity"))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *structure = inputs
        ctx.structure = structure
        ctx.dtype = output.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    @only_once
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = saved
        colours, order, triangle = ctx.structure
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            packed = pack_transposed(weight, ctx.dtype)
            units = weight.shape[0] // colours
            by_x = conv_op(
                gradient, packed, None, units, colours, order, opposite(triangle), "identity"
            )
        if ctx.needs_input_grad[1]:
            by_weight = weight_gradient_op(
                gradient, x, colours, weight.shape[-1], order, triangle, ctx.dtype
            )
        if ctx.needs_input_grad[2]:
            by_bias = gradient.sum((0, 2, 3), dtype=launching.accumulator(ctx.dtype))
        return by_x, by_weight, by_bias, None, None, None


def masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, order: str, triangle: str
) -> Tensor:
    """As :func:`mintnet_triton.kernels.reference.masked_conv2d`, by the kernels of this room.

    Under autocast the products are of its dtype, and so is the result. Once differentiable.
    """
    return cast(Tensor, _MaskedConv.apply(x, weight, bias, colours, order, triangle))
