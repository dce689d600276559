"""The Mint layer and its gradient on a CPU, in float32: the arithmetic, compiled by numba.

Samples are computed in groups. A *canvas* (:mod:`mintnet_triton.kernels.canvas`) holds a group's
images, (rows, channels, line): a line is one row of one channel, the pixels of all samples of the
group side by side, with zeros before and after them. So a tap of a kernel is a whole line at a
constant distance, and every loop runs along lines, whatever the size of an image. A volume has the
rows of all its planes, (B, C, D * H, W), and a series is one row, (B, C, 1, L).

A masked convolution adds up, for a *tile* of outputs, what each tap sees: one range of input
channels (:mod:`.ranges`); nothing outside of it is loaded or multiplied, nor are taps beyond the
border. All products are in the innermost loops, :mod:`.tiles`.

The diagonal, and the gradients, are as in :mod:`.gpu.mint_layer`: v is the product of the joined
centre weights with the slopes of the other hidden layer.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mintnet_triton.kernels.activation import LEAKY_SLOPE, NAMES
from mintnet_triton.kernels.canvas import in_space, offsets
from mintnet_triton.kernels.cpu._numba import compiled, summing
from mintnet_triton.kernels.cpu.tiles import MOST
from mintnet_triton.kernels.ranges import seen_inputs

#: floats along which a gradient by weights is summed at once: what it reads stays in a near cache
SPAN = 1024

ELU, LEAKY_RELU, SOFTPLUS, TANH, SIGMOID = (
    NAMES.index(name) for name in ("elu", "leaky_relu", "softplus", "tanh", "sigmoid")
)
ZERO, ONE, TWO = (np.float32(number) for number in (0, 1, 2))
STEEP, LEAST, MAGIC = np.float32(LEAKY_SLOPE), np.float32(-87), np.float32(1.5 * 2**23)
LOG2E, LN2_HIGH, LN2_LOW = (np.float32(x) for x in (1 / math.log(2), 0.693359375, -2.12194440e-4))
P2, P3, P4, P5, P6, P7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))


# ------------------------------------------------------------------ activations along lines


@compiled
def bend(activation, a, h, bits):
    """``h = h(a)``; ``bits`` are those of h."""
    if activation == ELU:
        # exp(a) - 1, in vectors: with a = n log(2) + r, 2^n is made in the bits of the exponent,
        # and exp(r) - 1 for |r| <= log(2) / 2 is a polynomial.
        for m in range(len(a)):
            h[m] = max(min(a[m], ZERO), LEAST) * LOG2E + MAGIC
        for m in range(len(a)):
            bits[m] = (bits[m] << 23) + (127 << 23)
        for m in range(len(a)):
            v = max(min(a[m], ZERO), LEAST)
            n = (v * LOG2E + MAGIC) - MAGIC
            r = (v - n * LN2_HIGH) - n * LN2_LOW
            p = ((((P7 * r + P6) * r + P5) * r + P4) * r + P3) * r + P2
            e = h[m] * (p * r * r + r) + (h[m] - ONE)
            h[m] = e if a[m] <= ZERO else a[m]  # which keeps NaN
    elif activation == LEAKY_RELU:
        for m in range(len(a)):
            h[m] = a[m] if a[m] > ZERO else STEEP * a[m]
    elif activation == SOFTPLUS:
        for m in range(len(a)):
            h[m] = max(a[m], ZERO) + math.log1p(math.exp(-abs(a[m])))
    elif activation == TANH:
        for m in range(len(a)):
            h[m] = math.tanh(a[m])
    elif activation == SIGMOID:
        for m in range(len(a)):
            h[m] = ONE / (ONE + math.exp(-a[m]))
    else:  # identity
        for m in range(len(a)):
            h[m] = a[m]


@compiled
def slopes(activation, h, s):
    """``s = h'(a)``, read off h(a)."""
    if activation == ELU:
        for m in range(len(h)):
            s[m] = min(h[m], ZERO) + ONE
    elif activation == LEAKY_RELU:
        for m in range(len(h)):
            s[m] = ONE if h[m] > ZERO else STEEP
    elif activation == SOFTPLUS:
        for m in range(len(h)):
            s[m] = -math.expm1(-h[m])
    elif activation == TANH:
        for m in range(len(h)):
            s[m] = ONE - h[m] * h[m]
    elif activation == SIGMOID:
        for m in range(len(h)):
            s[m] = h[m] * (ONE - h[m])
    else:
        for m in range(len(h)):
            s[m] = ONE


@compiled
def slope_derivatives(activation, h, d):
    """The derivatives of the slopes by h."""
    if activation == ELU:
        for m in range(len(h)):
            d[m] = ONE if h[m] < ZERO else ZERO
    elif activation == SOFTPLUS:
        for m in range(len(h)):
            d[m] = math.exp(-h[m])
    elif activation == TANH:
        for m in range(len(h)):
            d[m] = -TWO * h[m]
    elif activation == SIGMOID:
        for m in range(len(h)):
            d[m] = ONE - TWO * h[m]
    else:
        for m in range(len(h)):
            d[m] = ZERO


# ------------------------------------------------------------------ masked convolutions


class Plan(NamedTuple):
    """A masked convolution as tiles of outputs, and what each of them sees at each tap."""

    tiles: np.ndarray[Any, Any]  # (tiles, 4): first output, outputs, first tap, end of the taps
    #: (taps, 7): dy, dx, inputs from and to, place of the weights, dz, number of the tap
    taps: np.ndarray[Any, Any]
    size: int  # of all weights


@lru_cache(maxsize=1024)
def plan(
    units_out: int,
    units_in: int,
    colours: int,
    kernel: int | tuple[int, ...],
    order: str,
    triangle: str,
    most: int = MOST,
) -> Plan:
    """Tiles of nearly equal size, of one colour, or of several where colours are small.

    Args:
        kernel: its sides, which are equal; one integer for a square.
        most: outputs of a tile.
    """
    if units_out > most:
        parts = -(-units_out // most)
        edges = [units_out * part // parts for part in range(parts)]
        starts = [colour * units_out + edge for colour in range(colours) for edge in edges]
    else:
        # A tile of several colours multiplies what only some of them see.
        together = min(most // units_out, max(1, colours // 8))
        starts = [colour * units_out for colour in range(0, colours, together)]
    tiles: list[tuple[int, ...]] = []
    taps: list[tuple[int, ...]] = []
    place = 0
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    away = [in_space(offset, 0) for offset in offsets(sides[0], len(sides))]
    for start, stop in zip(starts, [*starts[1:], colours * units_out], strict=True):
        first_tap, seen = len(taps), (start // units_out, (stop - 1) // units_out)
        for number, (dz, dy, dx) in enumerate(away):
            of_tap = number - len(away) // 2
            low, high = seen_inputs(*seen, units_in, colours, of_tap, order, triangle)
            if low < high:
                taps.append((dy, dx, low, high, place, dz, number))
                place += (high - low) * (stop - start)
        tiles.append((start, stop - start, first_tap, len(taps)))
    return Plan(np.array(tiles, np.int64), np.array(taps, np.int64).reshape(-1, 7), place)


@compiled
def fill(weight, tiles, taps, packed):
    """Weights (outputs, inputs, taps) in the order in which :func:`.add_products` reads them."""
    for tile in range(len(tiles)):
        first, rows = tiles[tile, 0], tiles[tile, 1]
        for tap in range(tiles[tile, 2], tiles[tile, 3]):
            place, number = taps[tap, 4], taps[tap, 6]
            for k in range(taps[tap, 2], taps[tap, 3]):
                for m in range(rows):
                    packed[place] = weight[first + m, k, number]
                    place += 1


@compiled
def address(values, place):
    """Of an element."""
    return np.int64(values.ctypes.data) + values.itemsize * place


class Lines(NamedTuple):
    """The lines of a canvas, in floats."""

    rows: int  # of all planes
    height: int  # of a plane
    width: int
    group: int  # samples side by side
    margin: int  # zeros between lines, before the first and after the last
    pixels: int  # width * group
    length: int  # the pixels and zeros up to whole vectors
    line: int  # how far lines are apart


class Sheet(NamedTuple):
    """A canvas, or other lines that are read as one: (rows, channels, line), flat."""

    values: np.ndarray[Any, Any]
    channels: int
    line: int  # how far lines are apart
    margin: int  # where the first begins


@compiled
def add_tile(loops, conv, tile, source, y, lines, sums, table):
    """Add a convolution of a canvas to the sums of a tile, for row y of the images.

    Args:
        conv: tiles, taps and weights.
        sums: flat, (outputs of the tile, length).
        table: to write to.
    """
    tiles, taps, weights = conv
    length, line = lines.length, source.line
    within = y % lines.height  # its plane
    count = 0
    for tap in range(tiles[tile, 2], tiles[tile, 3]):
        dy, dx, low, high, place, dz, _ = taps[tap]
        row = y + dz * lines.height + dy
        if 0 <= within + dy < lines.height and 0 <= row < lines.rows:
            first = (row * source.channels + low) * line + source.margin
            table[3 * count] = first + dx * lines.group
            table[3 * count + 1] = high - low
            table[3 * count + 2] = place
            count += 1
    rows = tiles[tile, 1]
    start = 0
    while start < length:
        left = (length - start) // loops.vector
        vectors = 4 if left >= 4 and rows <= loops.few else 2 if left >= 2 else 1
        loops.add(
            rows, vectors, address(sums, start), length, address(weights, 0),
            address(source.values, start), line, address(table, 0), count,
        )  # fmt: skip
        start += vectors * loops.vector


# ------------------------------------------------------------------ a layer, for one group


@compiled
def set_all(values, value):
    """As an assignment to a slice, which takes numba long to compile."""
    for i in range(len(values)):
        values[i] = value


@compiled
def sheet_of(values, channels, lines):
    return Sheet(values, channels, lines.line, lines.margin)


@compiled
def new_sheet(channels, lines):
    """Of zeros."""
    size = lines.margin + lines.rows * channels * lines.line
    return sheet_of(np.zeros(size, np.float32), channels, lines)


@compiled
def put_images(images, start, canvas, lines):
    """Write images (B, C, H, W) to a flat canvas of zeros; a group that is not full has zeros."""
    for n in range(min(lines.group, len(images) - start)):
        for c in range(images.shape[1]):
            for y in range(lines.rows):
                place = (y * images.shape[1] + c) * lines.line + lines.margin + n
                for x in range(lines.width):
                    canvas[place + x * lines.group] = images[start + n, c, y, x]


@compiled
def put_line(values, canvas, place, lines):
    """Write the pixels of a line and the zeros after them."""
    to = canvas[place + lines.margin :][: lines.line]
    for i in range(lines.pixels):
        to[i] = values[i]
    set_all(to[lines.pixels :], ZERO)


@compiled
def slopes_of_row(activation, canvas, y, channels, lines, row):
    """Slopes of a row of a hidden layer, to ``row`` (channels, length), flat."""
    length = lines.length
    for k in range(channels):
        place = (y * channels + k) * lines.line + lines.margin
        slopes(activation, canvas[place:][:length], row[k * length :][:length])


@compiled
def add_shift(shift, start, channel, y, line, lines):
    """Add to a row of a channel what a context does, in samples from ``start`` on.

    Args:
        shift: (1 or B, channels, 1 or H, 1 or W).
    """
    row = min(y, shift.shape[2] - 1)
    if len(shift) == 1:  # of all samples, and of no harm to lanes without one
        for x in range(lines.width):
            own = shift[0, channel, row, min(x, shift.shape[3] - 1)]
            at_pixel = line[x * lines.group :][: lines.group]
            for n in range(lines.group):
                at_pixel[n] += own
        return
    for n in range(min(lines.group, len(shift) - start)):
        for x in range(lines.width):
            line[x * lines.group + n] += shift[start + n, channel, row, min(x, shift.shape[3] - 1)]


@compiled
def add_shift_gradient(line, start, channel, y, by_shift, lines):
    """Add the gradient by a row of pre-activations to that by the shift.

    Args:
        by_shift: shaped as the shift; or, of one for all samples, (1, channels, rows, length), lane
            by lane.
    """
    if len(by_shift) == 1 and by_shift.shape[3] == len(line):
        total = by_shift[0, channel, y]
        for i in range(len(line)):
            total[i] += line[i]
        return
    row = min(y, by_shift.shape[2] - 1)
    for n in range(min(lines.group, len(by_shift) - start)):
        for x in range(lines.width):
            by_shift[start + n, channel, row, min(x, by_shift.shape[3] - 1)] += line[
                x * lines.group + n
            ]


@compiled
def hidden_layer(
    loops, source, conv, bias, shift, start, activation, target, before, centres, diagonal, lines
):
    """A hidden layer of a group, and, for the second, what the diagonal receives.

    Args:
        shift: as :func:`add_shift` has it, of all samples, of which the group begins at ``start``;
            or empty.
        target: the values of the hidden layer's canvas, to write to.
        before: the first hidden layer, which gives the second's share of the diagonal; else empty.
        centres: a convolution by the joined centre weights.
        diagonal: (rows, C, length) flat, to add to.
    """
    tiles = conv[0]
    outputs = len(bias)
    length, line = lines.length, lines.line
    table = np.empty(3 * (len(conv[1]) + 1), np.int64)
    size = loops.most * length
    sums, through = np.empty(size, np.float32), np.empty(size, np.float32)
    h, s = np.empty(size, np.float32), np.empty(size, np.float32)
    bits = h.view(np.int32)
    with_diagonal = len(before) > 0
    row = Sheet(np.empty(outputs * length if with_diagonal else 0, np.float32), outputs, length, 0)
    set_all(target[: lines.margin], ZERO)
    units = outputs // (len(diagonal) // (lines.rows * length)) if with_diagonal else 1
    for y in range(lines.rows):
        if with_diagonal:
            slopes_of_row(activation, before, y, outputs, lines, row.values)
        for tile in range(len(tiles)):
            first, rows = tiles[tile, 0], tiles[tile, 1]
            for m in range(rows):
                set_all(sums[m * length :][:length], bias[first + m])
                if len(shift):
                    add_shift(shift, start, first + m, y, sums[m * length :], lines)
            add_tile(loops, conv, tile, source, y, lines, sums, table)
            bend(activation, sums[: rows * length], h[: rows * length], bits[: rows * length])
            for m in range(rows):
                place = (y * outputs + first + m) * line
                put_line(h[m * length :], target, place, lines)
            if with_diagonal:
                set_all(through[: rows * length], ZERO)
                add_tile(loops, centres, tile, row, 0, lines, through, table)
                slopes(activation, h[: rows * length], s[: rows * length])
                for m in range(rows):
                    place = (y * (outputs // units) + (first + m) // units) * length
                    to = diagonal[place : place + length]
                    ours, theirs = s[m * length :][:length], through[m * length :][:length]
                    for i in range(length):
                        to[i] += ours[i] * theirs[i]


@compiled
def output_layer(loops, source, conv, bias, factor, images, start, results, lines):
    """A convolution of a canvas, plus bias, plus factor times the images, (B, C, H, W).

    Args:
        factor: (1 or B, C, H, W).
    """
    tiles = conv[0]
    length = lines.length
    table = np.empty(3 * (len(conv[1]) + 1), np.int64)
    sums = np.empty(loops.most * length, np.float32)
    samples = min(lines.group, len(results) - start)
    for y in range(lines.rows):
        for tile in range(len(tiles)):
            first, rows = tiles[tile, 0], tiles[tile, 1]
            for m in range(rows):
                set_all(sums[m * length :][:length], bias[first + m])
            add_tile(loops, conv, tile, source, y, lines, sums, table)
            for m in range(rows):
                c = first + m
                for n in range(samples):
                    t = factor[min(start + n, len(factor) - 1), c, y]
                    for x in range(lines.width):
                        results[start + n, c, y, x] = (
                            sums[m * length + x * lines.group + n]
                            + t[x] * images[start + n, c, y, x]
                        )


@compiled
def forward_groups(
    loops, groups, x, t, convs, biases, shifts, centres, activation, kept, y, diagonal, lines
):
    """The layer for some groups.

    Args:
        t: (1 or B, C, H, W).
        shifts: of both hidden layers, as :func:`add_shift` has them, or empty.
        convs: three, each tiles, taps and weights.
        kept: canvases (groups, ...) of both hidden layers, or of one group, to be used by all.
        diagonal: (B, C, H, W) to write to, or empty.
    """
    colours, hidden = x.shape[1], len(biases[0])
    first, second = kept
    nothing = np.empty(0, np.float32)
    for g in groups:
        start = g * lines.group
        images = new_sheet(colours, lines)
        put_images(x, start, images.values, lines)
        h1, h2 = first[g % len(first)], second[g % len(second)]
        hidden_layer(
            loops, images, convs[0], biases[0], shifts[0], start, activation, h1, nothing, centres,
            nothing, lines,
        )  # fmt: skip
        sums = np.zeros(lines.rows * colours * lines.length if diagonal.size else 0, np.float32)
        before = h1 if diagonal.size else nothing
        first_hidden = sheet_of(h1, hidden, lines)
        hidden_layer(
            loops, first_hidden, convs[1], biases[1], shifts[1], start, activation, h2, before,
            centres, sums, lines,
        )  # fmt: skip
        second_hidden = sheet_of(h2, hidden, lines)
        output_layer(loops, second_hidden, convs[2], biases[2], t, x, start, y, lines)
        if diagonal.size:
            for n in range(min(lines.group, len(x) - start)):
                own = min(start + n, len(t) - 1)
                for c in range(colours):
                    for i in range(lines.rows):
                        place = (i * colours + c) * lines.length + n
                        for j in range(lines.width):
                            diagonal[start + n, c, i, j] = (
                                t[own, c, i, j] + sums[place + j * lines.group]
                            )


@summing
def sum_of(values):
    """In any order, as numpy's sum is not compiled."""
    total = ZERO
    for value in values:
        total += value
    return total


@compiled
def hidden_gradient(
    loops, source, conv, own, other, centres, by_diagonal, activation, target, by_bias, by_shift,
    start, lines,
):  # fmt: skip
    """The gradient by a hidden layer's pre-activations: ``s (r + g v s')``.

    Args:
        source: the canvas that the gradient comes from.
        conv: the transposed one, of r.
        own, other: values of this hidden layer, and of the one whose slopes give v.
        by_diagonal: g, (rows, C, length) flat.
        target: the values of a canvas of zeros, to write to.
        by_bias: to add to.
        by_shift: as :func:`add_shift_gradient` has it, to add to; or empty.
    """
    tiles = conv[0]
    outputs = len(by_bias)
    length, line = lines.length, lines.line
    table = np.empty(3 * (len(conv[1]) + 1), np.int64)
    size = loops.most * length
    sums, through = np.empty(size, np.float32), np.empty(size, np.float32)
    s, d = np.empty(length, np.float32), np.empty(length, np.float32)
    row = Sheet(np.empty(outputs * length, np.float32), outputs, length, 0)
    colours = len(by_diagonal) // (lines.rows * length)
    units = outputs // colours
    for y in range(lines.rows):
        slopes_of_row(activation, other, y, outputs, lines, row.values)
        for tile in range(len(tiles)):
            first, rows = tiles[tile, 0], tiles[tile, 1]
            set_all(sums[: rows * length], ZERO)
            add_tile(loops, conv, tile, source, y, lines, sums, table)
            set_all(through[: rows * length], ZERO)
            add_tile(loops, centres, tile, row, 0, lines, through, table)
            for m in range(rows):
                place = (y * outputs + first + m) * line
                h = own[place + lines.margin :][:length]
                slopes(activation, h, s)
                slope_derivatives(activation, h, d)
                place_of_colour = (y * colours + (first + m) // units) * length
                g = by_diagonal[place_of_colour:][:length]
                r, v = sums[m * length :][:length], through[m * length :][:length]
                for i in range(length):
                    r[i] = s[i] * (r[i] + g[i] * v[i] * d[i])
                by_bias[first + m] += sum_of(r[: lines.pixels])
                if len(by_shift):
                    add_shift_gradient(r, start, first + m, y, by_shift, lines)
                put_line(r, target, place, lines)


@compiled
def add_weight_gradient(loops, plan, left, right, top, bottom, lines, by_weight):
    """Add the products of gradients by outputs with inputs, for some rows of one plane.

    Args:
        plan: its tiles, of at most ``loops.outputs``, and taps.
        by_weight: (outputs, inputs, taps).
    """
    tiles, taps = plan
    plane = top - top % lines.height  # its first row
    sums = np.empty(loops.outputs * loops.inputs + loops.vector, np.float32)
    vectors = lines.length // loops.vector
    for tile in range(len(tiles)):
        first, rows = tiles[tile, 0], tiles[tile, 1]
        for tap in range(tiles[tile, 2], tiles[tile, 3]):
            dy, dx, low, high, _, dz, number = taps[tap]
            y = max(top, plane - dy)
            count = min(bottom, plane + lines.height - dy) - y
            seen = y + dz * lines.height + dy  # the first row that it looks at
            if count <= 0 or not 0 <= seen < lines.rows:
                continue
            first_left = (y * left.channels + first) * left.line + left.margin
            parts = -(-(high - low) // loops.inputs)
            for part in range(parts):
                k = low + (high - low) * part // parts
                inputs = low + (high - low) * (part + 1) // parts - k
                first_right = (seen * right.channels + k) * right.line + right.margin
                loops.dot(
                    rows, inputs, address(sums, 0),
                    address(left.values, first_left), left.line, left.channels * left.line,
                    address(right.values, first_right + dx * lines.group), right.line,
                    right.channels * right.line, count, vectors,
                )  # fmt: skip
                for m in range(rows):
                    for n in range(inputs):
                        by_weight[first + m, k + n, number] += sums[m * inputs + n]


@compiled
def add_centre_gradient(
    loops, plan, h1, h2, by_diagonal, activation, left, right, top, bottom, lines, by_centres
):
    """Add the gradient by the joined centres: products of both hidden layers' slopes.

    Args:
        left, right: sheets of slopes, as long as lines and for as many rows or more, to write to.
    """
    length, hidden = lines.length, left.channels
    rows = bottom - top
    units = hidden // (len(by_diagonal) // (lines.rows * length))
    for y in range(rows):
        these = slice(y * hidden * length, (y + 1) * hidden * length)
        slopes_of_row(activation, h1, top + y, hidden, lines, right.values[these])
        slopes_of_row(activation, h2, top + y, hidden, lines, left.values[these])
        for k in range(hidden):
            line = left.values[(y * hidden + k) * length :][:length]
            g = by_diagonal[((top + y) * (hidden // units) + k // units) * length :][:length]
            for i in range(length):
                line[i] *= g[i]
    these_rows = Lines(rows, rows, lines.width, lines.group, 0, lines.pixels, length, length)
    add_weight_gradient(loops, plan, left, right, 0, rows, these_rows, by_centres)


@compiled
def backward_groups(
    loops, groups, x, t, kept, upstream, convs, centres, plans, activation, by_x, by_biases,
    by_weights, lines,
):  # fmt: skip
    """The gradients of some groups, those by weights and biases added up.

    Args:
        upstream: the gradients by y and by the diagonal, (B, C, H, W).
        convs: the transposed ones, of the last convolution, the middle and the first.
        centres: joined, for the second hidden layer and, transposed, for the first.
        plans: tiles and taps of the gradients by the weights of three convolutions and by the
            centres.
        by_x: (B, C, H, W) to write to.
        by_biases: of both hidden layers, and by their shifts (empty, if there are none), to add to.
        by_weights: four, (outputs, inputs, taps), to add to; empty if they are not wanted.
    """
    by_y, by_diagonal = upstream
    colours, hidden = x.shape[1], len(by_biases[0])
    rows, height, length = lines.rows, lines.height, lines.length
    bias = np.zeros(colours, np.float32)
    by_a1, by_a2 = new_sheet(hidden, lines), new_sheet(hidden, lines)
    span = min(height, max(1, SPAN // length))
    left_slopes = Sheet(np.empty(span * hidden * length, np.float32), hidden, length, 0)
    right_slopes = Sheet(np.empty(span * hidden * length, np.float32), hidden, length, 0)
    for g in groups:
        start = g * lines.group
        h1, h2 = kept[0][g], kept[1][g]
        to_y = new_sheet(colours, lines)
        put_images(by_y, start, to_y.values, lines)
        to_diagonal = np.zeros(rows * colours * length, np.float32)
        bare = Lines(rows, height, lines.width, lines.group, 0, lines.pixels, length, length)
        put_images(by_diagonal, start, to_diagonal, bare)
        hidden_gradient(
            loops, to_y, convs[0], h2, h1, centres[0], to_diagonal, activation, by_a2.values,
            by_biases[1], by_biases[3], start, lines,
        )  # fmt: skip
        hidden_gradient(
            loops, by_a2, convs[1], h1, h2, centres[1], to_diagonal, activation, by_a1.values,
            by_biases[0], by_biases[2], start, lines,
        )  # fmt: skip
        output_layer(loops, by_a1, convs[2], bias, t, by_y, start, by_x, lines)
        if not by_weights[0].size:
            continue
        images = new_sheet(colours, lines)
        put_images(x, start, images.values, lines)
        spans = -(-height // span)  # of a plane
        for part in range(rows // height * spans):
            plane = part // spans * height
            top = plane + part % spans * span
            bottom = min(plane + height, top + span)
            for plan, left, right, by_weight in (
                (plans[0], by_a1, images, by_weights[0]),
                (plans[1], by_a2, sheet_of(h1, hidden, lines), by_weights[1]),
                (plans[2], to_y, sheet_of(h2, hidden, lines), by_weights[2]),
            ):
                add_weight_gradient(loops, plan, left, right, top, bottom, lines, by_weight)
            add_centre_gradient(
                loops, plans[3], h1, h2, to_diagonal, activation, left_slopes, right_slopes, top,
                bottom, lines, by_weights[3],
            )  # fmt: skip
