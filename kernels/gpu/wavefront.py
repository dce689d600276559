"""The wavefront of :mod:`.fronts`, a launch for each front.

A program solves some unknowns of one colour, with all of its hidden units: what the known variables
contribute is three masked convolutions (:mod:`.masked_conv`) at these unknowns alone, and Newton's
method goes on from their sums. What a front needs, earlier launches wrote: nothing waits within a
kernel or on the host, programs may run in any order, and a CUDA graph can hold the whole.

Why no program for each image, without launches? The layers of a CIFAR-10 flow have 102, 90 and 210
fronts. In a graph a launch costs about 2 us, 0.2 to 0.4 ms a layer, while a colour's work in one
front, up to 9 taps of 255 channels for 85 units, keeps a program busy for tens of microseconds. At
64 images, programs for each would leave half of a GPU idle, and would solve the colours of a front,
up to 3, 12 and 6 of them, one after the other.

x and the hidden layers begin as zeros. Blocks of channels are rounded out beyond what a mask shows,
to variables of later fronts and to the unknowns themselves: what is read there is zero, so that
neither the weights there nor an overflow elsewhere matter.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mintnet_triton.kernels import fronts
from mintnet_triton.kernels.activation import Activation
from mintnet_triton.kernels.fronts import Slopes, Wave, as_lower, empty_wave, steepest_share
from mintnet_triton.kernels.gpu import configs, launching
from mintnet_triton.kernels.gpu.activation import activate, slope
from mintnet_triton.kernels.gpu.masked_conv import add_conv, first_block, seen_inputs
from mintnet_triton.kernels.gpu.weights import kernel_size, pack
from mintnet_triton.kernels.reference import MintWeights

STEPS = tl.constexpr(fronts.STEPS)
SLACK = tl.constexpr(fronts.SLACK)
SOLVED = tl.constexpr(fronts.SOLVED)
#: channels that a sum of one output adds at once
WIDE = tl.constexpr(64)


@triton.jit
def bend(a, slopes, place, mask, ACTIVATION: tl.constexpr):
    """h(a) and its slope; where slopes are "given", they are read and ``h(a) = s a``."""
    if ACTIVATION == "given":
        s = tl.load(slopes + place, mask=mask, other=0.0)
        h = s * a
    else:
        h = activate(a, ACTIVATION)
        s = slope(h, ACTIVATION)
    return h, s


@triton.jit
def sum_conv(
    h,
    offset,
    row,
    column,
    valid,
    height,
    width,
    stride,
    weight,
    colour,
    units,
    colours,
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """As :func:`.masked_conv.add_conv`, of one output channel: a sum, not a matrix product."""
    total = tl.zeros((BLOCK_M, WIDE), ACCUMULATOR)
    RADIUS: tl.constexpr = KERNEL // 2
    for dy in tl.static_range(-RADIUS, RADIUS + 1):
        for dx in tl.static_range(-RADIUS, RADIUS + 1):
            low, high = seen_inputs(
                colour, colour, units, colours, dy * KERNEL + dx, ORDER, "below"
            )
            inside = (
                valid
                & (row + dy >= 0)
                & (row + dy < height)
                & (column + dx >= 0)
                & (column + dx < width)
            )
            rows = h + offset + (dy * width + dx) * stride
            tap = (dy + RADIUS) * KERNEL + dx + RADIUS
            for start in range(first_block(low, high, WIDE), high, WIDE):
                k = start + tl.arange(0, WIDE)
                a = tl.load(
                    rows[:, None] + k[None, :],
                    mask=inside[:, None] & (k < stride)[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight + (tap * colours + colour) * stride + k, mask=k < stride, other=0.0
                )
                total += a * w[None, :]
    return tl.sum(total, 1)


# What a launch is for changes from front to front, and must compile nothing anew.
@triton.jit(do_not_specialize=["samples", "first_colour", "first_plane"])
def wavefront_kernel(
    x,  # (samples, colours, height, width), as diagonal, error, steps and z
    diagonal,
    error,
    steps,
    h1,  # (samples, height, width, stride)
    h2,
    z,
    t,
    share,  # (colours,)
    weight1,
    bias1,
    weight2,
    bias2,
    weight3,
    bias3,
    centre1,  # (colours, units)
    centre2,  # (colours * units, centre_width)
    centre3,  # (colours, units)
    slopes1,  # as h1 and h2, where slopes are given
    slopes2,
    samples,
    first_colour,
    first_plane,
    height,
    width,
    stride,
    width1,  # of weight1
    centre_width,
    units,
    colours,
    ACTIVATION: tl.constexpr,
    KERNEL1: tl.constexpr,
    KERNEL2: tl.constexpr,
    KERNEL3: tl.constexpr,
    SKEW: tl.constexpr,
    ORDER: tl.constexpr,
    EPSILON: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OWN: tl.constexpr,  # as BLOCK_K, of a colour's own units
):
    """Solve some unknowns of a front: of one colour, those with ``SKEW * row + column = plane``.

    ``first_plane`` is that of ``first_colour``; a colour's is SKEW^2 before that of the last one.
    """
    colour = first_colour + tl.program_id(1)
    plane = first_plane - SKEW * SKEW * tl.program_id(1)
    top = tl.maximum(plane - width + SKEW, 0) // SKEW
    rows = tl.minimum(plane // SKEW + 1, height) - top
    if tl.program_id(0) * BLOCK_M >= samples * rows:
        return
    unknown = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = unknown < samples * rows
    sample, row = unknown // rows, top + unknown % rows
    column = plane - SKEW * row
    area = height * width
    outputs = units * colours
    within = row * width + column
    pixel = sample.to(tl.int64) * area + within
    place = (sample.to(tl.int64) * colours + colour) * area + within
    own = pixel * stride + colour * units
    unit = tl.arange(0, BLOCK_N)
    inside = valid[:, None] & (unit < units)[None, :]
    # Lanes beyond the units do what the last one does, with an outer weight of zero.
    n = colour * units + tl.minimum(unit, units - 1)

    known2 = add_conv(
        tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR), h1, pixel * stride, row, column, valid,
        height, width, width * stride, stride, 1, stride, weight2, stride, n, outputs, units, units,
        colours, KERNEL2, ORDER, "below", PRECISION, BLOCK_K,
    ) + tl.load(bias2 + n)[None, :]  # fmt: skip
    known3 = sum_conv(
        h2, pixel * stride, row, column, valid, height, width, stride, weight3, colour, units,
        colours, KERNEL3, ORDER, ACCUMULATOR, BLOCK_M,
    ) + tl.load(bias3 + colour)  # fmt: skip
    known1 = add_conv(
        tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR), x, sample.to(tl.int64) * colours * area + within,
        row, column, valid, height, width, width, 1, area, colours, weight1, width1, n, outputs, 1,
        units, colours, KERNEL1, ORDER, "below", PRECISION, BLOCK_K,
    ) + tl.load(bias1 + n)[None, :]  # fmt: skip
    # Blocks of it are read in each step, and h1 is not needed before the last.
    tl.store(h1 + own[:, None] + unit[None, :], known1, mask=inside)
    tl.debug_barrier()

    outer = tl.load(centre3 + colour * units + unit, mask=unit < units, other=0.0)[None, :]
    t_value = tl.load(t + colour * area + within, mask=valid, other=1.0)
    z_value = tl.load(z + place, mask=valid, other=0.0)
    x_value = (z_value - known3) / (t_value + tl.load(share + colour))
    x_value = tl.where(tl.abs(x_value) < float("inf"), x_value, 0.0)
    high = tl.full((BLOCK_M,), float("inf"), ACCUMULATOR)
    low = -high
    earlier = high  # the width of the bracket two steps ago
    g = tl.zeros((BLOCK_M,), ACCUMULATOR)
    rate = g
    step = 0
    running = valid
    going = tl.max(valid.to(tl.int32), 0) > 0
    LIMIT: tl.constexpr = 2 if ACTIVATION == "given" else STEPS
    while going:
        a2 = known2
        rate2 = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        for start in range(0, units, BLOCK_OWN):
            k = start + tl.arange(0, BLOCK_OWN)
            here = valid[:, None] & (k < units)[None, :]
            inner = tl.load(centre1 + colour * units + k, mask=k < units, other=0.0)[None, :]
            a1 = tl.load(h1 + own[:, None] + k[None, :], mask=here, other=0.0)
            a1 += x_value[:, None] * inner
            h, s = bend(a1, slopes1, own[:, None] + k[None, :], here, ACTIVATION)
            w = tl.load(
                centre2 + n[None, :] * centre_width + k[:, None],
                mask=(k < centre_width)[:, None],
                other=0.0,
            )
            a2 = tl.dot(h, w, a2, input_precision=PRECISION, out_dtype=ACCUMULATOR)
            rate2 = tl.dot(s * inner, w, rate2, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        h, s = bend(a2, slopes2, own[:, None] + unit[None, :], inside, ACTIVATION)
        tl.store(h2 + own[:, None] + unit[None, :], h, mask=inside)
        # Loaded in each step: held through its products, they would cost registers.
        t_value = tl.load(t + colour * area + within, mask=valid, other=1.0)
        z_value = tl.load(z + place, mask=valid, other=0.0)
        rate = t_value + tl.sum(outer * s * rate2, 1)
        g = tl.sum(outer * h, 1) + known3 + t_value * x_value - z_value
        size = tl.sum(tl.abs(outer * h), 1) + tl.abs(known3)
        size += tl.abs(t_value * x_value) + tl.abs(z_value)
        running = running & (tl.abs(g) < float("inf")) & (tl.abs(g) > SOLVED * EPSILON * size)
        new = x_value - g / rate
        if ACTIVATION != "given":  # for then this step is exact
            steep = (t_value + tl.load(share + colour)) * (1 + SLACK * EPSILON)
            flat = t_value * (1 - SLACK * EPSILON)
            # The root is where both bounds of the slope say.
            before = high - low
            near, far = x_value - g / steep, x_value - g / flat
            low = tl.maximum(low, tl.minimum(near, far))
            high = tl.minimum(high, tl.maximum(near, far))
            bracket = high - low
            trusted = (low <= new) & (new <= high) & ~(bracket > 0.5 * earlier)
            new = tl.where(trusted, new, low + 0.5 * bracket)
            earlier = tl.where(trusted, before, bracket)
        running = running & (tl.abs(new) < float("inf")) & (new != x_value)
        step += 1
        # The last step ends with values that belong to x.
        going = (tl.max(running.to(tl.int32), 0) > 0) & (step < LIMIT)
        x_value = tl.where(running & going, new, x_value)
        tl.store(steps + place, tl.minimum(step, LIMIT - 1).to(tl.int64), mask=running)

    for start in range(0, units, BLOCK_OWN):
        k = start + tl.arange(0, BLOCK_OWN)
        here = valid[:, None] & (k < units)[None, :]
        inner = tl.load(centre1 + colour * units + k, mask=k < units, other=0.0)[None, :]
        a1 = tl.load(h1 + own[:, None] + k[None, :], mask=here, other=0.0)
        a1 += x_value[:, None] * inner
        h, _ = bend(a1, slopes1, own[:, None] + k[None, :], here, ACTIVATION)
        tl.debug_barrier()
        tl.store(h1 + own[:, None] + k[None, :], h, mask=here)
    tl.store(x + place, x_value, mask=valid)
    tl.store(diagonal + place, rate, mask=valid)
    tl.store(error + place, g, mask=valid)


def wavefront(
    z: Tensor, weights: MintWeights, hidden: Activation | Slopes, order: str, triangle: str
) -> Wave:
    """As :func:`.fronts.wavefront`, for this package's activations; float32 is multiplied exactly.

    It never waits for the device.
    """
    return as_lower(_solve, z, weights, hidden, order, triangle)


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


@torch.no_grad()
def _solve(z: Tensor, weights: MintWeights, hidden: Activation | Slopes, order: str) -> Wave:
    z = z.contiguous()
    wave = empty_wave(z)
    if not z.numel():
        return wave
    batch, colours, height, width = z.shape
    units = weights.centre1.shape[1]
    weight1, weight2, weight3, centre2 = (
        pack(weight, z.dtype)
        for weight in (*weights[:6:2], weights.centre2.reshape(-1, units, 1, 1))
    )
    kernels = [kernel_size(weight) for weight in (weight1, weight2, weight3)]
    skew = max(kernels) // 2 + 1
    stride = weight2.shape[2]
    h1, h2 = (z.new_zeros(batch, height, width, stride) for _ in range(2))
    wave.x.zero_()
    wave.steps.zero_()
    slopes: tuple[Tensor | None, ...] = (None, None)
    if isinstance(hidden, Slopes):
        slopes = (torch.empty_like(h1), torch.empty_like(h2))
        for stored, one in zip(slopes, hidden, strict=True):
            stored[..., : units * colours] = one.permute(0, 2, 3, 1)
    tile = configs.wavefront_tile(units)
    most = batch * min(height, -(-width // skew))  # unknowns of a colour in a front
    arguments = (
        *wave, h1, h2, z, weights.t.contiguous(), steepest_share(weights, hidden),
        weight1, weights.bias1.contiguous(), weight2, weights.bias2.contiguous(),
        weight3, weights.bias3.contiguous(),
        weights.centre1.contiguous(), centre2, weights.centre3.contiguous(), *slopes, batch,
    )  # fmt: skip
    for first, active, plane in launches(colours, height, width, skew, order):
        launching.launch(
            wavefront_kernel,
            (triton.cdiv(most, tile.block_m), active),
            *arguments, first, plane, height, width, stride, weight1.shape[2], centre2.shape[2],
            units, colours,
            ACTIVATION="given" if isinstance(hidden, Slopes) else hidden.name,
            KERNEL1=kernels[0], KERNEL2=kernels[1], KERNEL3=kernels[2], SKEW=skew, ORDER=order,
            EPSILON=torch.finfo(z.dtype).eps, BLOCK_OWN=min(tile.block_k, tile.block_n),
            **launching.numerics(z.dtype, "ieee"), **launching.blocks(tile),
        )  # fmt: skip
    return wave
