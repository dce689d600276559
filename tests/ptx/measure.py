"""What a launch did, counted: what a GPU's profiler would tell of it, but for time.

Instructions are those of PTX: ptxas makes others of them, fewer moves and more of addresses.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.arithmetic import Array
from tests.ptx.program import Instruction, Program

WARP = 32

#: bytes of global memory that are moved at once
SECTOR = 32

#: banks of shared memory, 4 bytes wide, each of which serves one word in a wavefront
BANKS, WORD = 32, 4

#: multiply-adds of an m64n128k16
UNIT = 64 * 128 * 16


class Traffic(NamedTuple):
    """Of one instruction, by all warps."""

    requests: int
    moved: int  # sectors of global memory, or wavefronts of shared memory
    ideal: int  # the fewest that hold what was asked for

    def plus(self, requests: int, moved: int, ideal: int) -> "Traffic":
        return Traffic(self.requests + requests, self.moved + moved, self.ideal + ideal)


class Access(NamedTuple):
    """One access to global memory by a warp."""

    instruction: Instruction  # "ld", "st", "cp" ...
    warp: int
    size: int  # bytes of a thread
    sectors: Array  # their addresses, each once, ascending; a cache's line is four of them

    @property
    def cache(self) -> str:
        """Its cache modifier: "ca", "cg" ..., or ""."""
        known = ("ca", "cg", "cs", "cv", "wb", "wt", "lu")
        return next((kind for kind in self.instruction.kinds if kind in known), "")


@dataclass(eq=False)
class Report:
    """What a launch did.

    Args:
        constants: of the kernel, its tile among them.
        blocks: how many of the grid were executed.
        measured: whether traffic is counted, which takes time.
        traced: whether the accesses of the first block executed are kept.
    """

    program: Program
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    threads: int
    shared_memory: int
    blocks: int
    measured: bool
    traced: bool
    products: int = 0
    shared: dict[int, Traffic] = field(default_factory=dict)  # by instruction
    sectors: dict[int, Traffic] = field(default_factory=dict)
    stream: list[Access] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._issued = np.zeros(len(self.program.code) + 1, np.int64)

    @property
    def kernel(self) -> str:
        return self.program.name

    @property
    def issued(self) -> Array:
        """How many warps have executed each instruction."""
        return np.asarray(self._issued.cumsum()[:-1])

    @property
    def instructions(self) -> dict[str, int]:
        """Executed by warps, by kind."""
        counts: Counter[str] = Counter()
        for instruction, times in zip(self.program.code, self.issued, strict=True):
            counts[kind_of(instruction)] += int(times)
        return {kind: count for kind, count in counts.most_common() if count}

    @property
    def matrix_units(self) -> float:
        """Matrix instructions, in multiples of an m64n128k16."""
        return self.products / UNIT

    def lines(self) -> list[str]:
        """Instructions that move memory badly, the worst first, with their places."""
        rows = []
        for what, traffic in (("wavefronts", self.shared), ("sectors", self.sectors)):
            for index, (_, moved, ideal) in traffic.items():
                one = self.program.code[index]
                rows.append((moved - ideal, f"{moved} {what} for {ideal}: {one.where} {one.text}"))
        return [text for excess, text in sorted(rows, key=lambda row: -row[0]) if excess]

    # Called while it is executed.

    def passed(self, start: int, stop: int, warps: int) -> None:
        """That many warps have executed the instructions of a range."""
        self._issued[start] += warps
        self._issued[stop] -= warps

    def multiplied(self, products: int) -> None:
        self.products += products

    def touched_shared(
        self, instruction: Instruction, address: Array, threads: Array, size: int
    ) -> None:
        """Threads access ``size`` bytes of shared memory each."""
        if not self.measured:
            return
        # 8 bytes are served by half warps, 16 by quarters.
        served = WARP * WORD // max(size, WORD)
        words = address[:, None] // WORD + np.arange(max(1, size // WORD))
        rows = np.repeat(threads // served, words.shape[1])
        distinct = np.unique(np.stack([rows, words.reshape(-1)], 1), axis=0)
        _, row = np.unique(distinct[:, 0], return_inverse=True)
        banks = np.bincount(row * BANKS + distinct[:, 1] % BANKS)
        banks = np.pad(banks, (0, -len(banks) % BANKS)).reshape(-1, BANKS)
        ideal = -(-np.bincount(row) // BANKS)
        warps = len(np.unique(threads // WARP))
        _add(self.shared, instruction, warps, int(banks.max(1).sum()), int(ideal.sum()))

    def touched_global(
        self, instruction: Instruction, address: Array, threads: Array, size: int
    ) -> None:
        """Threads access ``size`` bytes of global memory each."""
        if not self.measured and not self.traced:
            return
        for warp in np.unique(threads // WARP):
            own = np.unique(address[threads // WARP == warp])
            sectors = np.unique(own // SECTOR)
            if self.measured:
                _add(self.sectors, instruction, 1, len(sectors), -(-len(own) * size // SECTOR))
            if self.traced and warp < self.threads // WARP:
                self.stream.append(Access(instruction, int(warp), size, sectors * SECTOR))


def _add(
    traffic: dict[int, Traffic], instruction: Instruction, requests: int, moved: int, ideal: int
) -> None:
    before = traffic.get(instruction.index, Traffic(0, 0, 0))
    traffic[instruction.index] = before.plus(requests, moved, ideal)


#: kinds that tell instructions of one name apart
TELLING = ("global", "shared", "param", "mma_async", "commit_group", "wait_group", "fence", "async")


def kind_of(instruction: Instruction) -> str:
    """Its name, with the space that it accesses or what else matters."""
    kinds = [kind.partition("::")[0] for kind in instruction.kinds]
    return ".".join([instruction.name, *[kind for kind in kinds if kind in TELLING][:2]])


def total(traffic: dict[int, Traffic]) -> Traffic:
    """Of all instructions."""
    result = Traffic(0, 0, 0)
    for one in traffic.values():
        result = result.plus(*one)
    return result
