"""What was executed, counted."""

from dataclasses import dataclass

import numpy as np

from tests.ptx.arithmetic import Array
from tests.ptx.program import Instruction, Program

WARP = 32

#: bytes that global memory is read by, and that a cache keeps together
SECTOR, LINE = 32, 128


@dataclass
class Counts:
    """Of one launch."""

    program: Program

    def __post_init__(self) -> None:
        self.issued = np.zeros(len(self.program.code) + 1, np.int64)
        self.products = 0

    def passed(self, start: int, stop: int, warps: int) -> None:
        """That many warps have executed the instructions of a range."""
        self.issued[start] += warps
        self.issued[stop] -= warps

    def shared(self, address: Array, threads: Array, size: int) -> None:
        pass

    def global_(self, instruction: Instruction, address: Array, threads: Array, size: int) -> None:
        pass

    def multiplied(self, products: int) -> None:
        self.products += products
