"""The Mint layer and its gradient on a CPU, in float32, in torch's terms.

The arithmetic is that of :mod:`.canvas`. Here weights are packed for it, groups of samples are
shared among threads, and the whole becomes two operators with a gradient.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mintnet_triton.kernels import reference
from mintnet_triton.kernels._library import opposite, register
from mintnet_triton.kernels.activation import NAMES, find_activation
from mintnet_triton.kernels.canvas import Canvas, in_space, padded
from mintnet_triton.kernels.cpu.canvas import (
    Lines,
    Plan,
    backward_groups,
    fill,
    forward_groups,
    plan,
)
from mintnet_triton.kernels.cpu.threads import share
from mintnet_triton.kernels.cpu.tiles import LOOPS, MOST, OUTPUTS, VECTOR
from mintnet_triton.kernels.reference import (
    Condition,
    MintWeights,
    Structure,
    centres_of,
    join,
    scaled,
    shifted,
    with_centres,
)

Array = np.ndarray[Any, Any]

#: most pixels of a line, all samples side by side, unless one image has more
LINE = 64


def group_of(batch: int, width: int) -> int:
    """Samples side by side: in as few rounds as their threads can take, shared evenly.

    In a form that holds for a batch of any size, as one compiled graph has to.
    """
    most, threads = max(1, LINE // width), _threads()
    rounds = ceil_divide(ceil_divide(batch, most), threads)
    return ceil_divide(batch, rounds * threads)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    """Of torch, for which a graph has a guard but no name."""
    return torch.get_num_threads()


def lines_of(size: Sequence[int], group: int, radius: int) -> Lines:
    """The lines of canvases of that many samples, for kernels of that radius at most.

    Args:
        size: (H, W) of an image, or its sizes along one axis or three.
    """
    depth, height, width = in_space(size, 1)
    pixels = width * group
    floats = Canvas(height, padded(pixels, VECTOR), radius * group)
    return Lines(
        depth * height, height, width, group, floats.radius, pixels, floats.width, floats.pitch
    )


def by_rows(images: Tensor, lines: Lines) -> Array:
    """Images (B, C, H, W), along whatever axes, as (B, C, rows, W)."""
    return images.numpy().reshape(*images.shape[:2], lines.rows, lines.width)


def size_of(channels: int, lines: Lines) -> int:
    """Of a canvas, in floats."""
    return lines.margin + lines.rows * channels * lines.line


def _shares(groups: int) -> list[Array]:
    """The groups of each thread."""
    threads = min(torch.get_num_threads(), groups)
    return [np.arange(thread, groups, threads) for thread in range(threads)]


def ceil_divide(a: int, b: int) -> int:
    return (a + b - 1) // b


Conv = tuple[Array, Array, Array]  # tiles and taps of a plan, and weights in their order


class Packed(NamedTuple):
    """Weights in the order in which they are read."""

    convs: tuple[Conv, Conv, Conv]
    biases: tuple[Array, Array, Array]
    centres: Conv
    t: Array  # (1 or B, C, rows, W)
    radius: int  # of the largest kernel


def _plan_of(shape: Sequence[int], colours: int, order: str, triangle: str, most: int) -> Plan:
    """Of a weight (outputs, inputs, k, k), along whatever axes."""
    outputs, inputs, *kernel = shape
    units = outputs // colours, inputs // colours
    return plan(*units, colours, tuple(kernel), order, triangle, most)


def _plans_of_gradient(
    shapes: Sequence[Sequence[int]], colours: int, order: str, triangle: str
) -> list[Plan]:
    """Of the gradients by three weights and by the joined centres."""
    hidden = shapes[1][0]
    plans = [_plan_of(shape, colours, order, triangle, OUTPUTS) for shape in shapes]
    return [*plans, _plan_of((hidden, hidden, 1, 1), colours, "own", triangle, OUTPUTS)]


def _pack(weight: Array, colours: int, order: str, triangle: str) -> Conv:
    found = _plan_of(weight.shape, colours, order, triangle, MOST)
    packed = np.empty(found.size, np.float32)
    fill(weight.reshape(*weight.shape[:2], -1), found.tiles, found.taps, packed)
    return found.tiles, found.taps, packed


def _pack_transposed(weight: Array, colours: int, order: str, triangle: str) -> Conv:
    """Of the transposed convolution, which has the opposite triangle."""
    turned = weight.swapaxes(0, 1)[:, :, *[slice(None, None, -1)] * (weight.ndim - 2)]
    return _pack(turned, colours, order, opposite(triangle))


def _add_gradient_by_centres(
    by_joined: Tensor, weights: Sequence[Tensor], by_weights: Sequence[Tensor]
) -> None:
    """Add the gradient by the joined centres to those by the weights that they are made of."""
    centre1, centre2, centre3 = centres_of(*weights)
    by_centre1, by_centre2, by_centre3 = centres_of(*by_weights)  # views
    by_centre1 += (by_joined * centre3.unsqueeze(2) * centre2).sum(1)
    by_centre2 += by_joined * centre3.unsqueeze(2) * centre1.unsqueeze(1)
    by_centre3 += (by_joined * centre2 * centre1.unsqueeze(1)).sum(2)


def _pack_centres(centres: Array) -> Conv:
    """Joined centres (C, K, K), each for its own colour."""
    colours, units, _ = centres.shape
    dense = np.zeros((colours, units, colours, units), np.float32)
    own = np.arange(colours)
    dense[own, :, own] = centres
    return _pack(dense.reshape(colours * units, -1, 1, 1), colours, "own", "lower")


def pack_layer(parts: Sequence[Tensor], order: str, triangle: str) -> Packed:
    """Pack three weights and biases, one after the other, and t."""
    parts = [part.detach().contiguous() for part in parts]
    weights, biases, t = parts[:6:2], parts[1:6:2], parts[6]
    colours = len(biases[2])
    # Copies, for these are parameters, and what numpy has seen can no longer be freed and taken up
    # again, as sharded parameters are.
    bias1, bias2, bias3 = (bias.clone() for bias in biases)
    first, second, third = (_pack(weight.numpy(), colours, order, triangle) for weight in weights)
    return Packed(
        (first, second, third),
        (bias1.numpy(), bias2.numpy(), bias3.numpy()),
        _pack_centres(join(*centres_of(*weights)).numpy()),
        _of_samples(t, weights[0].ndim - 2),
        _radius(weights),
    )


def _radius(weights: Sequence[Any]) -> int:
    """Of the largest kernel."""
    return max(int(weight.shape[-1]) for weight in weights) // 2


def _of_samples(values: Tensor | None, axes: int) -> Array:
    """What samples have of their own, (B, n, H, W) or (B, n, 1, 1), or share, (n, H, W), as
    (1 or B, n, rows or 1, W or 1); nothing has no samples."""
    if values is None:
        return np.empty((0, 1, 1, 1), np.float32)
    own = values if values.ndim == 2 + axes else values.unsqueeze(0)
    shape = own.shape
    rows = math.prod(shape[2:-1])
    return own.detach().contiguous().numpy().reshape(*shape[:2], rows, shape[-1])


def run_forward(
    x: Tensor,
    packed: Packed,
    shifts: Sequence[Tensor | None],
    activation: str,
    diagonal: bool,
    keep: bool,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the diagonal, and canvases of both hidden layers; what is not wanted is empty.

    Args:
        shifts: of both hidden layers, as in a :class:`.reference.Condition`, or None.
    """
    x = x.contiguous()
    first, second = (_of_samples(shift, x.ndim - 2) for shift in shifts)
    lines = lines_of(x.shape[2:], group, packed.radius)
    y, to_diagonal, h1, h2 = _results(x, len(packed.biases[0]), lines, diagonal, keep)
    groups = ceil_divide(len(x), lines.group)

    def work(some: Array) -> None:
        size = size_of(len(packed.biases[0]), lines)
        kept = (h1, h2) if keep else (x.new_empty(size), x.new_empty(size))
        forward_groups(
            LOOPS, some, by_rows(x, lines), packed.t, packed.convs, packed.biases, (first, second),
            packed.centres, NAMES.index(activation),
            tuple(one.numpy().reshape(-1, size) for one in kept), by_rows(y, lines),
            by_rows(to_diagonal, lines), lines,
        )  # fmt: skip

    share(_shares(groups), work)
    return y, to_diagonal, h1, h2


def _results(
    x: Tensor, hidden: int, lines: Lines, diagonal: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = ceil_divide(x.shape[0], lines.group) if keep else 0  # len() would fix the batch
    # In one dimension: of two, a compiler would ask whether there is one group or more.
    canvases = groups * size_of(hidden, lines)
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(x if diagonal else x[:0], memory_format=contiguous),
        x.new_empty(canvases),
        x.new_empty(canvases),
    )


def _layer(  # noqa: PLR0913 (tensors, one by one)
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    t: Tensor,
    order: str,
    triangle: str,
    activation: str,
    diagonal: bool,
    keep: bool,
    group: int,
    shift1: Tensor | None = None,
    shift2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = (weight1, bias1, weight2, bias2, weight3, bias3, t)
    packed, shifts = pack_layer(parts, order, triangle), (shift1, shift2)
    return run_forward(x.detach(), packed, shifts, activation, diagonal, keep, group)


def _layer_fake(x: Tensor, *parts_and_structure: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, (diagonal, keep, group) = parts_and_structure[:6:2], parts_and_structure[10:13]
    lines = lines_of(x.shape[2:], group, _radius(weights))
    return _results(x, len(weights[0]), lines, diagonal, keep)


def _backward(  # noqa: PLR0913 (tensors, one by one)
    x: Tensor,
    h1: Tensor,
    h2: Tensor,
    by_y: Tensor,
    by_diagonal: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    t: Tensor,
    order: str,
    triangle: str,
    activation: str,
    by_weights: bool,
    group: int,
    shift1: Tensor | None = None,
    shift2: Tensor | None = None,
) -> list[Tensor]:
    weights = [one.detach().contiguous() for one in (weight1, weight2, weight3)]
    colours, hidden = len(weight3), len(weight2)
    units = hidden // colours
    lines = lines_of(x.shape[2:], group, _radius(weights))
    inputs, upstream, to_diagonal = (
        by_rows(one.detach().contiguous(), lines) for one in (x, by_y, by_diagonal)
    )
    positive = _of_samples(t, x.ndim - 2)
    convs = tuple(
        _pack_transposed(one.numpy(), colours, order, triangle) for one in reversed(weights)
    )
    joined = join(*centres_of(*weights))
    both = _pack_centres(joined.numpy()), _pack_centres(joined.mT.numpy())
    shapes = [one.shape for one in weights]
    plans = tuple(one[:2] for one in _plans_of_gradient(shapes, colours, order, triangle))
    shares = _shares(ceil_divide(len(x), lines.group))
    flat = [(*shape[:2], math.prod(shape[2:])) for shape in shapes]
    summed = [*flat, (hidden, hidden, 1)] if by_weights else [(0, 0, 0)] * 4
    # Samples have shifts of their own, and threads have samples of their own; but one shift for all
    # has a sum, lane by lane.
    shared = shift1 is not None and len(shift1) == 1 != len(x)
    by_shifts = [] if shared else [_zeros_like(shift) for shift in (shift1, shift2)]
    of_samples = [_of_samples(one, x.ndim - 2) for one in by_shifts]
    lanes = [(1, hidden, lines.rows, lines.length)] * 2 if shared else []
    # Each thread has sums of its own, in memory of their own: what is not returned has to go.
    sums = [
        [np.zeros(shape, np.float32) for shape in ((hidden,), (hidden,), *summed, *lanes)]
        for _ in shares
    ]
    by_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    kept = tuple(one.numpy().reshape(-1, size_of(hidden, lines)) for one in (h1, h2))

    def work(part: tuple[Array, list[Array]]) -> None:
        some, own = part
        backward_groups(
            LOOPS, some, inputs, positive, kept, (upstream, to_diagonal), convs, both, plans,
            NAMES.index(activation), by_rows(by_x, lines), (*own[:2], *own[6:], *of_samples),
            tuple(own[2:6]), lines,
        )  # fmt: skip

    share(zip(shares, sums, strict=True), work)
    for own in sums[1:]:
        for total, one in zip(sums[0], own, strict=True):
            total += one  # not by torch, whose threads would have to wake up
    by_bias1, by_bias2, *by_three, by_dense = map(torch.from_numpy, sums[0][:6])
    for shift, one in zip((shift1, shift2), sums[0][6:], strict=False):  # none, if not shared
        assert shift is not None
        by_pixel = one[..., : lines.pixels].reshape(1, hidden, lines.rows, -1, lines.group).sum(-1)
        by_map = torch.from_numpy(by_pixel).view(1, hidden, *x.shape[2:])
        by_shifts.append(by_map.sum_to_size(shift.shape))
    if by_weights:
        by_three = [one.view(shape) for one, shape in zip(by_three, shapes, strict=True)]
        blocks = by_dense.view(colours, units, colours, units)
        by_joined = torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)
        _add_gradient_by_centres(by_joined, weights, by_three)
    found = (by_x, by_bias1, by_bias2, *by_three, *by_shifts)
    return [one for one in found if one is not None]


def _zeros_like(shift: Tensor | None) -> Tensor | None:
    if shift is None:
        return None
    return torch.zeros_like(shift, memory_format=torch.contiguous_format)


def _backward_fake(  # noqa: PLR0913 (tensors, one by one)
    x: Tensor, h1: Tensor, h2: Tensor, by_y: Tensor, by_diagonal: Tensor, weight1: Tensor,
    weight2: Tensor, weight3: Tensor, t: Tensor, order: str, triangle: str,
    activation: str, by_weights: bool, group: int, shift1: Tensor | None = None,
    shift2: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    contiguous = torch.contiguous_format
    by_x = torch.empty_like(x, memory_format=contiguous)
    biases = x.new_empty(len(weight2)), x.new_empty(len(weight2))
    weights = (
        torch.empty_like(one, memory_format=contiguous) if by_weights else x.new_empty(0, 0, 0)
        for one in (weight1, weight2, weight3)
    )
    shifts = (_zeros_like(shift) for shift in (shift1, shift2))
    return [one for one in (by_x, *biases, *weights, *shifts) if one is not None]


layer_op = register(
    "mint_layer_cpu(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
    "Tensor weight3, Tensor bias3, Tensor t, str order, str triangle, "
    "str activation, bool diagonal, bool keep, SymInt group, Tensor? shift1=None, "
    "Tensor? shift2=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer,
    _layer_fake,
    devices=("CPU",),
)
backward_op = register(
    "mint_layer_cpu_backward(Tensor x, Tensor h1, Tensor h2, Tensor by_y, Tensor by_diagonal, "
    "Tensor weight1, Tensor weight2, Tensor weight3, Tensor t, str order, "
    "str triangle, str activation, bool by_weights, SymInt group, Tensor? shift1=None, "
    "Tensor? shift2=None) -> Tensor[]",
    _backward,
    _backward_fake,
    devices=("CPU",),
)


def products(plans: Sequence[Plan | Conv], lines: Lines, groups: int) -> int:
    """Multiply-adds of masked convolutions, or of gradients by their weights, for some groups.

    Lines are multiplied whole, so the zeros at their ends count, and taps to the left and right of
    an image; rows above and below it are skipped. What is done element by element does not count.

    Args:
        plans: tiles and taps; what follows them is not read.
    """
    done = 0
    for tiles, taps, *_ in plans:
        rows = np.maximum(0, lines.height - abs(taps[:, 0]))  # where the tap is within the image
        rows *= np.maximum(0, lines.rows // lines.height - abs(taps[:, 5]))
        outputs = np.repeat(tiles[:, 1], tiles[:, 3] - tiles[:, 2])
        done += int((outputs * (taps[:, 3] - taps[:, 2]) * rows).sum())
    return done * lines.length * groups


@register_flop_formula(layer_op.overloadpacket, get_raw=True)
def _layer_flops(x: Tensor, *parts_and_structure: Any, out_val: object) -> int:
    weights = parts_and_structure[:6:2]
    order, triangle, _, diagonal, _, group = parts_and_structure[7:13]
    colours = len(weights[2])
    plans = [_plan_of(one.shape, colours, order, triangle, MOST) for one in weights]
    if diagonal:
        plans.append(_plan_of((*weights[1].shape[:2], 1, 1), colours, "own", triangle, MOST))
    lines = lines_of(x.shape[2:], group, _radius(weights))
    return 2 * products(plans, lines, ceil_divide(len(x), lines.group))


@register_flop_formula(backward_op.overloadpacket, get_raw=True)
def _backward_flops(x: Tensor, h1: Tensor, *arguments: Any, out_val: object) -> int:
    weights = arguments[3:6]
    order, triangle, _, by_weights, group = arguments[7:12]
    colours, shapes = len(weights[2]), [one.shape for one in weights]
    plans = [
        _plan_of((inputs, outputs, *kernel), colours, order, opposite(triangle), MOST)
        for outputs, inputs, *kernel in shapes
    ]
    plans += [_plan_of((*shapes[1][:2], 1, 1), colours, "own", triangle, MOST)] * 2
    if by_weights:
        plans += _plans_of_gradient(shapes, colours, order, triangle)
    lines = lines_of(x.shape[2:], group, _radius(weights))
    return 2 * products(plans, lines, ceil_divide(len(x), lines.group))


class _MintLayer(torch.autograd.Function):
    """Saves x and both hidden layers, or x alone. Differentiated again, it is plain PyTorch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, structure: Structure, diagonal: bool, recompute: bool, group: int,
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.structure, ctx.group = structure, group
        ctx.diagonal, ctx.recompute = diagonal, recompute
        keep = not recompute
        y, to_diagonal, h1, h2 = layer_op(
            x, *parts[:7], *structure, diagonal, keep, group, *parts[7:]
        )
        ctx.save_for_backward(x, *parts, *(() if recompute else (h1, h2)))
        return y, to_diagonal

    @staticmethod
    def backward(ctx: Any, by_y: Tensor, by_diagonal: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors  # once: what unpacks them may do so once only
        parts, hidden = saved[:9], saved[9:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            by_x, *of_parts = _plain_gradients(ctx, x, parts, by_y, by_diagonal)
            return by_x, *[None] * 4, *of_parts
        weight1, _, weight2, _, weight3, _, t, *shifts = parts
        if ctx.recompute:
            _, _, h1, h2 = layer_op(x, *parts[:7], *ctx.structure, False, True, ctx.group, *shifts)
        else:
            h1, h2 = hidden
        if not ctx.diagonal:
            by_diagonal = torch.zeros_like(by_y)
        needed = ctx.needs_input_grad[5:]
        by_weights = any(needed[:6])
        by_x, by_bias1, by_bias2, by_weight1, by_weight2, by_weight3, *by_shifts = backward_op(
            x, h1, h2, by_y, by_diagonal, weight1, weight2, weight3, t, *ctx.structure,
            by_weights, ctx.group, *shifts,
        )  # fmt: skip
        by_parts: list[Tensor | None] = [None] * 9
        if by_weights:
            by_bias3 = by_y.sum((0, *range(2, by_y.ndim)))
            by_parts[:6] = by_weight1, by_bias1, by_weight2, by_bias2, by_weight3, by_bias3
        if needed[6]:
            by_t = by_y * x + by_diagonal
            batched = t.ndim == x.ndim
            by_parts[6] = by_t if t.shape == x.shape else by_t.sum(0, keepdim=batched)
        if by_shifts:
            by_parts[7:] = by_shifts
        return by_x, *[None] * 4, *by_parts


def _plain_gradients(
    ctx: Any, x: Tensor, parts: Sequence[Tensor], by_y: Tensor, by_diagonal: Tensor
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: of the same layer, computed by plain PyTorch."""
    order, triangle, activation = ctx.structure
    inputs = [x, *parts]
    weights, (shift1, shift2) = with_centres(*parts[:7]), parts[7:]
    function = find_activation(activation)
    # What else a context changes is done outside.
    nothing = torch.zeros_like(x)
    condition = None if shift1 is None else Condition(shift1, shift2, nothing, nothing + 1)
    results = reference.mint_forward(
        x, weights, function, order, triangle, reference.call_plainly, condition
    )
    is_needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
    wanted = [one for one, needed in zip(inputs, is_needed, strict=True) if needed]
    outputs = 2 if ctx.diagonal else 1
    found = iter(
        torch.autograd.grad(
            results[:outputs], wanted, (by_y, by_diagonal)[:outputs], create_graph=True,
            allow_unused=True,
        )
    )  # fmt: skip
    return [next(found) if needed else None for needed in is_needed]


def packed_forward(
    x: Tensor,
    packed: Packed,
    t: Tensor,
    activation: str,
    diagonal: bool,
    condition: Condition | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`mint_forward`, of weights that are packed already, and without gradients."""
    group = group_of(x.shape[0], x.shape[-1])
    x = x.detach().resolve_neg()  # as torch does for operators
    shift1, shift2, shift3, _ = condition or (None,) * 4
    if condition is not None:
        packed = packed._replace(t=_of_samples(scaled(t, condition), x.ndim - 2))
    y, to_diagonal, _, _ = run_forward(
        x, packed, (shift1, shift2), activation, diagonal, False, group
    )
    return shifted(y, shift3), to_diagonal


def mint_forward(
    x: Tensor,
    weights: MintWeights,
    structure: Structure,
    diagonal: bool = True,
    recompute: bool = False,
    condition: Condition | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`.reference.mint_forward`, of float32 tensors, for this package's activations.

    Args:
        diagonal: whether it is wanted; else it is empty.
        recompute: keep x alone for the backward pass, and compute the hidden layers again there.
    """
    shift1, shift2, shift3, _ = condition or (None,) * 4
    parts = (*weights[:6], scaled(weights.t, condition), shift1, shift2)
    group = group_of(x.shape[0], x.shape[-1])
    if torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (x, *parts)
    ):
        y, to_diagonal = _MintLayer.apply(  # type: ignore[no-untyped-call]  # apply is untyped
            x, structure, diagonal, recompute, group, *parts
        )
    else:
        y, to_diagonal, _, _ = layer_op(
            x, *parts[:7], *structure, diagonal, False, group, *parts[7:]
        )
    return shifted(y, shift3), to_diagonal
