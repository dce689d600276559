"""Convolutions in float64 on a CPU as matrix products: torch's own are several times slower."""

import math

import torch
from torch import Tensor

from mintnet_triton.kernels.activation import Activation
from mintnet_triton.kernels.reference import MintWeights


class PaddedImages:
    """Images with a border of zeros, in one line: a shifted image is a shifted line.

    Args:
        channels: of an image.
    """

    def __init__(self, batch: int, channels: int, height: int, width: int, radius: int) -> None:
        self.stride, self.radius = width + 2 * radius, radius
        self.images = torch.zeros(
            channels, batch, height + 2 * radius, self.stride, dtype=torch.float64
        )

    def put(self, values: Tensor, block: int) -> None:
        """Write a block (batch, channels, height, width), of which there are some before."""
        inside = slice(self.radius, -self.radius or None)
        channels = slice(block * values.shape[1], (block + 1) * values.shape[1])
        self.images[channels, :, inside, inside] = values.transpose(0, 1)

    def convolve(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The convolution of the first channels by weights (k * k, outputs, inputs)."""
        taps, outputs, inputs = weight.shape
        kernel = math.isqrt(taps)
        lines = self.images[:inputs].flatten(1)
        margin = self.radius * (self.stride + 1)
        sums = bias.unsqueeze(1).expand(-1, lines.shape[1]).contiguous()
        inside = slice(margin, lines.shape[1] - margin)
        for tap in range(taps if inputs else 0):
            shift = (tap // kernel - kernel // 2) * self.stride + tap % kernel - kernel // 2
            seen = lines[:, margin + shift : lines.shape[1] - margin + shift]
            sums[:, inside].addmm_(weight[tap], seen)
        border = slice(self.radius, -self.radius or None)
        images = sums.view(outputs, *self.images.shape[1:])[:, :, border, border]
        return images.transpose(0, 1)


@torch.no_grad()
def mint_map(x: Tensor, weights: MintWeights, activation: Activation) -> Tensor:
    """y of a Mint layer, (B, C, H, W), float64 as x is."""
    values = x
    for layer, (weight, bias) in enumerate(zip(weights[:6:2], weights[1:6:2], strict=True)):
        batch, channels, height, width = values.shape
        padded = PaddedImages(batch, channels, height, width, weight.shape[-1] // 2)
        padded.put(values, 0)
        values = padded.convolve(by_tap(weight), bias)
        if layer < 2:
            values = activation.function(values)
    return values + weights.t * x


def by_tap(weight: Tensor) -> Tensor:
    """(outputs, inputs, k, k) -> (k * k, outputs, inputs)."""
    return weight.permute(2, 3, 0, 1).flatten(0, 1).contiguous()
