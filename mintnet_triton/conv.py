"""Masked convolutions: convolutions that respect an order of the variables."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mintnet_triton.checks import check_odd, check_positive, check_tensor
from mintnet_triton.kernels import masked_conv2d
from mintnet_triton.ordering import Order, Ordering, Triangle

#: elements of a weight up to which each has a mask of its own, which is sooner multiplied
SMALL = 2**17

_DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class MaskedConv(nn.Module):
    """A convolution whose outputs see no variable that comes after them.

    Of series (B, C, L), images (B, C, H, W) or volumes (B, C, D, H, W): :class:`MaskedConv1d`,
    :class:`MaskedConv2d` and :class:`MaskedConv3d`, which differ in nothing else. Channels come in
    colours, colour-major: unit k of colour c is channel ``c * K + k``, and all units of a colour
    stand at its place in the order. Zero-padded to the same size, stride 1.

    Args:
        in_channels: multiple of ``colours``.
        out_channels: multiple of ``colours``.
        kernel_size: odd.
        colours: number of colours C, 1 by default.
        triangle: ``"lower"`` or ``"upper"``.
        order: ``"channel"`` or ``"pixel"``.
        strict: hide the output's own variable too (PixelCNN's first layer, its mask A).
        bias: learn a bias, True by default.
        device, dtype: of the parameters; torch's defaults if None.

    Weights and bias start as those of ``nn.Conv2d``.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    #: along which it looks
    axes: ClassVar[int]

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels, out_channels, colours = check_positive(
            in_channels=in_channels, out_channels=out_channels, colours=colours
        )
        kernel_size = check_odd("kernel_size", kernel_size)
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if count % colours:
                raise ValueError(f"{name} must be a multiple of colours={colours}, got {count}")
        self.in_channels, self.out_channels, self.kernel_size = (
            in_channels,
            out_channels,
            kernel_size,
        )
        self.ordering = Ordering(order, triangle)
        self.strict = strict
        dense = _DENSE[self.axes - 1](
            in_channels, out_channels, kernel_size, bias=bias, device=device, dtype=dtype
        )
        self.weight, self.bias = dense.weight, dense.bias
        self.colours = colours
        #: derived, hence no buffer, which people average and load
        self._seen = self._what_is_seen()

    def reset_parameters(self) -> None:
        """Start weights and bias as ``nn.Conv2d`` does, anew."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            reach = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -reach, reach)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._seen = self._what_is_seen()
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._seen = self._what_is_seen()  # `assign=True` may have changed device and dtype

    @property
    def mask(self) -> Tensor:
        """What an output colour sees, (C, C, k, k), bool: colours out and in, row, column.

        With as many k as there are axes.
        """
        with torch.device(self._like().device):
            return self.ordering.conv_mask(
                self.colours, self.kernel_size, strict=self.strict, axes=self.axes
            )

    def _like(self) -> Tensor:
        """A tensor of the weight's device and dtype, also where a hook has yet to compute it."""
        like = next(self.parameters(), None)
        return self._seen if like is None else like

    @torch.inference_mode(False)  # it may be needed for gradients later
    def _what_is_seen(self) -> Tensor:
        """The mask as zeros and ones to multiply the weight by.

        (out_channels, in_channels, k, k), or a shape that is broadcast to it; where it would be
        large, (C, 1, in_channels, k, k), for all units of an output colour.
        """
        units = self.out_channels // self.colours
        mask = self.mask.repeat_interleave(self.in_channels // self.colours, 1)
        seen = mask.to(self._like().dtype)
        if units == 1 or self.colours == 1:
            return seen
        if seen.numel() * units <= SMALL:
            return seen.repeat_interleave(units, 0)
        return seen.unsqueeze(1)

    def raw_weight(self) -> Tensor:
        """The weight (out_channels, in_channels, k, k) as it is, without the mask.

        Raises:
            TypeError, ValueError: it is sharded, or of another shape than it was.
        """
        weight = self.weight
        if hasattr(weight, "device_mesh"):  # a DTensor, which takes a second to import
            raise TypeError(
                "weight is sharded: call unshard() on every sharded module, or register what you "
                "call by register_fsdp_forward_method"
            )
        shape = (self.out_channels, self.in_channels, *[self.kernel_size] * self.axes)
        if weight.shape != shape:
            raise ValueError(f"weight must have shape {shape}, got {tuple(weight.shape)}")
        return weight

    def masked_weight(self) -> Tensor:
        """Effective weight (out_channels, in_channels, k, k), a new contiguous tensor.

        Hidden entries have to be finite, for they are multiplied by zero.

        Raises:
            TypeError, ValueError: as :meth:`raw_weight`.
        """
        weight, seen = self.raw_weight(), self._seen
        if seen.is_meta and not weight.is_meta:  # of weights that are given for a call
            seen = self._what_is_seen()
        seen = seen.to(weight.device, weight.dtype)
        if seen.ndim > weight.ndim:
            by_colour = weight.reshape(self.colours, -1, *weight.shape[1:])
            return (by_colour * seen).reshape(weight.shape).contiguous()
        return (weight * seen).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W), or with L, or D, H and W.

        Raises:
            TypeError, ValueError: x is not a finite tensor of the right shape, dtype and device.
        """
        weight, ordering = self.masked_weight(), self.ordering
        check_tensor("x", x, (weight.shape[1], *[None] * self.axes), like=weight)
        return masked_conv2d(x, weight, self.bias, self.colours, ordering.order, ordering.triangle)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"colours={self.colours}, "
            f"triangle={self.ordering.triangle!r}, order={self.ordering.order!r}, "
            f"strict={self.strict}, bias={self.bias is not None}"
        )


class MaskedConv1d(MaskedConv):
    """:class:`MaskedConv` of series (B, C, L)."""

    axes = 1


class MaskedConv2d(MaskedConv):
    """:class:`MaskedConv` of images (B, C, H, W)."""

    axes = 2


class MaskedConv3d(MaskedConv):
    """:class:`MaskedConv` of volumes (B, C, D, H, W)."""

    axes = 3
