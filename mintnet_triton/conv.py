"""Masked convolutions: convolutions that respect an order of the variables."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mintnet_triton.checks import check_odd, check_positive, check_tensor
from mintnet_triton.kernels import masked_conv2d
from mintnet_triton.ordering import Order, Ordering, Triangle


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

    mask: Tensor

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
        check_positive(in_channels=in_channels, out_channels=out_channels, colours=colours)
        check_odd("kernel_size", kernel_size)
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if count % colours:
                raise ValueError(f"{name} must be a multiple of colours={colours}, got {count}")
        self.ordering = Ordering(order, triangle)
        self.strict = strict
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
        self.weight, self.bias = dense.weight, dense.bias
        mask = self.ordering.conv_mask(colours, kernel_size, strict=strict)
        self.register_buffer("mask", mask, persistent=False)  # (C, C, k, k)

    def _renew_mask(self) -> None:
        """Restore the mask where it is not copied: it is derived, hence no part of a state dict."""
        if self.weight.device.type != "meta":
            mask = self.ordering.conv_mask(self.colours, self.weight.shape[-1], strict=self.strict)
            self.mask = mask.to(self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._renew_mask()  # `to_empty` leaves it without values
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._renew_mask()  # `assign=True` may have moved the weight away from the meta device

    @property
    def colours(self) -> int:
        return len(self.mask)

    def masked_weight(self) -> Tensor:
        """Effective weight (out_channels, in_channels, k, k), a new tensor."""
        seen = self.mask[:, None, :, None]
        return torch.where(seen, self._by_colour(self.weight), 0).view_as(self.weight)

    def _by_colour(self, weight: Tensor) -> Tensor:
        outputs, inputs, height, width = weight.shape
        blocks = (self.colours, outputs // self.colours, self.colours, inputs // self.colours)
        return weight.view(*blocks, height, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W).

        Raises:
            TypeError, ValueError: x is not a finite tensor of the right shape, dtype and device.
        """
        check_tensor("x", x, (self.weight.shape[1], None, None), like=self.weight)
        order, triangle = self.ordering.order, self.ordering.triangle
        return masked_conv2d(x, self.masked_weight(), self.bias, self.colours, order, triangle)

    def extra_repr(self) -> str:
        outputs, inputs, size, _ = self.weight.shape
        return (
            f"{inputs}, {outputs}, kernel_size={size}, colours={self.colours}, "
            f"triangle={self.ordering.triangle!r}, order={self.ordering.order!r}, "
            f"strict={self.strict}, bias={self.bias is not None}"
        )
