"""The wavefront: a Mint layer inverted exactly, in the order of dependency, in plain PyTorch.

Once all variables before it are known, an output of a Mint layer is a function of its own variable
alone, ``g(x) = t x + k3 + D3 h(k2 + D2 h(k1 + D1 x))``, where k1, k2 and k3 are what the known
variables contribute and D1, D2, D3 are the centre weights. Its slope lies in [t, t + L^2 D3 D2 D1],
with L the steepest slope of h: so g(x) = z has one solution, and Newton's method finds it without
fail inside the bracket that both bounds give, bisecting where it is slow.

Variables that do not depend on each other are solved at once: a *front*. All there is in a layer
are a few dozen fronts, each of which costs its share of one forward pass, and K x K for each step
of Newton's method.

This is the plain version: :mod:`.cpu.wavefront` and :mod:`.gpu.wavefront` compute the same faster.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mintnet_triton.kernels.activation import Activation
from mintnet_triton.kernels.canvas import in_space, offsets
from mintnet_triton.kernels.reference import Condition, MintWeights, scaled

#: most steps of Newton's method: enough to bisect a bracket of 1e20 down to 1e-16
STEPS = 400
#: the error of an equation that is solved, in units of the last place of its largest term
SOLVED = 8
#: how far rounding may move the bounds of a slope, in units of the last place
SLACK = 64


class Wave(NamedTuple):
    """What a wavefront has found."""

    x: Tensor  # (B, C, H, W)
    diagonal: Tensor  # of the Jacobian at x, the same shape
    error: Tensor  # f(x) - z as the last step of Newton's method saw it, the same shape
    steps: Tensor  # of Newton's method, int64, the same shape


def empty_wave(z: Tensor) -> Wave:
    """Room for what is found."""
    x, diagonal, error = (torch.empty_like(z) for _ in range(3))
    return Wave(x, diagonal, error, torch.empty_like(z, dtype=torch.int64))


class Slopes(NamedTuple):
    """Slopes of both hidden layers, (B, C*K, H, W), which make a layer linear: ``h(a) = s a``."""

    first: Tensor
    second: Tensor


def front_numbers(
    colours: int, height: int, width: int, radius: int, order: str, depth: int = 1, axes: int = 2
) -> Tensor:
    """Which front every variable of a lower triangle belongs to, from 0: (C, H, W), int64.

    A variable depends on none of its own front or a later one, whatever it sees through three
    convolutions of at most that radius. If all sizes exceed the radius, no schedule of a layer
    whose kernels all have that radius has fewer fronts.

    It is a linear function of the indices, ``s = radius + 1``. A tap looks r back along one axis at
    least, and up to r ahead along those after it, the columns last. With weights of 1, s, s^2, ...
    from the last axis to the first, it goes back by ``s^a - r (s^(a-1) + ... + 1) = 1`` or more.
    In channel order, a colour before its own is seen r ahead along all axes, hence ``s^axes`` for
    each colour; in pixel order it is seen at the same pixel, so that fronts of pixels have one
    after the other a front for each colour.

    Args:
        depth: planes of a volume, (C, D, H, W).
        axes: along which kernels look: 1 the columns alone, 3 planes too. Along others, sizes
            are 1.
    """
    shape = (colours, *(depth, height, width)[-axes:])
    indices: tuple[Tensor, ...] = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    colour, *along = indices
    if radius == 0:
        return colour
    plane = torch.zeros_like(colour)
    for one in along:
        plane = (radius + 1) * plane + one
    if order == "channel":
        of_colour: int = (radius + 1) ** axes
        return plane + of_colour * colour
    return colours * plane + colour


def seen_before(
    order: str, colour: int, colours: int, kernel: int, axes: int = 2
) -> list[tuple[int, ...]]:
    """What a convolution shows a colour of the variables before its own, in a lower triangle.

    Returns:
        The colour seen, and how many rows and columns away, or how far along other axes.
    """
    found = []
    for other in range(colours):
        for place, away in enumerate(offsets(kernel, axes), start=-(kernel**axes // 2)):
            if order == "channel":
                seen = other < colour or (other == colour and place < 0)
            else:
                seen = place < 0 or (place == 0 and other < colour)
            if seen:
                found.append((other, *away))
    return found


def reverse(images: Tensor, colours: int) -> Tensor:
    """The variables (B, C * units, H, W) in the reverse order, in which upper triangles are lower.

    The units of a colour keep their order.
    """
    by_colour: Tensor = images.unflatten(1, (colours, -1))
    return by_colour.flip(1, *range(3, by_colour.ndim)).flatten(1, 2)


def reverse_weights(weights: MintWeights) -> MintWeights:
    """The weights of the layer that maps reversed variables to reversed ones."""
    colours = len(weights.weight3)

    def conv(weight: Tensor) -> Tensor:
        blocks: Tensor = weight.unflatten(1, (colours, -1)).unflatten(0, (colours, -1))
        return blocks.flip(0, 2, *range(4, blocks.ndim)).flatten(0, 1).flatten(1, 2)

    def bias(values: Tensor) -> Tensor:
        by_colour: Tensor = values.unflatten(0, (colours, -1))
        return by_colour.flip(0).flatten()

    return MintWeights(
        conv(weights.weight1),
        bias(weights.bias1),
        conv(weights.weight2),
        bias(weights.bias2),
        conv(weights.weight3),
        bias(weights.bias3),
        weights.centre1.flip(0),
        weights.centre2.flip(0),
        weights.centre3.flip(0),
        weights.t.flip(*range(1 - weights.weight1.ndim, 0)),
    )


def reverse_condition(condition: Condition, colours: int) -> Condition:
    """The condition of that layer."""
    return Condition(*(reverse(one, colours) for one in condition))


def transpose_weights(weights: MintWeights) -> MintWeights:
    """The weights of the transposed layer, which has the opposite triangle, without its biases.

    Its slopes are those of the layer in the opposite order.
    """

    def conv(weight: Tensor) -> Tensor:
        return weight.flip(*range(2, weight.ndim)).transpose(0, 1)

    return MintWeights(
        conv(weights.weight3),
        torch.zeros_like(weights.bias2),
        conv(weights.weight2),
        torch.zeros_like(weights.bias1),
        conv(weights.weight1),
        torch.zeros_like(weights.bias3),
        weights.centre3,
        weights.centre2.transpose(1, 2),
        weights.centre1,
        weights.t,
    )


def steepest_share(weights: MintWeights, hidden: Activation | Slopes) -> Tensor:
    """``L^2 D3 D2 D1`` (C,): by how much a slope may exceed t."""
    joined = weights.centre3.unsqueeze(1) @ weights.centre2 @ weights.centre1.unsqueeze(2)
    if isinstance(hidden, Slopes):
        return joined.flatten() * hidden.first.max() * hidden.second.max()
    assert hidden.steepest is not None
    return joined.flatten() * hidden.steepest**2


class Bracket:
    """Where a monotone equation has its root, narrowed at every step.

    Args:
        flat, steep: bounds of its slope, which broadcast against x.
        x: any, for its shape.
        moving: whether the equation may change between steps. Then a step that contradicts those
            before it makes them void; else that is rounding.
    """

    def __init__(self, flat: Tensor, steep: Tensor, x: Tensor, *, moving: bool) -> None:
        self.moving = moving
        slack = SLACK * torch.finfo(x.dtype).eps
        self.flat, self.steep = (
            (flat * (1 - slack)).expand_as(x),
            (steep * (1 + slack)).expand_as(x),
        )
        self.low, self.high = torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf)
        self.before = self.earlier = self.high  # widths one and two steps ago

    def step(self, x: Tensor, error: Tensor, step: Tensor) -> Tensor:
        """``x - step`` where that is inside and two such steps have halved the bracket, else its
        middle; error is that of the equation at x."""
        # The root is where both bounds of the slope say.
        near, far = x - error / self.steep, x - error / self.flat
        least, most = torch.minimum(near, far), torch.maximum(near, far)
        low, high = torch.maximum(self.low, least), torch.minimum(self.high, most)
        void = (low > high) & self.moving
        self.low, self.high = torch.where(void, least, low), torch.where(void, most, high)
        width = self.high - self.low
        new = x - step
        slow = (width > 0.5 * self.earlier) & ~void
        bisect = ~((self.low <= new) & (new <= self.high)) | slow
        self.earlier = torch.where(bisect | void, width, self.before)
        self.before = width
        return torch.where(bisect, self.low + 0.5 * width, new)

    def keep(self, chosen: Tensor) -> None:
        """Go on with some samples alone."""
        for name in ("flat", "steep", "low", "high", "before", "earlier"):
            setattr(self, name, getattr(self, name)[chosen])


LowerSolver = Callable[[Tensor, MintWeights, Activation | Slopes, str, Condition | None], Wave]


def as_lower(
    solve: LowerSolver,
    z: Tensor,
    weights: MintWeights,
    hidden: Activation | Slopes,
    order: str,
    triangle: str,
    condition: Condition | None = None,
) -> Wave:
    """Solve either triangle by a solver of lower ones, which sees to the first two shifts."""
    if condition is not None:
        z = z - condition.shift3
        weights = weights._replace(t=scaled(weights.t, condition))
    if triangle == "lower":
        return solve(z, weights, hidden, order, condition)
    colours = z.shape[1]
    if isinstance(hidden, Slopes):
        hidden = Slopes(*(reverse(slopes, colours) for slopes in hidden))
    if condition is not None:
        condition = reverse_condition(condition, colours)
    found = solve(reverse(z, colours), reverse_weights(weights), hidden, order, condition)
    return Wave(*(reverse(values, colours) for values in found))


def wavefront(
    z: Tensor,
    weights: MintWeights,
    hidden: Activation | Slopes,
    order: str,
    triangle: str,
    condition: Condition | None = None,
) -> Wave:
    """Solve f(x) = z for a Mint layer f, exactly up to rounding, whatever its weights.

    Where numbers overflow, x stays at the last finite value, and ``error`` is not finite.

    Args:
        z: (B, C, H, W), float32 or float64.
        weights: of the same dtype.
        hidden: an activation with a ``steepest`` slope; or slopes, for a linear layer, where
            ``error`` and ``steps`` mean nothing.
        condition: of the samples, if a context gives one; of that dtype, too.
    """
    return as_lower(_solve, z, weights, hidden, order, triangle, condition)


@torch.no_grad()
def _solve(
    z: Tensor,
    weights: MintWeights,
    hidden: Activation | Slopes,
    order: str,
    condition: Condition | None,
) -> Wave:
    batch, colours, *size = z.shape
    units = weights.centre1.shape[1]
    convolutions = (weights.weight1, weights.weight2, weights.weight3)
    biases = (weights.bias1, weights.bias2, weights.bias3)
    added = [shift.expand(-1, -1, *size) for shift in (condition or ())[:2]]
    t = weights.t.expand_as(z)
    radius = max(weight.shape[-1] for weight in convolutions) // 2
    depth, height, width = in_space(size, 1)
    fronts = front_numbers(colours, height, width, radius, order, depth, len(size)).to(z.device)
    share = steepest_share(weights, hidden)
    seen = [[_taps(weight, order, c, colours) for weight in convolutions] for c in range(colours)]
    wave = empty_wave(z)
    # By pixel, with the units last; what lies outside the image stays zero.
    padded = (batch, colours, *(side + 2 * radius for side in size))
    layers = [z.new_zeros(*padded, channels) for channels in (1, units, units)]
    for front in range(int(fronts.max()) + 1):
        for c in range(colours):
            pixels = (fronts[c] == front).nonzero(as_tuple=True)
            if not len(pixels[0]):
                continue
            here: Any = (slice(None), c, *pixels)
            padded_here: Any = (slice(None), c, *(along + radius for along in pixels))
            known = []
            for layer, bias, (taps, weight) in zip(layers, biases, seen[c], strict=True):
                other, *away = taps
                places = (at[:, None] + by for at, by in zip(padded_here[2:], away, strict=True))
                near: Any = (slice(None), other, *places)
                known.append(layer[near].flatten(2) @ weight + bias.unflatten(0, (colours, -1))[c])
            for values, shift in zip(known, added, strict=False):
                values += _at(shift, colours, here)
            x, h1, h2, *rest = _newton(
                z[here],
                t[here],
                share[c],
                known,
                _bends(hidden, colours, here),
                (weights.centre1[c], weights.centre2[c].T, weights.centre3[c]),
            )
            for layer, values in zip(layers, (x.unsqueeze(2), h1, h2), strict=True):
                layer[padded_here] = values
            for field, values in zip(wave, (x, *rest), strict=True):
                field[here] = values
    return wave


def _taps(weight: Tensor, order: str, colour: int, colours: int) -> tuple[Tensor, Tensor]:
    """Where a colour looks, (1 + axes, T), and with which weights, (T * inputs, outputs)."""
    axes, middle = weight.ndim - 2, weight.shape[-1] // 2
    seen = seen_before(order, colour, colours, weight.shape[-1], axes)
    taps = torch.tensor(seen, dtype=torch.int64, device=weight.device).view(-1, 1 + axes).T
    other, *away = taps
    blocks = weight.unflatten(1, (colours, -1)).unflatten(0, (colours, -1))[colour]
    by_tap = blocks.permute(1, *range(3, blocks.ndim), 2, 0)
    here: Any = (other, *(by + middle for by in away))
    return taps, by_tap[here].flatten(0, 1)


Bend = Callable[[Tensor], tuple[Tensor, Tensor]]


def _bends(hidden: Activation | Slopes, colours: int, here: tuple[Any, ...]) -> tuple[Bend, Bend]:
    """a -> h(a) and its slope, (B, n, units), of both hidden layers at the variables of a front."""
    if isinstance(hidden, Activation):
        h, slope = hidden.function, hidden.derivative
        return (lambda a: (h(a), slope(a)),) * 2
    first, second = (_at(one, colours, here) for one in hidden)
    return lambda a: (first * a, first), lambda a: (second * a, second)


def _at(images: Tensor, colours: int, here: tuple[Any, ...]) -> Tensor:
    """Values (B, C * units, H, W) at the variables of a front, (B, n, units)."""
    by_unit: Tensor = images.unflatten(1, (colours, -1))
    return by_unit.movedim(2, -1)[here]


def _newton(
    z: Tensor,
    t: Tensor,
    share: Tensor,
    known: list[Tensor],
    bends: tuple[Bend, Bend],
    centres: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """Newton's method for the unknowns of one colour in a front, (B, n) each.

    Returns:
        x, both hidden layers (B, n, units), the slope at x, the error g(x) - z, and the steps.
    """
    known1, known2, known3 = known[0], known[1], known[2].squeeze(2)
    centre1, centre2, centre3 = centres
    epsilon = torch.finfo(z.dtype).eps
    x = (z - known3) / (t + share)
    x = torch.where(x.isfinite(), x, 0)
    bracket = Bracket(t, t + share, x, moving=False)
    running = torch.ones_like(x, dtype=torch.bool)
    steps = torch.zeros_like(x, dtype=torch.int64)
    for step in range(STEPS):
        h1, slope1 = bends[0](known1 + x.unsqueeze(2) * centre1)
        h2, slope2 = bends[1](known2 + h1 @ centre2)
        outer = centre3 * h2
        slope = t + (centre3 * slope2 * ((slope1 * centre1) @ centre2)).sum(2)
        error = outer.sum(2) + known3 + t * x - z
        size = outer.abs().sum(2) + known3.abs() + (t * x).abs() + z.abs()
        running = running & error.isfinite() & (error.abs() > SOLVED * epsilon * size)
        if step == STEPS - 1:
            break  # with values that belong to x
        new = bracket.step(x, error, error / slope)
        running = running & new.isfinite() & (new != x)
        if not bool(running.any()):
            break
        x = torch.where(running, new, x)
        steps += running
    return x, h1, h2, slope, error, steps
