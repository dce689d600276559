"""The masked convolution by itself: the layer's kernels, between images of any strides."""

from typing import Any, cast

import torch
import triton
from torch import Tensor

from mintnet_triton.kernels._library import compute_dtype, only_once, opposite, register
from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.gpu import configs, launching
from mintnet_triton.kernels.gpu.canvas import (
    Image,
    by_columns,
    columns_kernel,
    image_kernel,
    new_canvas,
)
from mintnet_triton.kernels.gpu.convolution import Diagonal, hidden_kernel
from mintnet_triton.kernels.gpu.gradients import weight_gradient_kernel
from mintnet_triton.kernels.gpu.launching import padded
from mintnet_triton.kernels.gpu.weights import pack_alone


def to_canvas(x: Tensor, kernel: int, dtype: torch.dtype, columns: bool) -> tuple[Tensor, Canvas]:
    """x (B, C, H, W) in a canvas, by columns or as it is, for k x k kernels."""
    samples, channels, height, width = x.shape
    canvas = Canvas(height, width, kernel // 2)
    taken = kernel if columns else 1
    out = new_canvas(x, canvas, samples, padded(channels * taken**2), dtype)
    blocks = configs.copy_blocks(out.shape[1], out.dtype)
    launching.launch(
        columns_kernel, (triton.cdiv(samples * height * canvas.pitch, blocks[0]),),
        out, Image.of(x), samples, canvas, channels, KERNEL=taken,
        PRECISION=launching.precision_of(dtype), BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    return out, canvas


def run_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, kernel: int,
    ordering: tuple[str, str],
) -> Tensor:  # fmt: skip
    """The convolution of x (B, C, H, W), whose weights are packed."""
    samples, channels, height, _ = x.shape
    outputs, columns = weight.shape[1], by_columns(channels)
    source, canvas = to_canvas(x, kernel, weight.dtype, columns)
    places = samples * height * canvas.pitch
    units_in, order = channels // colours, ordering[0]
    if columns:
        units_in, order = units_in * kernel**2, "dense" if order == "pixel" else order
    tile = configs.hidden_tile(
        configs.architecture(x.device), launching.operand(weight.dtype), colours,
        outputs // colours, units_in, places,
    )  # fmt: skip
    out = new_canvas(x, canvas, samples, padded(outputs), weight.dtype)
    launching.launch(
        hidden_kernel, tile.grid(places, padded(outputs)),
        out, None, source, weight, bias, None, Diagonal(), *(None,) * 4, samples, canvas, units_in,
        outputs // colours, colours, ACTIVATION="identity", KERNEL=1 if columns else kernel,
        ORDER=order, TRIANGLE=ordering[1], PRECISION=launching.precision_of(weight.dtype),
        **tile.launch(),
    )  # fmt: skip
    y = empty_output(x, outputs, weight.dtype)
    blocks = configs.copy_blocks(out.shape[1], out.dtype)
    launching.launch(
        image_kernel, (triton.cdiv(places, blocks[0]),),
        Image.of(y), out, samples, canvas, outputs, BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    return y


def empty_output(x: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    """As torch's own convolutions do, keep the layout of the input."""
    last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty(
        (x.shape[0], outputs, *x.shape[2:]), dtype=dtype, device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, ordering: list[str],
    dtype: torch.dtype, transposed: bool,
) -> Tensor:  # fmt: skip
    order, triangle = ordering
    precision = launching.default_precision()
    packed = pack_alone(weight, colours, (order, triangle), dtype, precision, transposed)
    seen = (order, opposite(triangle) if transposed else triangle)
    return run_conv(x, packed, bias, colours, weight.shape[-1], seen)


def _conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, ordering: list[str],
    dtype: torch.dtype, transposed: bool,
) -> Tensor:  # fmt: skip
    return empty_output(x, weight.shape[1 if transposed else 0], dtype)


def _weight_gradient(
    gradient: Tensor, x: Tensor, colours: int, kernel: int, ordering: list[str], dtype: torch.dtype
) -> Tensor:
    samples, outputs, inputs = len(x), gradient.shape[1], x.shape[1]
    columns = by_columns(inputs)
    left, canvas = to_canvas(gradient, kernel, dtype, False)
    right, _ = to_canvas(x, kernel, dtype, columns)
    units_in, order = inputs // colours, ordering[0]
    if columns:
        units_in, order = units_in * kernel**2, "dense" if order == "pixel" else order
    taken = 1 if columns else kernel
    plan = configs.gradient_plan(
        configs.architecture(x.device), launching.operand(dtype), right.shape[1], left.shape[1],
        taken, samples * canvas.rows * canvas.pitch,
    )  # fmt: skip
    # Tiles that the mask hides are not written.
    parts = x.new_zeros(
        (plan.splits, plan.taps, outputs, right.shape[1]), dtype=launching.accumulator(dtype)
    )
    launching.launch(
        weight_gradient_kernel, (plan.programs, plan.splits, 1),
        parts, left, right, None, None, samples, canvas, plan.per_split, outputs // colours,
        units_in, colours, KERNEL=taken, ORDER=order, TRIANGLE=ordering[1],
        PRECISION=launching.precision_of(dtype), **plan.tile.launch(),
    )  # fmt: skip
    total = parts.sum(0)
    if columns:
        total = total[0, :, : inputs * kernel**2]
        return total.reshape(outputs, inputs, kernel, kernel).contiguous()
    by_tap = total[..., :inputs].unflatten(0, (kernel, kernel))
    return cast(Tensor, by_tap.permute(2, 3, 0, 1).contiguous())


def _weight_gradient_fake(
    gradient: Tensor, x: Tensor, colours: int, kernel: int, ordering: list[str], dtype: torch.dtype
) -> Tensor:
    shape = (gradient.shape[1], x.shape[1], kernel, kernel)
    return x.new_empty(shape, dtype=launching.accumulator(dtype))


conv_op = register(
    "masked_conv(Tensor x, Tensor weight, Tensor? bias, int colours, str[] ordering, "
    "ScalarType dtype, bool transposed) -> Tensor",
    _conv,
    _conv_fake,
)
weight_gradient_op = register(
    "masked_conv_weight_gradient(Tensor gradient, Tensor x, int colours, int kernel, "
    "str[] ordering, ScalarType dtype) -> Tensor",
    _weight_gradient,
    _weight_gradient_fake,
)


class _MaskedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, order: str, triangle: str
    ) -> Tensor:
        arguments = (colours, [order, triangle], compute_dtype(weight), False)
        return cast(Tensor, conv_op(x, weight, bias, *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, colours, *ordering = inputs
        ctx.structure = colours, ordering
        ctx.dtype = output.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    @only_once
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = saved
        colours, ordering = ctx.structure
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = conv_op(gradient, weight, None, colours, ordering, ctx.dtype, True)
        if ctx.needs_input_grad[1]:
            kernel = weight.shape[-1]
            by_weight = weight_gradient_op(gradient, x, colours, kernel, ordering, ctx.dtype)
        if ctx.needs_input_grad[2]:
            by_bias = gradient.sum((0, 2, 3), dtype=launching.accumulator(ctx.dtype))
        return by_x, by_weight, by_bias, None, None, None


def masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, order: str, triangle: str
) -> Tensor:
    """As :func:`mintnet_triton.kernels.reference.masked_conv2d`, by the kernels of this room.

    Under autocast the products are of its dtype, and so is the result. Once differentiable.
    """
    bias = None if bias is None else bias.contiguous()
    arguments = (colours, order, triangle)
    return cast(Tensor, _MaskedConv.apply(x, weight.contiguous(), bias, *arguments))
