"""Convolutions in float64 on a CPU as matrix products: torch's own are several times slower."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mintnet_triton.kernels.activation import Activation
from mintnet_triton.kernels.canvas import Space, offsets
from mintnet_triton.kernels.reference import Condition, MintWeights, scaled, shifted


class PaddedImages:
    """Canvases of images, one for each channel: a shifted image is a shifted line.

    Args:
        channels: of an image.
        size: (H, W) of an image, or its sizes along one axis or three.
    """

    def __init__(self, batch: int, channels: int, size: Sequence[int], radius: int) -> None:
        self.batch, self.canvas = batch, Space(tuple(size), radius)
        shape = (channels, self.canvas.positions(batch))
        self.lines = torch.zeros(shape, dtype=torch.float64)

    def _images(self, lines: Tensor, first: int) -> Tensor:
        """The pixels (batch, channels, H, W) of lines, in which that is the first one's place."""
        sample, *along = self.canvas.steps
        return lines.as_strided(
            (self.batch, len(lines), *self.canvas.size),
            (sample, lines.stride(0), *along),
            lines.storage_offset() + first,
        )

    def put(self, values: Tensor, block: int) -> None:
        """Write a block (batch, channels, H, W), of which there are some before."""
        channels = slice(block * values.shape[1], (block + 1) * values.shape[1])
        self._images(self.lines[channels], self.canvas.guard).copy_(values)

    def convolve(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The convolution of the first channels by weights (k, k, outputs, inputs)."""
        inputs, canvas = weight.shape[-1], self.canvas
        first, span = canvas.guard, self.batch * canvas.steps[0]
        sums = bias.unsqueeze(1).repeat(1, span)  # a copy even of one, for it is added to
        taps = offsets(len(weight), len(canvas.size)) if inputs else ()
        for away, of_tap in zip(taps, weight.flatten(0, -3), strict=False):
            seen = first + canvas.distance(away)
            sums.addmm_(of_tap, self.lines[:inputs, seen : seen + span])
        return self._images(sums, 0)


@torch.no_grad()
def mint_map(
    x: Tensor, weights: MintWeights, activation: Activation, condition: Condition | None = None
) -> Tensor:
    """y of a Mint layer, shaped as x, float64 as x is."""
    values = x
    for layer, (weight, bias) in enumerate(zip(weights[:6:2], weights[1:6:2], strict=True)):
        batch, channels, *size = values.shape
        padded = PaddedImages(batch, channels, size, weight.shape[-1] // 2)
        padded.put(values, 0)
        values = shifted(padded.convolve(by_tap(weight), bias), condition and condition[layer])
        if layer < 2:
            values = activation.function(values)
    return values + weights.t * scaled(x, condition)


def by_tap(weight: Tensor) -> Tensor:
    """(outputs, inputs, k, k) -> (k, k, outputs, inputs)."""
    return weight.permute(*range(2, weight.ndim), 0, 1).contiguous()
