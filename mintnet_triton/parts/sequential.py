"""Invertible maps one after the other, as ``nn.Sequential`` has modules."""

from collections.abc import Iterable, Iterator
from typing import cast

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

    def steps(self) -> Iterable[tuple[str, Invertible]]:
        return cast(Iterator[tuple[str, Invertible]], self.named_children())
