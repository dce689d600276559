"""Invertible maps one after the other, as ``nn.Sequential`` has modules."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from mintnet_triton.invertible import Chain, Invertible, Shape, as_invertible


class InvertibleSequential(Chain, nn.Sequential):
    """A chain of what it is given: ``InvertibleSequential(ActNorm(3), MintPair(3, 32, 16))``.

    Args:
        maps: invertible ones, the first of which takes the data.

    Raises:
        TypeError: one of them is not invertible.
    """

    def __init__(self, *maps: nn.Module) -> None:
        super().__init__()
        for index, one in enumerate(maps):
            as_invertible(f"map {index}", one)
            self.append(one)

    @property
    def input_shape(self) -> Shape | None:
        return as_invertible("map 0", self[0]).input_shape if len(self) else None

    @property
    def output_shape(self) -> Shape | None:
        return as_invertible("the last map", self[-1]).output_shape if len(self) else None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(*list(self)[index])
        return super().__getitem__(index)

    def steps(self) -> Iterable[tuple[str, Invertible]]:
        # One map may be there several times.
        return cast(Iterable[tuple[str, Invertible]], self._modules.items())
