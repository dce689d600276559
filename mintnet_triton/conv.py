"""Masked convolutions: convolutions that respect an order of the variables."""

import torch
from torch import Tensor, nn

from mintnet_triton.checks import check_odd, check_positive, check_tensor
from mintnet_triton.kernels import masked_conv2d
from mintnet_triton.ordering import Order, Ordering, Triangle

#: elements of a weight up to which each has a mask of its own, which is sooner multiplied
SMALL = 2**17


class MaskedConv2d(nn.Module):
    """A convolution whose outputs see no variable that comes after them.

    Channels come in colours, colour-major: unit k of colour c is channel ``c * K + k``, and all
    units of a colour stand at its place in the order. Zero-padded to the same size, stride 1.

    Args:
        in_channels: multiple of ``colours``.
        out_channels: multiple of ``colours``.
        kernel_size: odd.
        colours: number of colours C, 1 by default.
        triangle: ``"lower"`` or ``"upper"``.
        order: ``"channel"`` or ``"pixel"``.
        strict: hide the output's own variable too (PixelCNN's first layer, its mask A).
        bias: learn a bias, True by default.

    Weights and bias start as those of ``nn.Conv2d``.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        colours: int = 1,
        triangle: Triangle = "lower",
        order: Order = "channel",
        strict: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        in_channels, out_channels, colours = check_positive(
            in_channels=in_channels, out_channels=out_channels, colours=colours
        )
        kernel_size = check_odd("kernel_size", kernel_size)
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if count % colours:
                raise ValueError(f"{name} must be a multiple of colours={colours}, got {count}")
        self.ordering = Ordering(order, triangle)
        self.strict = strict
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
        self.weight, self.bias = dense.weight, dense.bias
        self.colours = colours
        #: derived, hence no buffer, which people average and load
        self._seen = self._what_is_seen()

    @property
    def mask(self) -> Tensor:
        """What an output colour sees, (C, C, k, k), bool: colours out and in, row, column."""
        size = self.weight.shape[-1]
        mask = self.ordering.conv_mask(self.colours, size, strict=self.strict)
        return mask.to(self.weight.device)

    def _what_is_seen(self) -> Tensor:
        """The mask as zeros and ones to multiply the weight by.

        (out_channels, in_channels, k, k), or a shape that is broadcast to it; where it would be
        large, (C, 1, in_channels, k, k), for all units of an output colour.
        """
        outputs, inputs, *_ = self.weight.shape
        units = outputs // self.colours
        seen = self.mask.repeat_interleave(inputs // self.colours, 1).to(self.weight.dtype)
        if units == 1 or self.colours == 1:
            return seen
        if self.weight.numel() <= SMALL:
            return seen.repeat_interleave(units, 0)
        return seen.unsqueeze(1)

    def masked_weight(self) -> Tensor:
        """Effective weight (out_channels, in_channels, k, k), a new contiguous tensor."""
        weight, seen = self.weight, self._seen
        if seen.dtype is not weight.dtype or seen.device != weight.device:
            with torch.inference_mode(False):  # it may be needed for gradients later
                seen = self._seen = self._what_is_seen()
        if seen.ndim == 5:
            by_colour = weight.reshape(self.colours, -1, *weight.shape[1:])
            return (by_colour * seen).reshape(weight.shape).contiguous()
        return (weight * seen).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W).

        Raises:
            TypeError, ValueError: x is not a finite tensor of the right shape, dtype and device.
        """
        weight, ordering = self.weight, self.ordering
        check_tensor("x", x, (weight.shape[1], None, None), like=weight)
        return masked_conv2d(
            x, self.masked_weight(), self.bias, self.colours, ordering.order, ordering.triangle
        )

    def extra_repr(self) -> str:
        outputs, inputs, size, _ = self.weight.shape
        return (
            f"{inputs}, {outputs}, kernel_size={size}, colours={self.colours}, "
            f"triangle={self.ordering.triangle!r}, order={self.ordering.order!r}, "
            f"strict={self.strict}, bias={self.bias is not None}"
        )
