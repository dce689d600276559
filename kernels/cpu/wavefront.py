"""The wavefront of :mod:`.fronts` on a CPU, in float64: matrix products by torch, fronts by numba.

Colours are solved in blocks. What lower blocks contribute to one is a plain product of matrices,
computed at once for the whole image. Within a block, storage is skewed so that all that a front
needs lies in straight lines. Column j of row i is kept in plane ``(r + 1) i + j``, with r the
largest kernel's radius: the unknowns of one colour in one plane are solved at once, and a tap of a
kernel points the same way from everywhere. A plane has a line for each hidden unit, and a line has
a lane for each row and each sample of a group. So a convolution is a sum of whole lines at
constant distances, and every inner loop runs along lanes. What lies outside the image is never
written and stays zero.

A series is an image of one row. A volume is a stack of images, *slices* here, which have planes of
their own, one slice after the other; those of one front are solved one after the other.

Groups of samples are independent; threads share them.
"""

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mintnet_triton.kernels import fronts
from mintnet_triton.kernels.activation import LEAKY_SLOPE, NAMES, Activation
from mintnet_triton.kernels.canvas import in_space
from mintnet_triton.kernels.cpu._numba import compiled, summing
from mintnet_triton.kernels.cpu.products import PaddedImages, by_tap
from mintnet_triton.kernels.cpu.threads import share
from mintnet_triton.kernels.fronts import (
    Slopes,
    Wave,
    as_lower,
    empty_wave,
    seen_before,
    steepest_share,
)
from mintnet_triton.kernels.reference import Condition, MintWeights, shifted

#: lines that are added at once; :func:`add_lines` spells them out
UNROLL = 8
#: most lanes that Newton's method works on at once: what it touches stays in a near cache
LANES = 128
#: lanes that are added up at once
VECTOR = 8
#: about as many outputs as a block of colours has: more of them skip less, fewer call torch more
BLOCK = 64

STEPS = fronts.STEPS
EPSILON = float(np.finfo(np.float64).eps)
SLACK, SOLVED = fronts.SLACK * EPSILON, fronts.SOLVED * EPSILON

#: activations by number; a linear layer has slopes that are given
LINEAR = -1
ELU, LEAKY_RELU, SOFTPLUS, TANH, SIGMOID = (
    NAMES.index(name) for name in ("elu", "leaky_relu", "softplus", "tanh", "sigmoid")
)


@summing
def add_lines(sums, weights, distances, lines, base, lanes):
    """``sums[k] += sum_n weights[n, k] * lines[base + distances[n]:]``, along some lanes.

    A few more lanes than that are added up: whole vectors are faster than a rest of single ones.

    Args:
        sums: (outputs, lanes or more).
        weights: (N / 8, outputs, 8).
        distances: (N / 8, 8).
    """
    lanes = -(-lanes // VECTOR) * VECTOR
    for n in range(len(weights)):
        d = distances[n]
        h0 = lines[base + d[0] :][:lanes]
        h1 = lines[base + d[1] :][:lanes]
        h2 = lines[base + d[2] :][:lanes]
        h3 = lines[base + d[3] :][:lanes]
        h4 = lines[base + d[4] :][:lanes]
        h5 = lines[base + d[5] :][:lanes]
        h6 = lines[base + d[6] :][:lanes]
        h7 = lines[base + d[7] :][:lanes]
        for k in range(weights.shape[1]):
            w = weights[n, k]
            w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
            line = sums[k]
            for m in range(lanes):
                line[m] += (
                    (w0 * h0[m] + w1 * h1[m])
                    + (w2 * h2[m] + w3 * h3[m])
                    + ((w4 * h4[m] + w5 * h5[m]) + (w6 * h6[m] + w7 * h7[m]))
                )


@compiled
def exp_less_one(a, result, bits):
    """``result = exp(a) - 1`` for a <= 0, to rounding; ``bits`` are those of the result.

    Unlike the C library's it is computed in vectors: with a = n log(2) + r, 2^n is made in the bits
    of the exponent, and exp(r) - 1 for |r| <= log(2) / 2 is a polynomial.
    """
    magic = 1.5 * 2.0**52  # what is added to it is rounded to an integer
    for m in range(len(a)):
        result[m] = max(min(a[m], 0.0), -708.0) * 1.4426950408889634 + magic
    for m in range(len(a)):
        bits[m] = (bits[m] << 52) + (1023 << 52)
    for m in range(len(a)):
        v = max(min(a[m], 0.0), -708.0)
        n = (v * 1.4426950408889634 + magic) - magic
        r = (v - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
        p = 1 / 6227020800
        p = p * r + 1 / 479001600
        p = p * r + 1 / 39916800
        p = p * r + 1 / 3628800
        p = p * r + 1 / 362880
        p = p * r + 1 / 40320
        p = p * r + 1 / 5040
        p = p * r + 1 / 720
        p = p * r + 1 / 120
        p = p * r + 1 / 24
        p = p * r + 1 / 6
        p = p * r + 1 / 2
        result[m] = result[m] * (p * r * r + r) + (result[m] - 1)


@compiled
def bend(activation, a, h, s, scratch, bits):
    """``h = h(a)`` and its slope s along lanes."""
    if activation == ELU:
        exp_less_one(a, scratch, bits)
        for m in range(len(a)):
            h[m] = scratch[m] if a[m] <= 0 else a[m]  # which keeps NaN
            s[m] = scratch[m] + 1 if a[m] <= 0 else 1.0
    elif activation == LEAKY_RELU:
        for m in range(len(a)):
            s[m] = 1.0 if a[m] > 0 else LEAKY_SLOPE
            h[m] = s[m] * a[m]
    elif activation == SOFTPLUS:
        for m in range(len(a)):
            e = math.exp(-abs(a[m]))
            s[m] = (1.0 if a[m] > 0 else e) / (1 + e)
            h[m] = max(a[m], 0.0) + math.log1p(e)
    elif activation == TANH:
        for m in range(len(a)):
            e = math.exp(-2 * abs(a[m]))
            s[m] = 4 * e / ((1 + e) * (1 + e))
            h[m] = math.tanh(a[m])
    elif activation == SIGMOID:
        for m in range(len(a)):
            e = math.exp(-abs(a[m]))
            s[m] = e / ((1 + e) * (1 + e))
            h[m] = (1.0 if a[m] > 0 else e) / (1 + e)
    else:  # identity
        for m in range(len(a)):
            s[m] = 1.0
            h[m] = a[m]


class Unknowns(NamedTuple):
    """What is solved, and what is given for it: along lanes, or of whole colours, flat."""

    x: np.ndarray[Any, Any]
    z: np.ndarray[Any, Any]
    t: np.ndarray[Any, Any]
    diagonal: np.ndarray[Any, Any]
    error: np.ndarray[Any, Any]
    steps: np.ndarray[Any, Any]


@compiled
def solve_lanes(unknowns, hidden, line, known, centres, share, activation, work, flat):
    """Newton's method for some lanes of one colour in one plane, as :func:`.fronts._newton` has it.

    Args:
        unknowns: (lanes,) each; what the known variables contribute to the last convolution has
            been taken from z.
        hidden: both layers, a line for each unit, ``line`` apart, flat.
        known: (units, lanes or more), what the known variables contribute to each of them.
        centres: three, the second (units / 8 rounded up, units, 8).
        work: (2 * units + 8, 2 * LANES), and flat: (4, units * LANES), to write to.
    """
    x, z, t, diagonal, error, steps = unknowns
    h1, h2 = hidden
    known1, known2 = known
    centre1, centre2, centre3 = centres
    units, lanes = len(centre1), len(x)
    padded = 8 * len(centre2)
    # The lanes of h1 and, beside them, those of its derivative by x: one product for both.
    pair, product = work[:padded], work[padded : padded + units]
    # All units in one line: what is done to each value alone is done in the fewest loops.
    a, h, s = flat[0][: units * lanes], flat[1][: units * lanes], flat[2][: units * lanes]
    scratch, bits = flat[3][: units * lanes], flat[3].view(np.int64)[: units * lanes]
    size, running = np.empty(lanes), np.empty(lanes, np.bool_)
    low, high, before, earlier = np.empty(lanes), np.empty(lanes), np.empty(lanes), np.empty(lanes)
    distances = np.arange(padded).reshape(-1, 8) * pair.shape[1]
    pair[units:] = 0
    lines = pair.reshape(-1)
    for m in range(lanes):
        x[m] = z[m] / (t[m] + share)
        if not abs(x[m]) < np.inf:
            x[m] = 0.0
        low[m], high[m], before[m], earlier[m] = -np.inf, np.inf, np.inf, np.inf
        running[m], steps[m] = True, 0
    for iteration in range(STEPS):
        for k in range(units):
            of_unit = a[k * lanes :][:lanes]
            for m in range(lanes):
                of_unit[m] = known1[k, m] + centre1[k] * x[m]
        bend(activation, a, h, s, scratch, bits)
        for k in range(units):
            h_unit, s_unit = h[k * lanes :][:lanes], s[k * lanes :][:lanes]
            for m in range(lanes):
                pair[k, m] = h_unit[m]
                pair[k, lanes + m] = s_unit[m] * centre1[k]
                product[k, m] = known2[k, m]
                product[k, lanes + m] = 0
        add_lines(product, centre2, distances, lines, 0, 2 * lanes)
        for m in range(lanes):
            error[m] = t[m] * x[m] - z[m]
            size[m] = abs(t[m] * x[m]) + abs(z[m])
            diagonal[m] = t[m]
        for k in range(units):
            a[k * lanes :][:lanes] = product[k][:lanes]
        bend(activation, a, h, s, scratch, bits)
        for k in range(units):
            h_unit, s_unit = h[k * lanes :][:lanes], s[k * lanes :][:lanes]
            for m in range(lanes):
                outer = centre3[k] * h_unit[m]
                error[m] += outer
                size[m] += abs(outer)
                diagonal[m] += centre3[k] * s_unit[m] * product[k, lanes + m]
        left = 0
        for m in range(lanes):
            g = error[m]
            if not running[m] or not abs(g) > SOLVED * size[m] or not abs(g) < np.inf:
                running[m] = False
                continue
            near = x[m] - g / ((t[m] + share) * (1 + SLACK))
            far = x[m] - g / (t[m] * (1 - SLACK))
            low[m] = max(low[m], min(near, far))
            high[m] = min(high[m], max(near, far))
            wide = high[m] - low[m]
            new = x[m] - g / diagonal[m]
            if not (low[m] <= new <= high[m]) or wide > 0.5 * earlier[m]:
                new = low[m] + 0.5 * wide
                before[m] = wide
            earlier[m], before[m] = before[m], wide
            if new == x[m] or not abs(new) < np.inf or iteration == STEPS - 1:
                running[m] = False
                continue
            x[m] = new
            steps[m] += 1
            left += 1
        if left == 0:
            break
    for k in range(units):
        h1[k * line :][:lanes] = pair[k][:lanes]
        h2[k * line :][:lanes] = h[k * lanes :][:lanes]


@compiled
def solve_linear(unknowns, hidden, slopes, line, known, centres, work):
    """As :func:`solve_lanes`, of a linear layer: x is z less the value at 0, over the diagonal."""
    x, z, t, diagonal, _, _ = unknowns
    h1, h2 = hidden
    slopes1, slopes2 = slopes
    known1, known2 = known
    centre1, centre2, centre3 = centres
    units, lanes = len(centre1), len(x)
    padded = 8 * len(centre2)
    pair, product = work[:padded], work[padded : padded + units]
    distances = np.arange(padded).reshape(-1, 8) * pair.shape[1]
    pair[units:] = 0
    for k in range(units):
        s = slopes1[k * line :][:lanes]
        for m in range(lanes):
            pair[k, m] = s[m] * known1[k, m]
            pair[k, lanes + m] = s[m] * centre1[k]
            product[k, m] = known2[k, m]
            product[k, lanes + m] = 0
    add_lines(product, centre2, distances, pair.reshape(-1), 0, 2 * lanes)
    for m in range(lanes):
        x[m] = z[m]
        diagonal[m] = t[m]
    for k in range(units):
        s = slopes2[k * line :][:lanes]
        for m in range(lanes):
            x[m] -= centre3[k] * s[m] * product[k, m]
            diagonal[m] += centre3[k] * s[m] * product[k, lanes + m]
    for m in range(lanes):
        x[m] /= diagonal[m]
    for k in range(units):
        s, h = slopes2[k * line :][:lanes], h2[k * line :][:lanes]
        for m in range(lanes):
            h[m] = s[m] * (product[k, m] + x[m] * product[k, lanes + m])
        h = h1[k * line :][:lanes]
        for m in range(lanes):
            h[m] = pair[k, m] + x[m] * pair[k, lanes + m]


@compiled
def solve_block(unknowns, hidden, slopes, weights, centres, share, activation, by_channel, storage):
    """Solve a block of colours for one group of samples.

    Args:
        unknowns: skewed, (colours, slices, planes, 1, lanes of a plane), flat.
        hidden: two, the same with units; where a front is not solved yet, they hold what lower
            blocks and the bias contribute to them.
        slopes: as both hidden layers; empty unless the layer is linear.
        weights: of each convolution, as :func:`pack` has them.
        storage: the :class:`Skew`.
    """
    x, z, t, diagonal, error, steps = unknowns
    h1, h2 = hidden
    (weights1, distances1, ends1), (weights2, distances2, ends2), (weights3, distances3, ends3) = (
        weights
    )
    centre1, centre2, centre3 = centres
    units = centre1.shape[1]
    colours, height, width, radius, group, depth, axes = storage
    skew = radius + 1
    planes = skew * (height - 1) + width
    below, behind = radius if axes > 1 else 0, radius if axes > 2 else 0
    margin = skew * below + radius
    line = (height + 2 * below) * group
    of_colour = skew**axes  # fronts from one colour to the next
    numbers = skew**2 * (depth - 1) + planes
    known = known1, known2 = np.zeros((units, LANES)), np.zeros((units, LANES))
    known3 = np.zeros((1, LANES))
    work, flat = np.zeros((2 * units + 8, 2 * LANES)), np.zeros((4, units * LANES))
    fronts = numbers + of_colour * (colours - 1) if by_channel else numbers * colours
    for front in range(fronts):
        for one in range(colours * depth):
            c, deep = one // depth, one % depth
            number = front - of_colour * c if by_channel else (front - c) // colours
            plane = number - skew**2 * deep
            if plane < 0 or plane >= planes or not (by_channel or (front - c) % colours == 0):
                continue
            top = max(0, (plane - width + skew) // skew)
            bottom = min(height - 1, plane // skew)
            slices = c * (depth + 2 * behind) + deep + behind  # before this one
            place = (slices * (planes + 2 * margin) + plane + margin) * line
            stop = (bottom + 1 + below) * group
            for start in range((top + below) * group, stop, LANES):
                lanes = min(LANES, stop - start)
                own = slice(place + start, place + start + lanes)
                first = place * units + start
                for k in range(units):
                    known1[k, :lanes] = h1[first + k * line :][:lanes]
                    known2[k, :lanes] = h2[first + k * line :][:lanes]
                known3[0, :lanes] = 0
                these = slice(ends1[c], ends1[c + 1])
                add_lines(known1, weights1[these], distances1[these], x, place + start, lanes)
                these = slice(ends2[c], ends2[c + 1])
                add_lines(known2, weights2[these], distances2[these], h1, first, lanes)
                these = slice(ends3[c], ends3[c + 1])
                add_lines(known3, weights3[these], distances3[these], h2, first, lanes)
                for m in range(lanes):
                    z[place + start + m] -= known3[0, m]
                these_unknowns = Unknowns(
                    x[own], z[own], t[own], diagonal[own], error[own], steps[own]
                )
                these_hidden = h1[first:], h2[first:]
                these_centres = centre1[c], centre2[c], centre3[c]
                if activation == LINEAR:
                    solve_linear(
                        these_unknowns, these_hidden, (slopes[0][first:], slopes[1][first:]), line,
                        known, these_centres, work,
                    )  # fmt: skip
                else:
                    solve_lanes(
                        these_unknowns, these_hidden, line, known, these_centres, share[c],
                        activation, work, flat,
                    )  # fmt: skip


class Skew(NamedTuple):
    """How a block of colours is stored, for one group of samples."""

    colours: int
    height: int
    width: int
    radius: int
    group: int  # samples
    depth: int  # slices
    axes: int

    @property
    def below(self) -> int:
        """How many rows a tap looks beyond an image."""
        return self.radius if self.axes > 1 else 0

    @property
    def behind(self) -> int:
        """How many slices a tap looks beyond a volume."""
        return self.radius if self.axes > 2 else 0

    @property
    def margin(self) -> int:
        """Planes before the first and after the last of a slice, as far as taps look."""
        return (self.radius + 1) * self.below + self.radius

    @property
    def planes(self) -> int:
        """Of a slice."""
        return (self.radius + 1) * (self.height - 1) + self.width + 2 * self.margin

    @property
    def slices(self) -> int:
        """Of a colour."""
        return self.depth + 2 * self.behind

    @property
    def line(self) -> int:
        """Lanes of a line."""
        return (self.height + 2 * self.below) * self.group

    def _lines(self) -> int:
        """Of all units together."""
        return self.colours * self.slices * self.planes

    def new(self, units: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        """Empty storage: zeros, in one line, with room for the last vector."""
        return torch.zeros(self._lines() * units * self.line + VECTOR, dtype=dtype)

    def _images(self, storage: Tensor) -> Tensor:
        """The stored values seen as (group, colours, units, H, W)."""
        units = (len(storage) - VECTOR) // (self._lines() * self.line)
        plane = units * self.line
        of_slice = self.planes * plane
        sizes = (self.depth, self.height, self.width)[-self.axes :]
        along = (of_slice, (self.radius + 1) * plane + self.group, plane)[-self.axes :]
        first = self.behind * of_slice + self.margin * plane + self.below * self.group
        return storage.as_strided(
            (self.group, self.colours, units, *sizes),
            (1, self.slices * of_slice, self.line, *along),
            first,
        )

    def put(self, storage: Tensor, values: Tensor) -> None:
        """Store values (group, colours * units, H, W)."""
        images = self._images(storage)
        images.copy_(values.reshape(images.shape))

    def get(self, storage: Tensor) -> Tensor:
        """What is stored, as :meth:`put` takes it."""
        return self._images(storage).flatten(1, 2)


@lru_cache(maxsize=64)
def _layout(
    skew: Skew, units: int, kernel: int, order: str
) -> tuple[Tensor, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Which weights :func:`pack` takes, how far away what they multiply is, each colour's ends."""
    indices, distances, ends = [], [], [0]
    inputs, axes = torch.arange(units), skew.axes
    for colour in range(skew.colours):
        seen = seen_before(order, colour, skew.colours, kernel, axes)
        other, *away = torch.tensor(seen, dtype=torch.int64).view(-1, 1 + axes).T.unsqueeze(2)
        # Rows of weights are in the order colour, colour seen, tap, input; then come zeros.
        index = colour * skew.colours + other
        for by in away:
            index = index * kernel + by + kernel // 2
        dz, dy, dx = in_space(away, torch.zeros_like(other))
        slices = (other - colour) * skew.slices + dz
        planes = slices * skew.planes + (skew.radius + 1) * dy + dx
        distance = (planes * units + inputs) * skew.line + dy * skew.group
        spare = torch.zeros(-distance.numel() % UNROLL, dtype=torch.int64)
        end = skew.colours**2 * kernel**axes * units
        indices += [(index * units + inputs).flatten(), spare + end]
        distances += [distance.flatten(), spare]
        ends.append(ends[-1] + (distance.numel() + len(spare)) // UNROLL)
    return torch.cat(indices), torch.cat(distances).view(-1, UNROLL).numpy(), np.array(ends)


def pack(weight: Tensor, skew: Skew, order: str) -> tuple[np.ndarray[Any, Any], ...]:
    """Weights (outputs, inputs, k, k), or with other axes, of a block as :func:`add_lines` reads
    them.

    Returns:
        Weights (N / 8, outputs of a colour, 8), distances (N / 8, 8), and where each colour's
        begin and end, (colours + 1,).
    """
    outputs, inputs, *kernel = weight.shape
    units_out, units_in = outputs // skew.colours, inputs // skew.colours
    index, distances, ends = _layout(skew, units_in, kernel[0], order)
    blocks = weight.view(skew.colours, units_out, skew.colours, units_in, math.prod(kernel))
    rows = blocks.permute(0, 2, 4, 3, 1).reshape(-1, units_out)
    rows = torch.cat([rows, rows.new_zeros(1, units_out)])[index]
    packed = rows.view(-1, UNROLL, units_out).transpose(1, 2).contiguous()
    return packed.numpy(), distances, ends


def pack_centres(centres: Tensor) -> np.ndarray[Any, Any]:
    """(C, K, K) -> (C, K / 8 rounded up, K, 8), inputs last, with zeros for those that are not."""
    colours, units, _ = centres.shape
    packed = centres.new_zeros(colours, units, -(-units // UNROLL) * UNROLL)
    packed[..., :units] = centres
    lines: Tensor = packed.unflatten(2, (-1, UNROLL))
    return lines.transpose(1, 2).contiguous().numpy()


def wavefront(
    z: Tensor,
    weights: MintWeights,
    hidden: Activation | Slopes,
    order: str,
    triangle: str,
    condition: Condition | None = None,
) -> Wave:
    """As :func:`.fronts.wavefront`, of float64 tensors on a CPU, for this package's activations."""
    return as_lower(_solve, z, weights, hidden, order, triangle, condition)


class Block(NamedTuple):
    """Colours that are solved together, and what their kernel is given."""

    own: slice  # of colours
    wide: slice  # of their hidden units
    weights: tuple[tuple[np.ndarray[Any, Any], ...], ...]
    centres: tuple[np.ndarray[Any, Any], ...]
    share: np.ndarray[Any, Any]
    before: tuple[Tensor, ...]  # weights of what the blocks before show, (k, k, outputs, inputs)
    biases: tuple[Tensor, ...]


def _block(first: int, skew: Skew, weights: MintWeights, share: Tensor, order: str) -> Block:
    units = weights.centre1.shape[1]
    own = slice(first, first + skew.colours)
    wide = slice(own.start * units, own.stop * units)
    return Block(
        own,
        wide,
        (
            pack(weights.weight1[wide, own], skew, order),
            pack(weights.weight2[wide, wide], skew, order),
            pack(weights.weight3[own, wide], skew, order),
        ),
        (
            weights.centre1[own].contiguous().numpy(),
            pack_centres(weights.centre2[own]),
            weights.centre3[own].contiguous().numpy(),
        ),
        share[own].numpy(),
        (
            by_tap(weights.weight1[wide, : own.start]),
            by_tap(weights.weight2[wide, : wide.start]),
            by_tap(weights.weight3[own, : wide.start]),
        ),
        (weights.bias1[wide], weights.bias2[wide], weights.bias3[own]),
    )


def _colours_of_a_block(colours: int, units: int, order: str) -> int:
    """A divisor of all colours, so that blocks are alike; in pixel order all depend on all."""
    if order == "pixel":
        return colours
    fit = (n for n in range(2, colours + 1) if colours % n == 0 and n * units <= BLOCK)
    return max(fit, default=1)


@torch.no_grad()
def _solve(
    z: Tensor,
    weights: MintWeights,
    hidden: Activation | Slopes,
    order: str,
    condition: Condition | None,
) -> Wave:
    batch, colours, *size = z.shape
    depth, height, width = in_space(size, 1)
    radius = max(weight.shape[-1] for weight in weights[:6:2]) // 2
    threads = min(torch.get_num_threads(), batch)
    rows = min(height, -(-width // (radius + 1)))  # the most of a front
    # As many samples in each group as fill the lanes, and as many groups for each thread.
    share_of_thread = -(-batch // threads)
    rounds = -(-share_of_thread // max(1, LANES // rows))
    group = -(-share_of_thread // rounds)
    units = weights.centre1.shape[1]
    together = _colours_of_a_block(colours, units, order)
    skew = Skew(together, height, width, radius, group, depth, len(size))
    steep = steepest_share(weights, hidden)
    blocks = [
        _block(first, skew, weights, steep, order) for first in range(0, colours, skew.colours)
    ]
    wave = empty_wave(z)
    starts = range(0, batch, group)
    # A thread does all that its groups need by itself: within a share, torch starts no threads.
    solve = partial(_solve_groups, z, weights, hidden, order, condition, skew, blocks, wave)
    share([starts[thread::threads] for thread in range(threads)], solve)
    return wave


@torch.no_grad()
def _solve_groups(
    z: Tensor,
    weights: MintWeights,
    hidden: Activation | Slopes,
    order: str,
    condition: Condition | None,
    skew: Skew,
    blocks: list[Block],
    wave: Wave,
    starts: range,
) -> None:
    """Solve the groups of samples that start there, one after the other, in the same storage."""
    batch, colours, *size = z.shape
    units, group = weights.centre1.shape[1], skew.group
    channels = (1, units, units)
    slopes = hidden if isinstance(hidden, Slopes) else ()
    number = LINEAR if isinstance(hidden, Slopes) else NAMES.index(hidden.name)
    x, target, t, diagonal, error = (skew.new() for _ in range(5))
    steps = skew.new(dtype=torch.int64)
    layers = (x, skew.new(units), skew.new(units))
    given = [skew.new(units if slopes else 0) for _ in range(2)]
    unknowns = Unknowns(*(one.numpy() for one in (x, target, t, diagonal, error, steps)))
    both = layers[1].numpy(), layers[2].numpy()
    before = colours - skew.colours  # colours that some block looks back on
    padded = [PaddedImages(group, before * each, size, skew.radius) for each in channels]
    for start in starts:
        stop = min(batch, start + group)
        # Spare lanes solve the last sample again.
        index = torch.arange(start, start + group).clamp(max=batch - 1)
        for position, block in enumerate(blocks):
            known1, known2, known3 = (
                one.convolve(weight, bias)
                for one, weight, bias in zip(padded, block.before, block.biases, strict=True)
            )
            if condition is not None:
                known1 = shifted(known1, condition.shift1[index, block.wide])
                known2 = shifted(known2, condition.shift2[index, block.wide])
            skew.put(layers[1], known1)
            skew.put(layers[2], known2)
            skew.put(target, z[index, block.own] - known3)
            skew.put(t, weights.t.expand_as(z)[index, block.own])
            for storage, values in zip(given, slopes, strict=False):
                skew.put(storage, values[index, block.wide])
            solve_block(
                unknowns, both, (given[0].numpy(), given[1].numpy()), block.weights, block.centres,
                block.share, number, order == "channel", skew,
            )  # fmt: skip
            for storage, field in zip((x, diagonal, error, steps), wave, strict=True):
                field[start:stop, block.own] = skew.get(storage)[: stop - start]
            if block is not blocks[-1]:
                for one, storage in zip(padded, layers, strict=True):
                    one.put(skew.get(storage), position)
