"""Convolutions in float64 on a CPU as matrix products: torch's own are several times slower."""

import math

import torch
from torch import Tensor

from mintnet_triton.kernels.activation import Activation
from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.reference import Condition, MintWeights, scaled, shifted


class PaddedImages:
    """Canvases of images, one for each channel: a shifted image is a shifted line.

    Args:
        channels: of an image.
    """

    def __init__(self, batch: int, channels: int, height: int, width: int, radius: int) -> None:
        self.batch, self.canvas = batch, Canvas(height, width, radius)
        size = (channels, self.canvas.positions(batch))
        self.lines = torch.zeros(size, dtype=torch.float64)

    def _images(self, lines: Tensor, first: int) -> Tensor:
        """The pixels (batch, channels, height, width) of lines, in which that is the first one's
        place."""
        canvas = self.canvas
        size = (self.batch, len(lines), canvas.height, canvas.width)
        strides = (canvas.distance(canvas.rows, 0), lines.stride(0), canvas.pitch, 1)
        return lines.as_strided(size, strides, lines.storage_offset() + first)

    def put(self, values: Tensor, block: int) -> None:
        """Write a block (batch, channels, height, width), of which there are some before."""
        channels = slice(block * values.shape[1], (block + 1) * values.shape[1])
        self._images(self.lines[channels], self.canvas.place(0, 0, 0)).copy_(values)

    def convolve(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The convolution of the first channels by weights (k * k, outputs, inputs)."""
        taps, _, inputs = weight.shape
        kernel = math.isqrt(taps)
        first, end = self.canvas.place(0, 0, 0), self.canvas.place(self.batch, 0, 0)
        sums = bias.unsqueeze(1).expand(-1, end - first).contiguous()
        for tap in range(taps if inputs else 0):
            dy, dx = tap // kernel - kernel // 2, tap % kernel - kernel // 2
            away = self.canvas.distance(dy, dx)
            sums.addmm_(weight[tap], self.lines[:inputs, first + away : end + away])
        return self._images(sums, 0)


@torch.no_grad()
def mint_map(
    x: Tensor, weights: MintWeights, activation: Activation, condition: Condition | None = None
) -> Tensor:
    """y of a Mint layer, (B, C, H, W), float64 as x is."""
    values = x
    for layer, (weight, bias) in enumerate(zip(weights[:6:2], weights[1:6:2], strict=True)):
        batch, channels, height, width = values.shape
        padded = PaddedImages(batch, channels, height, width, weight.shape[-1] // 2)
        padded.put(values, 0)
        values = shifted(padded.convolve(by_tap(weight), bias), condition and condition[layer])
        if layer < 2:
            values = activation.function(values)
    return values + weights.t * scaled(x, condition)


def by_tap(weight: Tensor) -> Tensor:
    """(outputs, inputs, k, k) -> (k * k, outputs, inputs)."""
    return weight.permute(2, 3, 0, 1).flatten(0, 1).contiguous()
