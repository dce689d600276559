"""What executed blocks move of global memory: what each reads, and what L1 has of it."""

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest

import numpy as np

from tests.ptx.arithmetic import Array
from tests.ptx.measure import SECTOR, WARP, Report
from tests.ptx.program import Instruction

#: sectors of a line
LINE = 4


class L1:
    """A cache of lines, the one that was not used for longest being the first to go.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.most = size // (SECTOR * LINE)
        self.lines: OrderedDict[int, int] = OrderedDict()  # sectors that are there, as bits

    def read(self, line: int, sectors: int) -> int:
        """How many sectors, given as bits, are not there; then they are."""
        there = self.lines.pop(line, 0)
        self.lines[line] = there | sectors
        if len(self.lines) > self.most:
            self.lines.popitem(last=False)
        return (sectors & ~there).bit_count()


#: in a key, the bits of a sector's number, below those of a warp or block
ABOVE = 44

#: lines that a block reads at once, and their sectors
Reads = list[tuple[int, int]]


@dataclass(eq=False)
class Traffic(Report):
    """Beside what a report has, the reads of all blocks, which are executed in lock-step."""

    reads: list[list[Reads]] = field(init=False)  # through L1, by block
    past: int = 0  # sectors that go past it
    touched: list[Array] = field(default_factory=list)  # sectors

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reads = [[] for _ in range(self.blocks)]

    def touched_global(
        self, instruction: Instruction, address: Array, threads: Array, size: int
    ) -> None:
        requests = np.unique(threads // WARP << ABOVE | address.astype(np.int64) // SECTOR)
        sectors = requests & (1 << ABOVE) - 1
        self._touch(sectors)
        if not through_l1(instruction):
            self.past += len(requests)
            return
        # Of a block, all warps together: lines, and which of their sectors.
        blocks = (requests >> ABOVE) * WARP // self.threads
        keys = np.unique(blocks << ABOVE | sectors)
        starts = np.flatnonzero(np.diff(keys // LINE, prepend=-1))
        bits = np.bitwise_or.reduceat(1 << keys % LINE, starts)
        blocks, lines = keys[starts] >> ABOVE, (keys[starts] & (1 << ABOVE) - 1) // LINE
        ends = np.flatnonzero(np.diff(blocks, prepend=-1, append=-1))
        for start, stop in pairwise(ends.tolist()):
            reads = zip(lines[start:stop].tolist(), bits[start:stop].tolist(), strict=True)
            self.reads[blocks[start]].append(list(reads))

    def _touch(self, sectors: Array) -> None:
        self.touched.append(sectors)
        if len(self.touched) > 100:
            self.touched = [np.unique(np.concatenate(self.touched))]

    def missed(self, resident: int, size: int) -> int:
        """Sectors that an L1 of that size has not, which so many blocks in succession share."""
        missed = 0
        for first in range(0, len(self.reads), resident):
            cache = L1(size)
            for together in zip_longest(*self.reads[first : first + resident], fillvalue=[]):
                for reads in together:
                    for line, bits in reads:
                        missed += cache.read(line, bits)
        return missed


def through_l1(instruction: Instruction) -> bool:
    """Plain loads, and copies that say so."""
    past = {"cg", "cs", "cv", "lu", "acquire", "relaxed", "volatile"}
    if instruction.name == "cp":
        return "ca" in instruction.kinds
    return instruction.name == "ld" and past.isdisjoint(instruction.kinds)
