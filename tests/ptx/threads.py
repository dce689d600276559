"""Threads of some blocks, in lock-step: their registers, and which of them run where.

A value is an array with an element for each thread, so an instruction is a few calls of numpy for
thousands of threads. Threads that part at a branch run in turns, those that are behind first, until
they meet again. A *unit*, all threads or the warps of one warpgroup, runs until it waits at a
barrier; then the next one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.ptx import arithmetic, matrix, transfers
from tests.ptx.arithmetic import Array, decode, encode
from tests.ptx.instructions import HANDLERS
from tests.ptx.measure import Report
from tests.ptx.memory import Memory
from tests.ptx.program import (
    Address,
    Instruction,
    Operand,
    Program,
    Register,
    UnsupportedError,
    Word,
)
from tests.ptx.shared import MisuseError, Shared, stamps

WARP = 32

#: loops with atomic operations that threads may go round before others have their turn: they may be
#: waiting for those; and how often they may all in all
PATIENCE, MOST_POLLS = 20, 4000

CONTROL = ("bra", "ret", "exit", "trap", "bar", "barrier")


class KernelError(Exception):
    """A kernel did what it may not do, or what is not known here."""


class Manner(NamedTuple):
    """What a GPU leaves open."""

    late: bool = True  # asynchronous work is done at the wait for it, not at once
    apart: bool = False  # warps (warpgroups, for wgmma) run one by one, not in lock-step
    backwards: bool = False  # the last block, and the last warp, first
    together: int = 16  # blocks in lock-step


#: in lock-step, asynchronous work as late as may be
DEFAULT = Manner()


class Threads:
    """Threads of some blocks of a launch.

    Args:
        blocks: which of the grid, (x, y, z) each.
        first: how many blocks have been executed before.
        parameters: bits of each parameter.
        size: threads of a block.
    """

    def __init__(
        self,
        program: Program,
        blocks: Sequence[tuple[int, int, int]],
        first: int,
        grid: tuple[int, int, int],
        size: int,
        parameters: Sequence[int],
        memory: Memory,
        shared: Shared,
        report: Report,
        manner: Manner,
    ) -> None:
        self.program, self.memory, self.shared, self.report = program, memory, shared, report
        self.grid, self.late = grid, manner.late
        #: they lie in a space of their own, 8 bytes each
        self.parameters = np.array(parameters, np.uint64)
        count = len(blocks) * size
        self.block_size = size
        self.everyone = np.ones(count, bool)
        self.block = np.repeat(np.arange(len(blocks)), size)
        self.ordinal = first + self.block  # among all blocks that are executed
        self.thread = np.tile(np.arange(size), len(blocks))
        self.warp = self.thread // WARP
        self.coordinates = np.array(blocks, np.uint32)[self.block]
        self.interval = np.zeros(len(blocks), np.int64)
        self.stamp = stamps(self.interval[self.block], self.warp)
        self.registers: list[Array | None] = [None] * len(program.registers)
        self.constants: dict[tuple[str, str], Array] = {}
        self.alive = self.everyone.copy()
        self.waiting = np.full(count, -1)  # where a thread goes on after the barrier it waits at
        self.polling, self.polls = False, 0
        self.copies: list[transfers.Copy] = []
        self.copy_groups = np.zeros(count, np.int64)
        self.wgmma = matrix.Flight(self) if program.uses("wgmma") else None
        unit = 4 * WARP if self.wgmma else WARP
        number = np.arange(count) // unit if manner.apart else np.zeros(count, int)
        self.units: list[dict[int, Array]] = [{0: number == i} for i in range(number[-1] + 1)]
        if manner.backwards:
            self.units.reverse()
        self.members = [unit[0] for unit in self.units]
        self.choose(self.everyone)

    # Which threads take part in an instruction.

    def choose(self, mask: Array) -> None:
        self.mask = mask
        self.whole = bool(mask.all())
        self._chosen: Array | None = None

    @property
    def chosen(self) -> Array:
        """The numbers of the threads that take part."""
        if self._chosen is None:
            self._chosen = np.flatnonzero(self.mask)
        return self._chosen

    def chosen_groups(self, size: int) -> Array:
        """The numbers of warps, or of warpgroups, that take part.

        Raises:
            MisuseError: not all of their threads do.
        """
        taking = self.mask.reshape(-1, size)
        some = taking.any(1)
        if (some & ~taking.all(1)).any():
            raise MisuseError(
                "threads of one warp are at different places, where all are to take part"
            )
        return np.flatnonzero(some)

    # Registers.

    def bits(self, operand: Operand | None, type_: str) -> Array:
        """Bits of an operand, one element or one for each thread."""
        if isinstance(operand, Register):
            found = self.registers[operand.index]
            if found is None:
                raise MisuseError(f"{operand.name} is read before it is written")
            return found
        assert isinstance(operand, Word)
        text = operand.text
        if text[0] == "%":
            return self._special(text)
        key = text, type_
        if key not in self.constants:
            self.constants[key] = arithmetic.constant(self._value(text), type_)
        return self.constants[key]

    def _value(self, text: str) -> str:
        """A number, for the name of a parameter, of shared memory, or itself."""
        if text in self.program.parameters:
            return str(8 * self.program.parameters.index(text))
        return "0" if text[0].isalpha() else text

    def get(self, operand: Operand | None, type_: str) -> Array:
        """Numbers of an operand."""
        return decode(self.bits(operand, type_), type_)

    def full(self, bits: Array) -> Array:
        """With an element for each thread."""
        return bits if len(bits) == len(self.mask) else np.repeat(bits, len(self.mask))

    def put(self, register: Operand | None, bits: Array) -> None:
        """Write bits of the register's size, where threads take part."""
        if register is None:
            return
        assert isinstance(register, Register)
        if not self.whole:
            old = self.registers[register.index]
            bits = np.where(self.mask, bits, np.zeros(1, bits.dtype) if old is None else old)
        self.registers[register.index] = self.full(bits)

    def set(self, register: Operand | None, numbers: Array, type_: str) -> None:
        """Write numbers, where threads take part."""
        if register is not None:
            assert isinstance(register, Register)
            self.put(register, encode(numbers, type_, register.bits))

    def put_chosen(self, register: Operand | None, bits: Array, type_: str) -> None:
        """Write one number for each thread that takes part."""
        if register is None:
            return
        assert isinstance(register, Register)
        every = np.zeros(len(self.mask), bits.dtype)
        every[self.chosen] = bits
        self.set(register, decode(every, type_), type_)

    def _special(self, name: str) -> Array:
        base, _, axis = name.partition(".")
        axis_number = "xyz".find(axis)
        if base == "%tid":
            return self.thread.astype(np.uint32) if axis == "x" else np.zeros(1, np.uint32)
        if base == "%ntid":
            return np.array([self.block_size if axis == "x" else 1], np.uint32)
        if base == "%ctaid":
            return self.coordinates[:, axis_number].copy()
        if base == "%nctaid":
            return np.array([self.grid[axis_number]], np.uint32)
        if base == "%laneid":
            return (self.thread % WARP).astype(np.uint32)
        if base == "%warpid":
            return self.warp.astype(np.uint32)
        if base in ("%clock", "%clock64", "%globaltimer", "%smid"):
            return np.zeros(1, np.uint64 if base.endswith(("64", "timer")) else np.uint32)
        raise UnsupportedError(f"special register {name}")

    # Memory.

    def addresses(self, operand: Operand, type_: str) -> Array:
        """Of the threads that take part."""
        assert isinstance(operand, Address)
        base = self.full(self.bits(operand.base, type_))[self.chosen]
        return base.astype(np.int64) + operand.offset

    def shared_places(
        self, instruction: Instruction, operand: Operand, size: int
    ) -> tuple[Array, Array]:
        """Where shared memory is accessed, and the stamps of those that do."""
        address, chosen = self.addresses(operand, "u32"), self.chosen
        self.report.touched_shared(instruction, address, chosen, size)
        return self.shared.places(address, self.block[chosen], size), self.stamp[chosen]

    # Control.

    def run(self) -> None:
        """Run until all threads have ended.

        Raises:
            KernelError: see :class:`KernelError`.
        """
        while self.alive.any():
            for unit in self.units:
                self._run_unit(unit)
            if not self._pass_barriers() and not any(self.units) and self.alive.any():
                raise KernelError(f"{self.program.name}: threads wait at a barrier for ever")

    def _pass_barriers(self) -> bool:
        """Let blocks go on of which all threads wait, or have ended; whether there are any."""
        held = self.waiting >= 0
        stuck = (self.alive & ~held).reshape(-1, self.block_size).any(1)
        passing = held & ~np.repeat(stuck, self.block_size)
        if not passing.any():
            return False
        self._next_interval(passing)
        for unit, members in zip(self.units, self.members, strict=True):
            for at in np.unique(self.waiting[passing & members]):
                self._join(unit, int(at), passing & members & (self.waiting == at))
        self.waiting[passing] = -1
        return True

    def _next_interval(self, passing: Array) -> None:
        self.interval[np.unique(self.block[passing])] += 1
        self.stamp = stamps(self.interval[self.block], self.warp)

    @staticmethod
    def _join(unit: dict[int, Array], at: int, mask: Array) -> None:
        unit[at] = unit[at] | mask if at in unit else mask

    def _run_unit(self, unit: dict[int, Array]) -> None:
        """Run threads until they end or wait, or poll for what others are to do."""
        hasty = False
        while unit:
            # Those that are behind go first, but not if they wait for those before them.
            alone, at = len(unit) == 1, max(unit) if hasty else min(unit)
            polling = self._run_together(unit, at, unit.pop(at), hasty)
            if polling and (alone or hasty):
                return
            hasty = polling

    def _run_together(self, unit: dict[int, Array], at: int, mask: Array, hasty: bool) -> bool:
        """Run threads that are at one place until they part, end, wait, or others are due.

        Returns:
            Whether they go round and round, looking at what others may change.
        """
        code, start, rounds = self.program.code, at, 0
        self.choose(mask)
        warps = int(mask.reshape(-1, WARP).any(1).sum())
        while True:
            instruction = code[at]
            at += 1
            if instruction.name in CONTROL:
                self.report.passed(start, at, warps)
                goes_on = self._control(instruction, unit, mask)
                if goes_on is None:
                    return False
                rounds += goes_on < at and self._has_polled()
                start = at = goes_on
                if rounds >= PATIENCE or (unit and min(unit) < at and not hasty):
                    self._join(unit, at, mask)
                    return rounds >= PATIENCE
            else:
                self._execute(instruction, mask)
            if at in unit:
                self.report.passed(start, at, warps)
                self._join(unit, at, mask)
                return False

    def _has_polled(self) -> bool:
        """Whether an atomic operation has been executed since this was asked last."""
        polled, self.polling = self.polling, False
        self.polls += polled
        if self.polls > MOST_POLLS:
            raise KernelError(f"{self.program.name}: threads wait for others for ever")
        return polled

    def _control(self, instruction: Instruction, unit: dict[int, Array], mask: Array) -> int | None:
        """Where all go on; None if not together."""
        following = instruction.index + 1
        taken = mask
        if instruction.guard is not None:
            taken = mask & (self.full(self.bits(instruction.guard, "pred")) ^ instruction.negated)
            if not taken.any():
                return following
        if instruction.name == "bra":
            label = instruction.operands[0]
            assert isinstance(label, Word)
            target = self.program.labels[label.text]
            if (taken == mask).all():
                return target
            self._join(unit, target, taken)
            self._join(unit, following, mask & ~taken)
        elif instruction.name in ("ret", "exit"):
            self.alive &= ~taken
            if (mask & ~taken).any():
                self._join(unit, following, mask & ~taken)
        elif instruction.name == "trap":
            raise self._fault(instruction, "the kernel gives up (an assertion of its own, perhaps)")
        else:
            return self._wait(instruction, taken, following)
        return None

    def _wait(self, instruction: Instruction, mask: Array, following: int) -> int | None:
        """``bar.sync 0``: on at once, if all of a block are here."""
        if instruction.kinds == ("warp", "sync"):
            return following
        barrier = instruction.operands[0]
        if instruction.kinds != ("sync",) or barrier != Word("0") or len(instruction.operands) > 1:
            raise self._fault(instruction, "not known here")
        elsewhere = (self.alive & ~mask).reshape(-1, WARP).any(1)
        if (mask.reshape(-1, WARP).any(1) & elsewhere).any():
            raise self._fault(instruction, "a barrier that not all threads of a warp come to")
        here = mask.reshape(-1, self.block_size)
        missing = (self.alive & ~mask).reshape(-1, self.block_size)
        if not (here.any(1) & missing.any(1)).any():
            self._next_interval(mask)
            return following
        self.waiting[mask] = following
        return None

    def _execute(self, instruction: Instruction, mask: Array) -> None:
        try:
            handler = HANDLERS.get(instruction.name)
            if handler is None:
                raise UnsupportedError("not known here")
            if self.wgmma is not None:
                self.wgmma.check(instruction)
            if instruction.guard is None:
                handler(self, instruction)
                return
            chosen = mask & (self.full(self.bits(instruction.guard, "pred")) ^ instruction.negated)
            if chosen.any():
                self.choose(chosen)
                handler(self, instruction)
                self.choose(mask)
        except (MisuseError, UnsupportedError) as error:
            raise self._fault(instruction, str(error)) from None

    def _fault(self, instruction: Instruction, what: str) -> KernelError:
        return KernelError(
            f"{self.program.name}: {what}: {instruction.text.expandtabs(1)} "
            f"(line {instruction.line} of the PTX, {instruction.where})"
        )
