"""What a launch does on an H100, counted in a few of its blocks, whose PTX is executed on a CPU.

Blocks of one *period* do all that there is to do: the tiles of all outputs at the same places, or
all programs of one part of a sum. A period from the middle of the grid is executed, and stands for
the others; where blocks only copy, several that are spread over the grid.

Block i is taken to run on core ``i % CORES``, beside those that differ from it by multiples of
CORES, as many as a core holds. They take turns, access by access, at one L1 (:mod:`.traffic`), of
256 KB less what they share. What goes past it, and what it has not, comes from L2.

Not known here: conflicts of banks and of stores, latencies, what a matrix unit loses with narrow
operands.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench.count.issued import flops_of, in_machine_code, instructions
from bench.count.traffic import Traffic
from mintnet_triton.kernels.gpu import launching
from tests import compiled
from tests.ptx import executed, launches
from tests.ptx.arithmetic import Array
from tests.ptx.measure import SECTOR, WARP
from tests.ptx.memory import SPACE
from tests.ptx.program import Program
from tests.ptx.threads import DEFAULT

ARCH = "sm_90"
CORES = 132

#: of a core: bytes of L1 and shared memory together, of what blocks may share, and of what each of
#: them takes beside; registers, threads and blocks
CACHE, SHAREABLE, RESERVED = 256 << 10, 227 << 10, 1 << 10
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32

#: blocks that stand for a grid of copies
SPREAD = 16

#: blocks that are executed in lock-step, at most
TOGETHER = 64

#: of a long sum: the rounds of its loop from which more of them cost the same each
ROUNDS = 8


class Cost(NamedTuple):
    """Of a launch: all blocks together, if not said otherwise."""

    kernel: str
    grid: tuple[int, ...]
    registers: int  # of a thread
    shared: int  # bytes of a block
    resident: int  # blocks that a core holds, of those that there are for it
    flops: int  # executed, by matrix instructions if there are any
    exact: int  # flops that the mask leaves
    l2: int  # bytes
    memory: int  # bytes
    instructions: int  # of warps
    in_loops: float  # instructions of a warp for each m64n128k16, in loops that hold them

    @property
    def waves(self) -> float:
        return float(np.prod(self.grid)) / (CORES * self.resident)


def sample(grid: tuple[int, ...], period: int, one_sum: bool, resident: int) -> list[list[int]]:
    """Blocks that run on the same core at once, for each of those that stand for a grid.

    Args:
        grid: of up to three axes.
        period: how many blocks, one after the other, do all that there is to do; 1 where they copy.
        one_sum: whether all of the second axis is alike, or each of it does something else.
    """
    x, y, z = [*grid, 1, 1][:3]
    length, roles = (x * y, z) if one_sum else (x, y * z)
    count = min(1 if period > 1 else SPREAD, length // period)
    starts = [
        role * length + (2 * i + 1) * length // (2 * count) // period * period
        for role in range(roles)
        for i in range(count)
    ]
    chosen = [start + i for start in starts for i in range(period)]
    return [[(one + CORES * i) % (x * y * z) for i in range(resident)] for one in chosen]


def held(registers: int, shared: int, threads: int) -> int:
    """Blocks that a core holds."""
    return min(
        REGISTERS // (-(-registers // 8) * 8 * threads),
        SHAREABLE // (shared + RESERVED),
        THREADS // threads,
        BLOCKS,
    )


class Counts(NamedTuple):
    """Of all blocks executed, added up."""

    program: Program
    blocks: int
    issued: Array  # by instruction
    from_l2: float  # sectors
    touched: Array  # sectors, by storage

    def longer(self, twice: "Counts", rounds: float) -> "Counts":
        """Of a sum that many times as long, given those of one that is twice as long."""
        rest = rounds - 1
        return self._replace(
            issued=self.issued + rest * (twice.issued - self.issued),
            from_l2=self.from_l2 + rest * (twice.from_l2 - self.from_l2),
            touched=self.touched + rest * (twice.touched - self.touched),
        )


class Launch(NamedTuple):
    """A launch, and how its blocks lie on a core."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    shared: int
    resident: int

    @property
    def values(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.constants

    @property
    def is_sum(self) -> bool:
        return "per_split" in self.values

    def storages(self) -> list[int]:
        """Bytes of each, in the order in which they come in memory."""
        storages = (one.untyped_storage() for one in launching.tensors_in(self.arguments))
        return list({one.data_ptr(): one.nbytes() for one in storages}.values())

    def period(self) -> int:
        """How many blocks, one after the other, do all that the kernel does."""
        values = self.values
        if self.is_sum:
            return self.grid[0]
        if "weight" not in values or "samples" not in values:  # a copy
            return 1
        canvas, blocks = values["canvas"], values["BLOCKS"]
        places = values["samples"] * canvas.height * (canvas.width + canvas.radius)
        return self.grid[0] // -int(-places // blocks[0])

    def counted(self) -> Counts:
        """Execute those that stand for it."""
        if not self.is_sum:
            return self._execute()
        length, few = self.values["per_split"], ROUNDS * self.values["BLOCKS"][0]
        if length <= 2 * few:
            return self._execute()
        short, twice = (self._with("per_split", few * i)._execute() for i in (1, 2))
        return short.longer(twice, length / few)

    def _with(self, name: str, value: Any) -> "Launch":
        place = self.kernel.arg_names.index(name)
        arguments = (*self.arguments[:place], value, *self.arguments[place + 1 :])
        return self._replace(arguments=arguments)

    def _execute(self) -> Counts:
        groups = sample(self.grid, self.period(), self.is_sum, self.resident)
        x, y, _ = [*self.grid, 1, 1][:3]
        at_once = max(1, TOGETHER // self.resident)
        reports: list[Traffic] = []
        for first in range(0, len(groups), at_once):
            chosen = [i for group in groups[first : first + at_once] for i in group]
            blocks = [(i % x, i // x % y, i // (x * y)) for i in chosen]
            manner = DEFAULT._replace(together=len(blocks))
            with patch.object(launches, "Report", Traffic), executed(ARCH, manner, blocks) as made:
                launching.launch(self.kernel, self.grid, *self.arguments, **self.constants)
            reports += made  # type: ignore[arg-type]  # patched above
        size = CACHE - self.resident * (self.shared + RESERVED)
        from_l2 = sum(one.past + one.missed(self.resident, size) for one in reports)
        sectors = np.unique(np.concatenate([part for one in reports for part in one.touched]))
        return Counts(
            reports[0].program, sum(one.blocks for one in reports),
            np.sum([one.issued for one in reports], 0), from_l2,
            np.bincount(sectors * SECTOR >> SPACE, minlength=1 + len(self.storages()))[1:],
        )  # fmt: skip


def cost(
    kernel: Any, grid: tuple[int, ...], name: str, arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> Cost:  # fmt: skip
    """Of one launch."""
    made = kernel.warmup(*arguments, grid=grid, **constants, enable_fp_fusion=True)
    threads, shared = made.metadata.num_warps * WARP, made.metadata.shared
    registers = compiled.nvidia_resources(made.asm["cubin"])["registers"]
    total = int(np.prod(grid))
    resident = min(held(registers, shared, threads), -(-total // CORES))
    launch = Launch(kernel, grid, arguments, constants, shared, resident)
    counts = launch.counted()
    times = total / counts.blocks
    machine = in_machine_code(made.asm["cubin"])
    issued, in_loops = instructions(counts.program, counts.issued, machine)
    moved = np.minimum(times * SECTOR * counts.touched, launch.storages())
    declared = kernel.launch_metadata
    return Cost(
        name, grid, registers, shared, resident,
        round(times * flops_of(counts.program, counts.issued)),
        2 * declared.exact(launch.values) if declared else 0,
        round(times * SECTOR * counts.from_l2),
        round(float(moved.sum())),
        round(times * issued), round(in_loops, 1),
    )  # fmt: skip


@contextmanager
def costs(
    name_of: Callable[[str, dict[str, Any]], str], wanted: str = ""
) -> Iterator[dict[str, Cost]]:
    """Within the block, launches are counted, each name's first: a few blocks of them are executed.

    What no block has filled is zero.

    Args:
        name_of: what to call a launch, from the kernel's name and its arguments.
        wanted: a regular expression; others are not executed.
    """
    found: dict[str, Cost] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        name = name_of(kernel.__name__.removesuffix("_kernel"), values)
        if 0 not in grid and name not in found and re.match(wanted, name):
            found[name] = cost(kernel, grid, name, arguments, constants)

    with ExitStack() as stack:
        stack.enter_context(executed(ARCH))
        for owner, attribute, value in (
            (launching, "launch", launch),
            (Tensor, "new_empty", Tensor.new_zeros),
            (torch, "empty_like", torch.zeros_like),
            (torch, "empty", torch.zeros),
        ):
            stack.enter_context(patch.object(owner, attribute, value))
        yield found
