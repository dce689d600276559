"""MintClassifier: the paper's invertible classifier, a ResNet-like stack of Mint layers."""

from collections.abc import Sequence
from typing import Any, Self, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mintnet_triton.checks import (
    as_kernel_sizes,
    as_size,
    check_integer,
    check_positive,
    check_tensor,
)
from mintnet_triton.flow import squeeze_positions, squeezed
from mintnet_triton.hooks import has_to_be_called
from mintnet_triton.kernels import Activation
from mintnet_triton.mint import MintLayer, Squeeze, first_tensor
from mintnet_triton.ordering import Order
from mintnet_triton.presets import model_arguments


def _values(results: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """What a module gives, without the determinant of an invertible one."""
    return results[0] if isinstance(results, tuple) else results


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a Mint layer that computes as such, and not in a way of its own."""
    return isinstance(module, MintLayer) and (
        (type(module).forward, type(module)._forward) == (MintLayer.forward, MintLayer._forward)
    )


class Block(nn.Sequential):
    """Modules one after the other, of which Mint layers pass on y alone."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            if _is_plain(module) and not has_to_be_called(module):
                x = cast(MintLayer, module).transform(x)  # which spares the determinant
            else:
                x = _values(module(x))
        return x


class MintClassifier(nn.Module):
    """Images, zero-padded in channels, through BatchNorm and Mint layers to log-probabilities.

    Per pair: BatchNorm, lower layer, BatchNorm, upper layer; a squeeze keeps the hidden units;
    then ELU, the mean over space, and a linear map.

    Args:
        channels: of an image, at most ``width``; None accepts any number up to that.
        image_size: (H, W), or one integer for both; (L,) or (D, H, W) for series or volumes.
        classes: number of classes.
        pairs: number of Mint pairs, 19 in the paper.
        hidden: hidden units K per channel, 1 in the paper.
        squeezes: number of squeezes, 2 in the paper.
        width: channels after padding, 16 in the paper.
        order: "channel" or "pixel".
        kernel_size: odd, or three odd sizes.
        activation: name of a monotone function, or an :class:`Activation`.

    Raises:
        ValueError, TypeError: an argument outside its range, or a size that does not divide.
    """

    def __init__(
        self,
        channels: int | None = 3,
        image_size: int | Sequence[int] = 32,
        classes: int = 10,
        pairs: int = 19,
        hidden: int = 1,
        squeezes: int = 2,
        width: int = 16,
        order: Order = "channel",
        kernel_size: int | Sequence[int] = 3,
        activation: str | Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        classes, pairs, hidden, width = check_positive(
            classes=classes, pairs=pairs, hidden=hidden, width=width
        )
        squeezes = check_integer("squeezes", squeezes, least=0)
        if channels is not None:
            channels = check_integer("channels", channels, least=1)
            if channels > width:
                raise ValueError(f"channels must be at most width={width}, got {channels}")
        size = as_size("image_size", image_size)
        positions = squeeze_positions(pairs, squeezes)
        squeezed(size, squeezes)
        #: what the constructor was called with, for :func:`mintnet_triton.save`
        self.arguments: dict[str, Any] = {
            "channels": channels,
            "image_size": size,
            "classes": classes,
            "pairs": pairs,
            "hidden": hidden,
            "squeezes": squeezes,
            "width": width,
            "order": order,
            "kernel_size": as_kernel_sizes(kernel_size),
            "activation": activation,
        }
        self.input_shape = (channels, *size)
        self.width = width
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(size) - 1]
        self.layers = nn.ModuleList()
        for pair in range(pairs):
            if pair in positions:
                self.layers.append(Squeeze(len(size)))
                width, size = width * 2 ** len(size), squeezed(size, 1)
            block = Block()
            for triangle in ("lower", "upper"):
                block.append(norm(width))
                block.append(
                    MintLayer(
                        width,
                        size,
                        hidden,
                        triangle=triangle,
                        order=order,
                        kernel_size=kernel_size,
                        activation=activation,
                        initialisation="classifier",
                    )
                )
            self.layers.append(block)
        self.fc = nn.Linear(width, classes)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A classifier of the paper.

        Args:
            name: "mnist" or "cifar10"; "digits" or "fashion" for small ones, not the paper's.
            changes: constructor arguments to use instead of the preset's.

        Raises:
            ValueError: no such preset.
        """
        return cls(**{**model_arguments(name, "classifier"), **changes})

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, classes) of images (B, C, H, W), series or volumes.

        Raises:
            TypeError, ValueError: images are not a finite tensor of the right shape and dtype.
        """
        check_tensor("images", images, self.input_shape, like=first_tensor(self))
        if images.shape[1] > self.width:
            raise ValueError(f"images have {images.shape[1]} channels, more than {self.width}")
        axes = images.ndim - 2
        x = F.pad(images, (*[0, 0] * axes, 0, self.width - images.shape[1]))
        for layer in self.layers:
            x = _values(layer(x))
        return F.log_softmax(self.fc(F.elu(x).mean([*range(2, x.ndim)])), dim=1)
