"""What a layer knows of the place of a pixel: smooth maps that are added to its biases.

A convolution is alike at all places but for the zeros around an image. Pictures of one centred
thing are not, and a few low frequencies say where it is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mintnet_triton.checks import as_size, check_positive


class PositionBias(nn.Module):
    """So many maps of a size, each a sum of products of one cosine along each axis.

    They are the lowest frequencies of a discrete cosine transform (DCT-II), the constant with them;
    along an axis of fewer pixels there are no more than pixels. The weight (outputs, frequencies of
    all axes) starts at zero.

    Args:
        frequencies: how many along each axis, 1 or more.
        size: (H, W), or sizes along other axes.
        outputs: number of maps P.
        device, dtype: of the weight; torch's defaults if None.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    def __init__(
        self,
        frequencies: int,
        size: Sequence[int],
        outputs: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        frequencies, outputs = check_positive(frequencies=frequencies, outputs=outputs)
        self.size = as_size("size", size)
        self.frequencies = tuple(min(frequencies, side) for side in self.size)
        shape = outputs, math.prod(self.frequencies)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        # No buffer, which a cast would round, and loading into empty memory would leave empty.
        self._cosines = cosines(self.frequencies, self.size, self.weight.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No bias anywhere."""
        nn.init.zeros_(self.weight)

    def forward(self) -> Tensor:
        """The maps, as one sample (1, P, H, W), in float64: all that solve and bound see the same.

        No autocast rounds them either.
        """
        weight = self.weight  # looked at once, for it may be computed
        if self._cosines.device != weight.device:
            self._cosines = cosines(self.frequencies, self.size, weight.device)
        return (weight.double() @ self._cosines).view(1, -1, *self.size)

    def extra_repr(self) -> str:
        return f"frequencies={self.frequencies}, size={self.size}, outputs={len(self.weight)}"


def cosines(frequencies: Sequence[int], size: Sequence[int], device: torch.device) -> Tensor:
    """(frequencies of all axes, pixels of all axes), float64."""
    found = torch.ones(1, 1, dtype=torch.float64, device=device)
    for count, side in zip(frequencies, size, strict=True):
        frequency, pixel = (
            torch.arange(n, dtype=torch.float64, device=device) for n in (count, side)
        )
        found = found.kron((math.pi / side * torch.outer(frequency, pixel + 0.5)).cos())
    return found
