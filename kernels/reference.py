"""Every operation in plain PyTorch: the truth in tests and the path taken on a CPU.

Shapes: B samples, C colours, K hidden units per colour, an image of H x W; or a series of L, or a
volume of D x H x W, whose kernels have one k or three. Hidden channels are colour-major: unit k of
colour c is channel ``c * K + k``.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mintnet_triton.kernels.activation import Activation


class Structure(NamedTuple):
    """What a Mint layer is, beside its weights: all that its kernels have to be made for."""

    order: str
    triangle: str
    activation: str


class Weights(NamedTuple):
    """The seven tensors of a Mint layer: its raw parameters, or effective weights."""

    weight1: Tensor  # (C*K, C, k1, k1)
    bias1: Tensor | None  # (C*K,)
    weight2: Tensor  # (C*K, C*K, k2, k2)
    bias2: Tensor | None  # (C*K,)
    weight3: Tensor  # (C, C*K, k3, k3)
    bias3: Tensor | None  # (C,)
    t: Tensor  # (C, H, W)

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None]) -> "Weights":
        """Of all seven, in order."""
        return cls(*tensors)  # type: ignore[arg-type]  # only biases may be None

    @property
    def kernels(self) -> tuple[int, int, int]:
        return self.weight1.shape[-1], self.weight2.shape[-1], self.weight3.shape[-1]

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.bias1, self.bias2, self.bias3

    def contiguous(self) -> "Weights":
        return Weights.of(None if one is None else one.contiguous() for one in self)


class Condition(NamedTuple):
    """What a context changes of a Mint layer, sample by sample: (B, n, H, W), or (B, n, 1, 1).

    What is the same for all samples may be given as of one.
    Shifts are added to the biases, and the scale multiplies t. They stand beside the weights, and
    not in their place, so that zeros and ones change no rounding, nor that of a gradient.
    """

    shift1: Tensor  # n = C*K
    shift2: Tensor  # n = C*K
    shift3: Tensor  # n = C
    scale: Tensor  # n = C, positive, at least float32

    def of_samples(self, chosen: Tensor) -> "Condition":
        return Condition(*(one if len(one) == 1 else one[chosen] for one in self))

    def of_batch(self, samples: int) -> "Condition":
        """For so many samples, without copies of what they share."""
        return Condition(*(one.expand(samples, *one.shape[1:]) for one in self))

    def to(self, dtype: torch.dtype) -> "Condition":
        """In that dtype."""
        return Condition(*(one.to(dtype) for one in self))


def shifted(values: Tensor, shift: Tensor | None) -> Tensor:
    """Images with what a context adds to them, in their own dtype."""
    return values if shift is None else values + shift.to(values.dtype)


def scaled(values: Tensor, condition: Condition | None) -> Tensor:
    """Images, or the t of all samples, times the scale of each; as they are, if there is none."""
    return values if condition is None else values * condition.scale


class MintWeights(NamedTuple):
    """Effective (masked, sign-corrected) weights of one Mint layer.

    The ``centre`` entries are the diagonals of the three linear maps: the weights that join hidden
    units of the same colour at the same pixel.
    """

    weight1: Tensor  # (C*K, C, k1, k1)
    bias1: Tensor  # (C*K,)
    weight2: Tensor  # (C*K, C*K, k2, k2)
    bias2: Tensor  # (C*K,)
    weight3: Tensor  # (C, C*K, k3, k3)
    bias3: Tensor  # (C,)
    centre1: Tensor  # (C, K), from the pixel to hidden unit j
    centre2: Tensor  # (C, K, K), from hidden unit j (last) to i
    centre3: Tensor  # (C, K), from hidden unit i to the pixel
    t: Tensor  # (C, H, W), positive, at least float32; in a wavefront also (B, C, H, W)


def positive(t: Tensor) -> Tensor:
    """``max(|t|, 1e-12)``, never below float32, where that is not zero."""
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    return t.to(dtype).abs().clamp(min=1e-12)


def with_centres(
    weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, weight3: Tensor, bias3: Tensor,
    t: Tensor,
) -> MintWeights:  # fmt: skip
    """All of :class:`MintWeights`, whose centres are views of the weights."""
    centres = centres_of(weight1, weight2, weight3)
    return MintWeights(weight1, bias1, weight2, bias2, weight3, bias3, *centres, t)


#: how a convolution of a layer is called: with its number, what it computes, and its input
Call = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]


def call_plainly(number: int, convolution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return convolution(x)


#: by the dimensions of x
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution along as many axes as x and weight have, zero-padded to the same size."""
    return CONVOLUTIONS[x.ndim](x, weight, bias, padding="same")


def masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, order: str, triangle: str
) -> Tensor:
    """Convolution with masked weights, skipping colours that the mask hides; along any axes.

    In channel order a colour sees only itself and those before it ("lower") or after it ("upper").
    Up to four blocks of colours are convolved each with what they see, if that is faster
    (:func:`blocks_of`): 2/3 of the dense work for three blocks, 5/8 for four.

    Args:
        x: (B, in_channels, H, W), colour-major, zero-padded here to the same size.
        weight: (out_channels, in_channels, k, k), or with one or three k, as x has axes; masked.
        bias: (out_channels,) or None.
        colours: C, a divisor of both channel counts.
        order: ``"channel"``, or ``"pixel"``, where no colour is wholly hidden.
        triangle: ``"lower"`` or ``"upper"``.
    """
    convolution = CONVOLUTIONS[x.ndim]
    padding = weight.shape[-1] // 2  # less to call than padding="same"
    blocks = 1
    if colours > 1 and order == "channel":
        blocks = blocks_of(x, weight, colours)
    if blocks == 1:
        return convolution(x, weight, bias, padding=padding)
    edges = [colours * block // blocks for block in range(blocks + 1)]
    outputs, inputs = len(weight) // colours, weight.shape[1] // colours
    rows = [(stop - start) * outputs for start, stop in pairwise(edges)]
    # Split, for the gradient of a split is one tensor, and that of a slice is one each.
    biases = [None] * blocks if bias is None else bias.split(rows)
    results = []
    for start, stop, own, own_bias in zip(
        edges, edges[1:], weight.split(rows), biases, strict=False
    ):
        seen = slice(0, stop * inputs) if triangle == "lower" else slice(start * inputs, None)
        results.append(convolution(x[:, seen], own[:, seen], own_bias, padding=padding))
    return torch.cat(results, 1)


#: channels that are multiplied together
VECTOR = 16
#: what a block costs beside its products, as many multiply-adds: to copy a pixel of what it sees,
#: and to start
COPY, START = 100, 6_000_000
#: pixels that a graph is made for, whose batch may be of any size
PIXELS_OF_GRAPHS = 2**13


def blocks_of(x: Tensor, weight: Tensor, colours: int) -> int:
    """Blocks of colours to convolve one by one: 1, where more of them do not save a tenth.

    Convolutions take channels in vectors, so that blocks multiply more than the mask leaves; each
    copies what it sees of x; and it has a start that few pixels do not pay for. So it comes about
    that, at batches of 8 on two cores with AVX-512, forward and backward, the middle convolution of
    the paper's layers takes 0.86, 0.77 and 0.92 times as long as the dense one, with 85, 21 and 5
    channels a colour (``python -m bench run --sections ceilings convolution``).
    """
    outputs, inputs = weight.shape[:2]
    taps, pixels = weight.numel() // (outputs * inputs), PIXELS_OF_GRAPHS
    if not torch.compiler.is_compiling():
        pixels = x.numel() // inputs
    if outputs * inputs * taps * pixels < 2 * START:  # no block could pay
        return 1
    copy = COPY
    if x.dtype == torch.float64:  # which is unfolded, at half the speed of products
        copy = COPY * taps // 2

    def of_a_pixel(blocks: int) -> int:
        edges = [colours * block // blocks for block in range(blocks + 1)]
        return sum(
            taps * _whole_vectors((stop - start) * outputs // colours)
            * _whole_vectors(stop * inputs // colours)
            + copy * (stop * inputs // colours)
            for start, stop in pairwise(edges)
        )  # fmt: skip

    best = min(range(2, min(colours, 4) + 1), key=of_a_pixel)
    saved = 9 * of_a_pixel(1) // 10 - of_a_pixel(best)
    return best if pixels * saved > START * (best - 1) else 1


def _whole_vectors(channels: int) -> int:
    return -(-channels // VECTOR) * VECTOR


def mint_map(
    x: Tensor,
    weights: MintWeights,
    activation: Activation,
    order: str,
    triangle: str,
    call: Call = call_plainly,
    condition: Condition | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = t x + W3 h(W2 h(W1 x + b1) + b2) + b3``, the Mint layer of the paper.

    Returns:
        y (B, C, H, W) in the dtype of x, and both hidden layers h1, h2 (B, C*K, H, W).
    """

    def first(x: Tensor) -> Tensor:
        return convolve(x, weights.weight1, weights.bias1)

    def middle(h1: Tensor) -> Tensor:  # where nearly all the work of a layer is
        return masked_conv2d(h1, weights.weight2, weights.bias2, x.shape[1], order, triangle)

    def last(h2: Tensor) -> Tensor:
        return convolve(h2, weights.weight3, weights.bias3)

    shift1, shift2, shift3, _ = condition or (None,) * 4
    h1 = activation.function(shifted(call(1, first, x), shift1))
    h2 = activation.function(shifted(call(2, middle, h1), shift2))
    y = shifted(call(3, last, h2), shift3) + weights.t * scaled(x, condition)
    return y.to(x.dtype), h1, h2


def mint_forward(
    x: Tensor,
    weights: MintWeights,
    activation: Activation,
    order: str,
    triangle: str,
    call: Call = call_plainly,
    condition: Condition | None = None,
) -> tuple[Tensor, Tensor]:
    """The Mint layer and the diagonal of its Jacobian.

    The diagonal follows the same calculus as the map (Proposition 1): it multiplies under
    composition and adds under addition,
    ``diag = t + sum_i D3_i h'(a2_i) sum_j D2_ij h'(a1_j) D1_j``, with D the centre weights. Its
    middle product is a K x K matrix per colour, applied at every pixel.

    Returns:
        y in the dtype of x, and the diagonal in that of t; both (B, C, H, W). The diagonal is
        positive.
    """
    assert activation.slope is not None
    y, h1, h2 = mint_map(x, weights, activation, order, triangle, call, condition)
    batch, colours, *size = x.shape
    per_colour = (batch, colours, h1.shape[1] // colours, math.prod(size))
    # The K x K matrix takes the outer two diagonals along, so the pixels need no product with them.
    through = torch.matmul(join_centres(weights).to(h1), activation.slope(h1).reshape(per_colour))
    diagonal = (through * activation.slope(h2).reshape(per_colour)).sum(2)
    return y, diagonal.reshape(x.shape) + scaled(weights.t, condition)


def join_centres(weights: MintWeights) -> Tensor:
    """:func:`join` of a layer's centres, never below float32, as t."""
    return join(*(centre.to(weights.t.dtype) for centre in weights[6:9]))


def join(centre1: Tensor, centre2: Tensor, centre3: Tensor) -> Tensor:
    """``D3 D2 D1`` (C, K, K): hidden unit j (last) to i, with both ends' weights to the pixel."""
    return centre3.unsqueeze(2) * centre2 * centre1.unsqueeze(1)


def centres_of(weight1: Tensor, weight2: Tensor, weight3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The diagonals of three maps, as :class:`MintWeights` has them: views of the weights."""
    colours = len(weight3)

    def centre(weight: Tensor) -> Tensor:
        """(C, outputs, inputs)."""
        middle: Any = (..., *[weight.shape[-1] // 2] * (weight.ndim - 2))
        blocks = weight[middle].unflatten(1, (colours, -1))
        blocks = blocks.unflatten(0, (colours, -1))
        return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)

    return centre(weight1).squeeze(2), centre(weight2), centre(weight3).squeeze(1)


def mint_magnitude(
    x: Tensor, weights: MintWeights, activation: Activation, condition: Condition | None = None
) -> Tensor:
    """What rounding in a Mint layer at x is relative to, (B, C, H, W).

    The absolute values of all that is added up, each with the slope by which its rounding reaches
    the output.
    """
    assert activation.slope is not None
    w1, b1, w2, b2, w3, b3 = (weight.abs() for weight in weights[:6])
    shift1, shift2, _, _ = condition or (None,) * 4
    size1, size2, size3, _ = (one.abs() for one in condition) if condition else (None,) * 4
    h1 = activation.function(shifted(convolve(x, weights.weight1, weights.bias1), shift1))
    h2 = activation.function(shifted(convolve(h1, weights.weight2, weights.bias2), shift2))
    first = activation.slope(h1) * shifted(convolve(x.abs(), w1, b1), size1)
    second = activation.slope(h2) * shifted(convolve(2 * h1.abs() + first, w2, b2), size2)
    outer = shifted(convolve(h2.abs() + second, w3, b3), size3)
    return outer + (weights.t * scaled(x, condition)).abs()
