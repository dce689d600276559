"""Which variable precedes which: orders, triangles, and the masks that follow from them.

A map is *triangular* when every output depends only on the variables that do not come after it in
one fixed order. Everything about an order is derived from :meth:`Ordering.rank`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Order = Literal["channel", "pixel"]
Triangle = Literal["lower", "upper"]


class OrderingError(ValueError):
    """Maps of different orderings were combined: the result would not be triangular."""


@dataclass(frozen=True)
class Ordering:
    """A total order of the variables of an image, of any number of axes, or a vector.

    Args:
        order: ``"channel"``: colour by colour, each row by row (the order of the paper's models);
            ``"pixel"``: pixel by pixel, each colour by colour. A vector has one order. A series is
            a row, and a volume goes plane by plane.
        triangle: ``"lower"`` for that order, ``"upper"`` for its reverse.

    Raises:
        ValueError: a name other than these.
    """

    order: Order = "channel"
    triangle: Triangle = "lower"

    def __post_init__(self) -> None:
        if self.order not in ("channel", "pixel"):
            raise ValueError(f"order must be 'channel' or 'pixel', got {self.order!r}")
        if self.triangle not in ("lower", "upper"):
            raise ValueError(f"triangle must be 'lower' or 'upper', got {self.triangle!r}")

    def rank(self, *shape: int) -> Tensor:
        """Position of every variable in the order, from 0.

        Args:
            shape: (C, H, W) of an image, (C, L) of a series, (C, D, H, W) of a volume, or (n,) of
                a vector.

        Returns:
            int64 tensor of that shape.
        """
        size = torch.Size(shape).numel()
        if self.order == "pixel" and len(shape) > 1:
            colours, *sides = shape
            rank = torch.arange(size).view(*sides, colours).movedim(-1, 0)
        else:
            rank = torch.arange(size).view(shape)
        return rank if self.triangle == "lower" else size - 1 - rank

    def conv_mask(
        self, colours: int, kernel_size: int, *, strict: bool = False, axes: int = 2
    ) -> Tensor:
        """Taps of a convolution that look at variables not after the output.

        Args:
            colours: number of colours C.
            kernel_size: odd side k of the kernel.
            strict: also exclude the output's own variable (the first layer of a PixelCNN).
            axes: of the images: 1, 2 or 3.

        Returns:
            bool tensor (C, C, k, k), or with as many k as axes: output colour, input colour, row,
            column.
        """
        rank = self.rank(colours, *[kernel_size] * axes)
        middle: Any = (slice(None), *[kernel_size // 2] * axes)
        centre = rank[middle].view(-1, *[1] * (axes + 1))
        return rank < centre if strict else rank <= centre


def common_ordering(*orderings: Ordering | None) -> Ordering | None:
    """The ordering that all share; None stands for a map that is diagonal, hence fits any.

    Raises:
        OrderingError: two of them differ.
    """
    named = {ordering for ordering in orderings if ordering is not None}
    if len(named) > 1:
        listed = " and ".join(sorted(str(ordering) for ordering in named))
        raise OrderingError(
            f"maps of different orderings cannot be combined into a triangular map: {listed}; "
            "MintPair and MintNet alternate triangles"
        )
    return named.pop() if named else None
