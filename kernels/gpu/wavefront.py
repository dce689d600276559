"""The wavefront of :mod:`.fronts`, a launch for each front.

A program solves some unknowns of one colour, with all of its hidden units: what the known variables
contribute is three masked convolutions (:mod:`.convolution`) at these unknowns alone, and Newton's
method goes on from their sums. What a front needs, earlier launches wrote: nothing waits within a
kernel or on the host, programs may run in any order, and a CUDA graph can hold the whole.

Why no program for each image, without launches? The layers of a CIFAR-10 flow have 102, 90 and 210
fronts, and what a colour has to do in one, up to 9 taps of 255 channels for 85 units, takes longer
than a launch in a graph. At 64 images, programs for each would leave half of a GPU idle, and would
solve the colours of a front, up to 3, 12 and 6 of them, one after the other.

x and the hidden layers are canvases (:mod:`.canvas`) that begin as zeros. Blocks of channels are
rounded out beyond what a mask shows, to variables of later fronts and to the unknowns themselves:
what is read there is zero, so that neither the weights there nor an overflow elsewhere matter.

A program has a *room* in memory for what is known, and for the operands of a step's products: held
in registers, they would leave a core to one program, which often waits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from mintnet_triton.kernels import fronts
from mintnet_triton.kernels.activation import Activation
from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.fronts import Slopes, Wave, as_lower, empty_wave, steepest_share
from mintnet_triton.kernels.gpu import configs, launching
from mintnet_triton.kernels.gpu.activation import activate, slope
from mintnet_triton.kernels.gpu.canvas import given, load_given, new_canvas, padded, position
from mintnet_triton.kernels.gpu.convolution import add_conv, add_taps, seen_inputs
from mintnet_triton.kernels.gpu.weights import pack_alone
from mintnet_triton.kernels.reference import Condition, MintWeights

STEPS = tl.constexpr(fronts.STEPS)
SLACK = tl.constexpr(fronts.SLACK)
SOLVED = tl.constexpr(fronts.SOLVED)
#: channels that a sum of one output adds at once
WIDE = tl.constexpr(64)
#: what a room holds: of each unknown and unit, and of each unknown
TILES, LINES = tl.constexpr(4), tl.constexpr(3)


class Layers(NamedTuple):
    """Canvases of what is solved, and zero elsewhere."""

    x: Tensor  # its colours padded to a multiple of 16
    h1: Tensor
    h2: Tensor


@triton.jit
def sum_conv(
    total, rows, weights, colour, units, colours, stride, pitch, KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
):  # fmt: skip
    """As :func:`.convolution.add_conv`, of one output channel: a sum, not a matrix product."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    for tap in tl.static_range(TAPS):
        _, high = seen_inputs(colour, colour, units, colours, tap - TAPS // 2, ORDER, "below")
        distance = (tap // KERNEL - KERNEL // 2) * pitch + tap % KERNEL - KERNEL // 2
        for start in range(0, high, WIDE):
            k = start + tl.arange(0, WIDE)
            held = k < stride
            at = rows[:, None] + (distance * stride + k)[None, :]
            w = tl.load(weights + tap * colours * stride + k, mask=held, other=0.0)
            total += tl.load(at, mask=held[None, :], other=0.0) * w[None, :]
    return tl.sum(total, 1)


@triton.jit
def bend(a, slopes, at, ACTIVATION: tl.constexpr):
    """h(a); where slopes are "given", ``h(a) = s a``."""
    return tl.load(slopes + at) * a if ACTIVATION == "given" else activate(a, ACTIVATION)


@triton.jit
def slope_of(h, slopes, at, ACTIVATION: tl.constexpr):
    """h'(a), read off h(a), or given."""
    return tl.load(slopes + at) if ACTIVATION == "given" else slope(h, ACTIVATION)


# What a launch is for changes from front to front, and must compile nothing anew.
@triton.jit(do_not_specialize=["samples", "first_colour", "first_plane"])
def wavefront_kernel(
    wave,  # a Wave, to be written
    layers,  # Layers, to be written where they are solved
    rooms,  # (programs, size of a room)
    z,  # (samples, colours, height, width), contiguous
    weights,  # MintWeights, packed
    share,  # (colours,): by how much a slope may exceed t
    slopes,  # Slopes, contiguous, if they are given
    shifts,  # two Images, of both hidden layers; or None, twice
    samples, first_colour, first_plane, canvas, units, colours, ACTIVATION: tl.constexpr,
    KERNELS: tl.constexpr, ORDER: tl.constexpr, OWN_T: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Solve some unknowns of a front: of one colour, those with ``skew * row + column = plane``.

    ``first_plane`` is that of ``first_colour``; a colour's is skew^2 before that of the last one.
    With OWN_T, t is one for each sample, as z is.
    """
    BLOCK_M: tl.constexpr = BLOCKS[0]
    BLOCK_N: tl.constexpr = BLOCKS[1]
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    F: tl.constexpr = z.dtype.element_ty
    EPSILON: tl.constexpr = 2.0**-52 if F == tl.float64 else 2.0**-23
    skew, pitch = canvas.radius + 1, canvas.width + canvas.radius
    area, outputs = canvas.height * canvas.width, units * colours
    stride, stride_x = padded(outputs), padded(colours)
    colour = first_colour + tl.program_id(1)
    plane = first_plane - skew * skew * tl.program_id(1)
    top = tl.maximum(plane - canvas.width + skew, 0) // skew
    rows = tl.minimum(plane // skew + 1, canvas.height) - top
    if tl.program_id(0) * BLOCK_M >= samples * rows:
        return
    # Lanes beyond the unknowns, or the units, do what the last one does.
    unknown = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = unknown < samples * rows
    unknown = tl.minimum(unknown, samples * rows - 1)
    sample, row = unknown // rows, top + unknown % rows
    column = plane - skew * row
    p = position((sample * canvas.height + row) * pitch + column, sample, canvas)
    pixel = row * canvas.width + column
    place = (sample.to(tl.int64) * colours + colour) * area + pixel
    lane = tl.arange(0, BLOCK_N)
    unit = tl.minimum(lane, units - 1)
    n = colour * units + unit
    given = (sample.to(tl.int64) * outputs + colour * units) * area + pixel
    given = given[:, None] + unit[None, :] * area

    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    room = rooms + program * (TILES * SIZE + LINES * BLOCK_M)
    line = room + TILES * SIZE + tl.arange(0, BLOCK_M)
    room += tl.arange(0, BLOCK_M) * BLOCK_N
    tile = room[:, None] + lane[None, :]
    known = add_conv(
        tl.zeros((BLOCK_M, BLOCK_N), F), layers.x + p * stride_x, weights.weight1 + n * stride_x,
        colour, colour, 1, colours, stride_x, outputs * stride_x, pitch, KERNELS[0], ORDER,
        "below", "ieee", True, 16,
    )  # fmt: skip
    known += tl.load(weights.bias1 + n)[None, :]
    if shifts[0] is not None:
        known += load_given(shifts[0], sample, row, column, n, None, None)
    tl.store(tile, known)
    known = add_conv(
        tl.zeros((BLOCK_M, BLOCK_N), F), layers.h1 + p * stride, weights.weight2 + n * stride,
        colour, colour, units, colours, stride, outputs * stride, pitch, KERNELS[1], ORDER,
        "below", "ieee", BLOCKS[5], BLOCKS[2],
    )  # fmt: skip
    known += tl.load(weights.bias2 + n)[None, :]
    if shifts[1] is not None:
        known += load_given(shifts[1], sample, row, column, n, None, None)
    tl.store(tile + SIZE, known)
    known = sum_conv(
        tl.zeros((BLOCK_M, WIDE), F), layers.h2 + p * stride, weights.weight3 + colour * stride,
        colour, units, colours, stride, pitch, KERNELS[2], ORDER,
    ) + tl.load(weights.bias3 + colour)  # fmt: skip
    t, aim = tl.load(weights.t + (place if OWN_T else colour * area + pixel)), tl.load(z + place)
    tl.store(line, known)
    tl.store(line + BLOCK_M, t)
    tl.store(line + 2 * BLOCK_M, aim)
    tl.debug_barrier()

    joined = colour * BLOCK_N + lane
    x = (aim - known) / (t + tl.load(share + colour))
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    high = tl.full((BLOCK_M,), float("inf"), F)
    low, earlier = -high, high  # earlier: the width of the bracket two steps ago
    g, rate, h2 = high, high, tl.zeros((BLOCK_M, BLOCK_N), F)  # of the last step
    step, steps, running = 0, tl.zeros((BLOCK_M,), tl.int32), valid
    LIMIT: tl.constexpr = 2 if ACTIVATION == "given" else STEPS
    while tl.max(running.to(tl.int32), 0) > 0:
        a1 = tl.load(tile) + x[:, None] * tl.load(weights.centre1 + joined)[None, :]
        tl.store(tile + 2 * SIZE, bend(a1, slopes[0], given, ACTIVATION))
        tl.debug_barrier()
        # Of what is stored: Triton may compute h twice, once for each layout that it is used in.
        s = slope_of(tl.load(tile + 2 * SIZE), slopes[0], given, ACTIVATION)
        tl.store(tile + 3 * SIZE, s * tl.load(weights.centre1 + joined)[None, :])
        a2 = add_taps(
            tl.load(tile + SIZE), room + 2 * SIZE, weights.centre2 + joined * BLOCK_N, 0, units,
            0, 0, 0, 0, 1, 1, "ieee", True, BLOCKS[3],
        )  # fmt: skip
        tl.debug_barrier()
        rate2 = add_taps(
            tl.zeros((BLOCK_M, BLOCK_N), F), room + 3 * SIZE,
            weights.centre2 + joined * BLOCK_N, 0, units, 0, 0, 0, 0, 1, 1, "ieee", True, BLOCKS[3],
        )  # fmt: skip
        outer = tl.load(weights.centre3 + joined)[None, :]
        h2 = bend(a2, slopes[1], given, ACTIVATION)
        s = slope_of(h2, slopes[1], given, ACTIVATION)
        known, t, aim = tl.load(line), tl.load(line + BLOCK_M), tl.load(line + 2 * BLOCK_M)
        rate = t + tl.sum(outer * s * rate2, 1)
        g = tl.sum(outer * h2, 1) + known + t * x - aim
        size = tl.sum(tl.abs(outer * h2), 1) + tl.abs(known) + tl.abs(t * x) + tl.abs(aim)
        new = x - g / rate
        if ACTIVATION != "given":  # for then this step is exact
            steep = (t + tl.load(share + colour)) * (1 + SLACK * EPSILON)
            flat = t * (1 - SLACK * EPSILON)
            # The root is where both bounds of the slope say.
            before, near, far = high - low, x - g / steep, x - g / flat
            low = tl.maximum(low, tl.minimum(near, far))
            high = tl.minimum(high, tl.maximum(near, far))
            bracket = high - low
            trusted = (low <= new) & (new <= high) & ~(bracket > 0.5 * earlier)
            new = tl.where(trusted, new, low + 0.5 * bracket)
            earlier = tl.where(trusted, before, bracket)
        step += 1
        # The last step ends with values that belong to x.
        running &= (tl.abs(g) < float("inf")) & (tl.abs(g) > SOLVED * EPSILON * size)
        running &= (tl.abs(new) < float("inf")) & (new != x) & (step < LIMIT)
        x = tl.where(running, new, x)
        steps += running.to(tl.int32)

    at = (p * stride + colour * units)[:, None] + lane[None, :]
    solved = valid[:, None] & (lane < units)[None, :]
    tl.store(layers.h1 + at, tl.load(tile + 2 * SIZE), mask=solved)
    tl.store(layers.h2 + at, h2, mask=solved)
    tl.store(layers.x + p * stride_x + colour, x, mask=valid)
    tl.store(wave.x + place, x, mask=valid)
    tl.store(wave.diagonal + place, rate, mask=valid)
    tl.store(wave.error + place, g, mask=valid)
    tl.store(wave.steps + place, steps.to(tl.int64), mask=valid)


def wavefront(
    z: Tensor,
    weights: MintWeights,
    hidden: Activation | Slopes,
    order: str,
    triangle: str,
    condition: Condition | None = None,
) -> Wave:
    """As :func:`.fronts.wavefront`, for this package's activations; float32 is multiplied exactly.

    It never waits for the device.
    """
    return as_lower(_solve, z, weights, hidden, order, triangle, condition)


def launches(
    colours: int, height: int, width: int, skew: int, order: str
) -> Iterator[tuple[int, int, int]]:
    """For each front: its first colour, how many colours it has, and the plane of the first one."""
    planes = skew * (height - 1) + width
    if order == "pixel":
        for plane in range(planes):
            for colour in range(colours):
                yield colour, 1, plane
        return
    delay = skew**2
    for front in range(planes + delay * (colours - 1)):
        first = max(0, -((planes - 1 - front) // delay))
        last = min(colours - 1, front // delay)
        if first <= last:
            yield first, last - first + 1, front - delay * first


def pack(weights: MintWeights, order: str, block_n: int) -> MintWeights:
    """Weights of a lower triangle as the kernel reads them: centres, too, have rows of a tile."""
    colours, units = weights.centre1.shape
    convs = [
        pack_alone(one.contiguous(), colours, (order, "lower"), one.dtype, "ieee", False, False)
        for one in weights[:6:2]
    ]
    bias1, bias2, bias3 = (one.contiguous() for one in weights[1:6:2])
    more = (0, block_n - units)
    centre2 = pad(weights.centre2, 2 * more).contiguous()
    centres = pad(weights.centre1, more), centre2, pad(weights.centre3, more)
    return MintWeights(
        convs[0], bias1, convs[1], bias2, convs[2], bias3, *centres, weights.t.contiguous()
    )


@torch.no_grad()
def _solve(
    z: Tensor,
    weights: MintWeights,
    hidden: Activation | Slopes,
    order: str,
    condition: Condition | None,
) -> Wave:
    z = z.contiguous()
    wave = empty_wave(z)
    if not z.numel():
        return wave
    batch, colours, height, width = z.shape
    units = weights.centre1.shape[1]
    kernels = tuple(weight.shape[-1] for weight in weights[:6:2])
    canvas = Canvas(height, width, max(kernels) // 2)
    stride = launching.padded(units * colours)
    channels = launching.padded(colours), stride, stride
    layers = Layers(*(new_canvas(z, canvas, batch, one, z.dtype).zero_() for one in channels))
    tile = configs.wavefront_tile(configs.architecture(z.device), units, stride)
    skew = canvas.radius + 1
    every = [*launches(colours, height, width, skew, order)]
    unknowns = batch * min(height, -(-width // skew))  # of a colour in a front, at most
    programs, active = triton.cdiv(unknowns, tile.blocks.places), max(one[1] for one in every)
    room = tile.blocks.places * (TILES.value * tile.blocks.outputs + LINES.value)
    slopes = (
        tuple(one.contiguous() for one in hidden) if isinstance(hidden, Slopes) else (None,) * 2
    )
    arguments = (
        wave, layers, z.new_empty(programs * active, room), z,
        pack(weights, order, tile.blocks.outputs), steepest_share(weights, hidden), slopes,
        tuple(given(one, z) for one in (condition or (None,) * 2)[:2]), batch,
    )  # fmt: skip
    for colour, active, plane in every:
        launching.launch(
            wavefront_kernel, (programs, active),
            *arguments, colour, plane, canvas, units, colours,
            ACTIVATION="given" if isinstance(hidden, Slopes) else hidden.name, KERNELS=kernels,
            ORDER=order, OWN_T=weights.t.ndim == 4, **tile.launch(),
        )  # fmt: skip
    return wave
