"""The Mint layer and its gradient: which kernels run, one after the other, and what they share.

Forward: weights are packed, x is copied to a canvas, the two hidden layers follow, and the output.
Backward: weights are packed transposed; what comes from above is copied; the gradients by the
hidden layers, by x, and by the weights follow, and their parts are added up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor

from mintnet_triton.kernels._library import compute_dtype, only_once, opposite, register
from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.gpu import configs, launching
from mintnet_triton.kernels.gpu.canvas import Image, by_columns, columns_kernel, given, new_canvas
from mintnet_triton.kernels.gpu.convolution import Diagonal, hidden_kernel, output_kernel
from mintnet_triton.kernels.gpu.finish import Parts, finish
from mintnet_triton.kernels.gpu.gradients import upstream_kernel, weight_gradient_kernel
from mintnet_triton.kernels.gpu.launching import accumulator, padded
from mintnet_triton.kernels.gpu.weights import Packed, empty_packed, pack
from mintnet_triton.kernels.reference import (
    Condition,
    Structure,
    Weights,
    positive,
    shifted,
)


class Shape(NamedTuple):
    """All that a layer's launches depend on, beside the values."""

    samples: int
    colours: int
    units: int
    canvas: Canvas
    kernels: tuple[int, int, int]
    dtype: torch.dtype  # of the products
    precision: str
    structure: Structure

    @classmethod
    def of(
        cls, x: Tensor, hidden: int, kernels: Sequence[int], dtype: torch.dtype, precision: str,
        structure: Structure,
    ) -> "Shape":  # fmt: skip
        samples, colours, height, width = x.shape
        canvas = Canvas(height, width, max(kernels) // 2)
        first, middle, last = kernels
        kernels = (first, middle, last)
        return cls(
            samples, colours, hidden // colours, canvas, kernels, dtype, precision, structure
        )

    @property
    def hidden(self) -> int:
        return self.units * self.colours

    @property
    def places(self) -> int:
        return self.samples * self.canvas.height * self.canvas.pitch

    def side(self, kernel: int) -> tuple[int, int, str]:
        """How few channels meet a kernel: their units a colour, the taps' kernel, the order."""
        if by_columns(self.colours):
            return kernel**2, 1, "dense" if self.structure.order == "pixel" else "channel"
        return 1, kernel, self.structure.order

    def new_side(self, like: Tensor, kernel: int) -> Tensor:
        """An empty canvas of few channels."""
        units, _, _ = self.side(kernel)
        stride = padded(units * self.colours)
        return new_canvas(like, self.canvas, self.samples, stride, self.dtype)

    def output_tile(self, like: Tensor) -> configs.Launch:
        """Of a convolution whose outputs are the colours themselves."""
        return configs.output_tile(
            configs.architecture(like.device), self.operand, self.colours, padded(self.hidden),
            self.places,
        )  # fmt: skip

    @property
    def operand(self) -> str:
        return configs.operand(self.dtype, self.precision)

    def new_hidden(self, like: Tensor) -> Tensor:
        """An empty canvas of a hidden layer."""
        return new_canvas(like, self.canvas, self.samples, padded(self.hidden), self.dtype)

    def tile(self, like: Tensor, units_in: int) -> configs.Launch:
        """Of a convolution whose outputs are a hidden layer."""
        return configs.hidden_tile(
            configs.architecture(like.device), self.operand, self.colours, self.units, units_in,
            self.places,
        )  # fmt: skip

    def new_logs(self, like: Tensor) -> Tensor:
        """Empty logarithms of the diagonal (tiles of colours, B, places of a sample)."""
        tiles = triton.cdiv(self.colours, self.output_tile(like).blocks.outputs)
        return like.new_empty((tiles, self.samples, self.canvas.height * self.canvas.pitch))

    def constants(self, order: str, transposed: bool = False) -> dict[str, str]:
        """Those that all kernels have."""
        triangle = self.structure.triangle
        return {
            "ORDER": order,
            "TRIANGLE": opposite(triangle) if transposed else triangle,
            "PRECISION": self.precision if self.dtype == torch.float32 else "ieee",
        }


def slots(units: int, colours: int, tile: int) -> int:
    """The most tiles that one colour's units lie in."""
    return max(((c + 1) * units - 1) // tile - c * units // tile + 1 for c in range(colours))


def run_columns(x: Tensor, shape: Shape) -> Tensor:
    """x in a canvas, as the first convolution reads it."""
    out = shape.new_side(x, shape.kernels[0])
    blocks = configs.copy_blocks(out.shape[1], out.dtype)
    launching.launch(
        columns_kernel, (triton.cdiv(shape.places, blocks[0]),),
        out, Image.of(x), shape.samples, shape.canvas, shape.colours,
        KERNEL=shape.kernels[0] if by_columns(shape.colours) else 1,
        PRECISION=shape.constants("")["PRECISION"], BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    return out


def run_hidden(
    x: Tensor, h1: Tensor, h2: Tensor, packed: Packed, biases: tuple[Tensor | None, ...],
    shape: Shape, shifts: Sequence[Tensor | None], running: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Launch what fills the canvases of h1 and h2.

    Args:
        shifts: of both, or None, as a :class:`.Condition` has them.
        running: rows of residuals and limits, as :func:`run_output` has them: samples that have
            stopped are skipped.

    Returns:
        The shares of the diagonal (slots, places, C).
    """
    image, slopes = run_columns(x, shape), torch.empty_like(h1)
    activation = shape.structure.activation
    units_in, kernel, order = shape.side(shape.kernels[0])
    first, middle = shape.tile(x, units_in), shape.tile(x, shape.units)
    width = middle.blocks.outputs
    shares = packed.t.new_empty(
        (slots(shape.units, shape.colours, width), shape.places, shape.colours)
    )
    diagonal = Diagonal(slopes, packed.centres, packed.ends, shares)
    for tile, out, written, inputs, weight, number, joined, units, k, seen in (
        (first, h1, slopes, image, packed.weight1, 0, Diagonal(), units_in, kernel, order),
        (middle, h2, None, h1, packed.weight2, 1, diagonal, shape.units, shape.kernels[1],
         shape.structure.order),
    ):  # fmt: skip
        launching.launch(
            hidden_kernel, tile.grid(shape.places, padded(shape.hidden)),
            out, written, inputs, weight, biases[number], given(shifts[number], x), joined, None,
            None, *(running or (None, None)),
            shape.samples, shape.canvas, units, shape.units, shape.colours,
            ACTIVATION=activation, KERNEL=k, **shape.constants(seen), **tile.launch(),
        )  # fmt: skip
    return shares


def run_output(
    y: Tensor, diagonal: Tensor | None, logs: Tensor, x: Tensor, h2: Tensor, shares: Tensor,
    packed: Packed, bias: Tensor | None, shape: Shape, scale: Tensor | None,
    update: tuple[Tensor, ...] | None = None,
) -> None:  # fmt: skip
    """Launch the last kernel of a layer: fill y, the diagonal and its logarithms.

    Args:
        scale: of t, or None, as a :class:`.Condition` has it.
        update: z, its size, three rows of residuals, and alpha, tolerance and gain: y becomes the
            x of the next iteration.
    """
    tile = shape.output_tile(x)
    launching.launch(
        output_kernel, tile.grid(shape.places, shape.colours),
        y, diagonal, logs, h2, packed.weight3, bias, packed.t, given(scale, x), shares, Image.of(x),
        *(update or (None,) * 4), shape.samples, shape.canvas, shape.units, shape.colours,
        SHARES=(len(shares), shape.tile(x, shape.units).blocks.outputs), KERNEL=shape.kernels[2],
        **shape.constants(shape.structure.order), **tile.launch(),
    )  # fmt: skip


def _layer(
    x: Tensor, weight1: Tensor, weight2: Tensor, weight3: Tensor, centres: Tensor, ends: Tensor,
    t: Tensor, bias1: Tensor | None, bias2: Tensor | None, bias3: Tensor | None,
    kernels: Sequence[int], structure: Sequence[str], condition: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shift1, shift2, scale = condition or (None,) * 3
    packed = Packed(weight1, weight2, weight3, centres, ends, t)
    shape = Shape.of(
        x, len(ends), kernels, weight2.dtype, launching.default_precision(), Structure(*structure)
    )
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    diagonal = t.new_empty(x.shape)
    h1, h2 = shape.new_hidden(x), shape.new_hidden(x)
    shares = run_hidden(x, h1, h2, packed, (bias1, bias2), shape, (shift1, shift2))
    logs = shape.new_logs(t)
    run_output(y, diagonal, logs, x, h2, shares, packed, bias3, shape, scale)
    return y, diagonal, logs.sum((0, 2)), h1, h2


def _layer_fake(
    x: Tensor, weight1: Tensor, weight2: Tensor, weight3: Tensor, centres: Tensor, ends: Tensor,
    t: Tensor, bias1: Tensor | None, bias2: Tensor | None, bias3: Tensor | None,
    kernels: Sequence[int], structure: Sequence[str], condition: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = Shape.of(x, ends.shape[0], kernels, weight2.dtype, "ieee", Structure(*structure))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    log_det = t.new_empty(x.shape[:1])
    return y, t.new_empty(x.shape), log_det, shape.new_hidden(x), shape.new_hidden(x)


def _backward(
    x: Tensor, diagonal: Tensor, h1: Tensor, h2: Tensor, by_y: Tensor | None,
    by_diagonal: Tensor | None, by_log_det: Tensor | None, weights: Sequence[Tensor | None],
    structure: Sequence[str], by_weights: bool, condition: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    owned = Weights.of(weights)
    shift1, shift2, scale = condition or (None,) * 3
    if not len(x):
        wanted = [one for one in weights if one is not None] if by_weights else []
        return [torch.zeros_like(one) for one in (x, *wanted, *(condition or ())[:2])]
    precision = launching.default_precision()
    hidden = len(owned.weight1)
    shape = Shape.of(x, hidden, owned.kernels, h1.dtype, precision, Structure(*structure))
    packed = pack(owned, shape.structure, h1.dtype, precision, transposed=True)
    k1, k2, k3 = shape.kernels
    x_side, y_side = shape.new_side(x, k1), shape.new_side(x, k3)
    slopes1, slopes2, by_a1, by_a2 = (torch.empty_like(h1) for _ in range(4))
    g = new_canvas(diagonal, shape.canvas, shape.samples, shape.colours, diagonal.dtype)
    activation, order = shape.structure.activation, shape.structure.order

    blocks = configs.copy_blocks(max(x_side.shape[1], y_side.shape[1]), x_side.dtype)
    tiles = triton.cdiv(shape.places, blocks[0])
    sums3 = diagonal.new_empty((tiles, shape.colours))
    launching.launch(
        upstream_kernel, (tiles, 3),
        x_side, y_side, slopes1, g, packed.largest, sums3,
        Image.of(x), Image.of(by_y), Image.of(by_diagonal),
        Image.of(by_log_det), diagonal, h1, h1.numel(), shape.samples, shape.canvas, shape.colours,
        ACTIVATION=activation, KERNELS=(k1, k3) if by_columns(shape.colours) else (1, 1),
        PRECISION=shape.constants("")["PRECISION"], COLOURS=configs.least(shape.colours),
        BLOCKS=blocks, num_warps=4,
    )  # fmt: skip

    sums = []
    side_units, side_kernel, side_order = shape.side(k3)
    of_h2 = Diagonal(slopes1, packed.centres, packed.ends, by=g, unit=packed.largest)
    of_h1 = Diagonal(slopes2, packed.turned_centres, packed.turned_ends, unit=packed.largest)
    for out, written, inputs, weight, joined, own, units, k, seen in (
        (by_a2, slopes2, y_side, packed.weight3, of_h2, h2, side_units, side_kernel, side_order),
        (by_a1, None, by_a2, packed.weight2, of_h1, h1, shape.units, k2, order),
    ):
        tile = shape.tile(x, units)
        sums.append(diagonal.new_empty((triton.cdiv(shape.places, tile.blocks.places), hidden)))
        launching.launch(
            hidden_kernel, tile.grid(shape.places, padded(hidden)),
            out, written, inputs, weight, None, None, joined, own, sums[-1], None, None,
            shape.samples, shape.canvas, units, shape.units, shape.colours,
            ACTIVATION=activation, KERNEL=k, **shape.constants(seen, transposed=True),
            **tile.launch(),
        )  # fmt: skip

    by_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = shape.output_tile(x)
    launching.launch(
        output_kernel, tile.grid(shape.places, shape.colours),
        by_x, None, None, by_a1, packed.weight1, None, packed.t, given(scale, x), None,
        Image.of(by_y), None, None, None, None, shape.samples, shape.canvas, shape.units,
        shape.colours,
        SHARES=(0, 1), KERNEL=k1, **shape.constants(order, transposed=True), **tile.launch(),
    )  # fmt: skip
    by_shifts = [
        _sum_to(shift, _images(canvas, shape))
        for shift, canvas in ((shift1, by_a1), (shift2, by_a2))
        if shift is not None
    ]
    if not by_weights:
        return [by_x, *by_shifts]
    middle = run_weight_gradient(by_a2, h1, k2, shape, slopes=(slopes2, slopes1))
    first, last = _outer_gradients(x_side, y_side, by_a1, h2, shape)
    parts = Parts(first, middle, last, sums[1], sums[0], sums3, g, packed.largest)
    gradients = finish(owned, parts, x, by_y, shape.canvas, shape.structure, scale)
    return [by_x, *(one for one in gradients if one is not None), *by_shifts]


def _images(values: Tensor, shape: Shape) -> Tensor:
    """The pixels (B, C*K, H, W) of a canvas of a hidden layer."""
    canvas, stride = shape.canvas, values.stride(0)
    size = (shape.samples, shape.hidden, canvas.height, canvas.width)
    strides = (canvas.distance(canvas.rows, 0) * stride, 1, canvas.pitch * stride, stride)
    return values.as_strided(size, strides, canvas.place(0, 0, 0) * stride)


def _sum_to(like: Tensor, images: Tensor) -> Tensor:
    """A gradient by pixels, as one by what is the same for all pixels of a sample, or is not."""
    total = images
    if like.shape != images.shape:
        total = images.sum((2, 3), keepdim=True, dtype=accumulator(images.dtype))
    return total.to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def _outer_gradients(
    x_side: Tensor, y_side: Tensor, by_a1: Tensor, h2: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Parts of the gradients by the first weights and, hidden units first, by the last ones."""
    k1, _, k3 = shape.kernels
    turned = shape._replace(
        structure=shape.structure._replace(triangle=opposite(shape.structure.triangle))
    )
    if k1 != k3:
        return (
            run_weight_gradient(by_a1, x_side, k1, shape),
            run_weight_gradient(h2, y_side, k3, turned),
        )
    both = run_weight_gradient(by_a1, x_side, k1, shape, pair=(h2, y_side))
    return both[0], both[1]


def run_weight_gradient(
    gradient: Tensor, x: Tensor, kernel: int, shape: Shape,
    slopes: tuple[Tensor, Tensor] | None = None, pair: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Parts of the gradient by weights, (splits, taps, outputs, stride of x).

    Args:
        slopes: canvases for one more tap; see :func:`.gradients.weight_gradient_kernel`.
        pair: another gradient and x: then of both, (2, splits, ...).
    """
    units, order = shape.units, shape.structure.order
    if slopes is None:
        units, kernel, order = shape.side(kernel)
    pairs = 1 if pair is None else 2
    plan = configs.gradient_plan(
        configs.architecture(x.device), shape.operand, x.shape[1], padded(shape.hidden), kernel,
        shape.samples * shape.canvas.rows * shape.canvas.pitch, slopes is not None, pairs,
    )  # fmt: skip
    parts = x.new_empty(
        (pairs, plan.splits, plan.taps, shape.hidden, x.shape[1]),
        dtype=launching.accumulator(shape.dtype),
    )
    launching.launch(
        weight_gradient_kernel, (plan.programs, plan.splits, pairs),
        parts[0], gradient, x, slopes, None if pair is None else (parts[1], *pair),
        shape.samples, shape.canvas, plan.per_split, shape.units, units, shape.colours,
        KERNEL=kernel, **shape.constants(order), **plan.tile.launch(),
    )  # fmt: skip
    return parts[0] if pair is None else parts


def _backward_fake(
    x: Tensor, diagonal: Tensor, h1: Tensor, h2: Tensor, by_y: Tensor | None,
    by_diagonal: Tensor | None, by_log_det: Tensor | None, weights: Sequence[Tensor | None],
    structure: Sequence[str], by_weights: bool, condition: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    by_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    gradients = weights if by_weights else ()
    found = [torch.empty_like(one) for one in gradients if one is not None]
    by_shifts = [
        torch.empty_like(one, memory_format=torch.contiguous_format)
        for one in (condition or ())[:2]
    ]
    return [by_x, *found, *by_shifts]


def _pack(
    weights: Sequence[Tensor | None], dtype: torch.dtype, precision: str, structure: Sequence[str]
) -> list[Tensor]:
    owned = Weights.of(weights)
    packed = pack(owned, Structure(*structure), dtype, precision, transposed=False)
    return [one for one in packed if one is not None]


def _pack_fake(
    weights: Sequence[Tensor | None], dtype: torch.dtype, precision: str, structure: Sequence[str]
) -> list[Tensor]:
    packed = empty_packed(Weights.of(weights), dtype, transposed=False)
    return [one for one in packed if one is not None]


pack_op = register(
    "mint_layer_pack(Tensor?[] weights, ScalarType dtype, str precision, str[] structure) "
    "-> Tensor[]",
    _pack,
    _pack_fake,
)
layer_op = register(
    "mint_layer(Tensor x, Tensor weight1, Tensor weight2, Tensor weight3, Tensor centres, "
    "Tensor ends, Tensor t, Tensor? bias1, Tensor? bias2, Tensor? bias3, int[] kernels, "
    "str[] structure, Tensor[]? condition=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer,
    _layer_fake,
)
backward_op = register(
    "mint_layer_backward(Tensor x, Tensor diagonal, Tensor h1, Tensor h2, Tensor? by_y, "
    "Tensor? by_diagonal, Tensor? by_log_det, Tensor?[] weights, str[] structure, "
    "bool by_weights, Tensor[]? condition=None) -> Tensor[]",
    _backward,
    _backward_fake,
)


def packed(weights: Weights, dtype: torch.dtype, precision: str, structure: Structure) -> Packed:
    """The weights of a layer, packed for products of that dtype."""
    return Packed(*pack_op(list(weights), dtype, precision, list(structure)))


def _evaluate(
    x: Tensor,
    weights: Weights,
    structure: Structure,
    dtype: torch.dtype,
    condition: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    read = packed(weights, dtype, launching.precision_of(dtype), structure)
    results = layer_op(x, *read[:6], *weights.biases, weights.kernels, list(structure), condition)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor], results)


class _MintLayer(torch.autograd.Function):
    """Saves x, the diagonal, h1 and h2, or x alone; all else of backward is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, structure: Structure, recompute: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.structure, ctx.recompute = structure, recompute
        ctx.dtype = compute_dtype(cast(Tensor, tensors[2]))
        weights, condition = tensors[:7], _given(tensors[7:])
        y, diagonal, log_det, h1, h2 = _evaluate(
            x, Weights.of(weights), structure, ctx.dtype, condition
        )
        ctx.save_for_backward(x, *tensors, *(() if recompute else (diagonal, h1, h2)))
        return y, diagonal, log_det

    @staticmethod
    @only_once
    def backward(
        ctx: Any, saved: tuple[Any, ...], *upstream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weights, condition, kept = saved[0], list(saved[1:8]), _given(saved[8:11]), saved[11:]
        if ctx.recompute:
            _, diagonal, _, h1, h2 = _evaluate(
                x, Weights.of(weights), ctx.structure, ctx.dtype, condition
            )
            kept = diagonal, h1, h2
        wanted = any(ctx.needs_input_grad[3:10])
        by_x, *results = backward_op(
            x, *kept, *upstream, weights, list(ctx.structure), wanted, condition
        )
        rest = iter(results)
        found = [next(rest) if wanted and one is not None else None for one in weights]
        if condition is None:
            return by_x, None, None, *found, None, None, None
        by_scale = _by_scale(condition[2], weights[6], x, kept[0], upstream)
        return by_x, None, None, *found, *rest, by_scale


def _given(condition: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Both shifts of hidden layers and the scale, if there is a condition."""
    found = [one for one in condition if one is not None]
    return found or None


def _by_scale(
    scale: Tensor, t: Tensor, x: Tensor, diagonal: Tensor, upstream: tuple[Tensor | None, ...]
) -> Tensor:
    """The gradient by the scale of t, which is in ``t x`` and in the diagonal."""
    by_y, by_diagonal, by_log_det = upstream
    total = torch.zeros_like(diagonal)
    if by_y is not None:
        total = total + by_y.to(total.dtype) * x
    if by_diagonal is not None:
        total = total + by_diagonal
    if by_log_det is not None:
        total = total + by_log_det[:, None, None, None] / diagonal
    total = total * positive(t)
    return total.sum_to_size(scale.shape).to(scale.dtype)


def packed_forward(
    x: Tensor,
    packed: Packed,
    weights: Weights,
    structure: Structure,
    condition: Condition | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mint_forward`, of weights that are packed already, and without gradients."""
    shift1, shift2, shift3, scale = condition or (None,) * 4
    inner = _given((shift1, shift2, scale))
    y, diagonal, log_det, *_ = layer_op(
        x, *packed[:6], *weights.biases, weights.kernels, list(structure), inner
    )
    return shifted(y, shift3), diagonal, log_det


def mint_forward(
    x: Tensor,
    weights: Weights,
    structure: Structure,
    recompute: bool = False,
    condition: Condition | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mintnet_triton.kernels.reference.mint_forward`, by the kernels of this room.

    Under autocast the products are of its dtype; the diagonal, its logarithm and ``t x`` are never
    below float32. Once differentiable.

    Args:
        recompute: keep x alone for the backward pass, and compute the hidden layers again there.
        condition: of the samples, where a context gives one.

    Returns:
        y (B, C, H, W) in the dtype of x; the diagonal (B, C, H, W) and log_det (B,), never below
        float32.
    """
    shift1, shift2, shift3, scale = condition or (None,) * 4
    y, diagonal, log_det = _MintLayer.apply(
        x, structure, recompute, *weights.contiguous(), shift1, shift2, scale
    )
    return shifted(y, shift3), diagonal, log_det
