"""Threads of some blocks, in lock-step: registers, control, and all that is not a matrix product.

A value is an array with an element for each thread, so an instruction is a few calls of numpy for
thousands of threads. Threads that part at a branch run in turns, those that are behind first, until
they meet again. A *unit*, all threads or the warps of one warpgroup, runs until it waits at a
barrier; then the next one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptx import arithmetic, matrix
from tests.ptx.arithmetic import COMPUTE, UNSIGNED, Array, compare, decode, encode, size_of
from tests.ptx.measure import Counts
from tests.ptx.memory import Memory
from tests.ptx.program import (
    Address,
    Instruction,
    Operand,
    Program,
    Register,
    UnsupportedError,
    Vector,
    Word,
)
from tests.ptx.shared import MisuseError, Shared, stamps

WARP = 32

#: branches back that a unit may take before another one has its turn: it may be waiting for it
PATIENCE = 2000

#: how often all units may have had their turn without one of them coming to a barrier
TURNS = 200


class KernelError(Exception):
    """A kernel did what it may not do, or what is not known here."""


@dataclass
class Copy:
    """A ``cp.async`` under way, of some threads."""

    threads: Array
    group: Array  # the number of the group it is of, by thread
    places: Array
    address: Array
    size: int
    taken: Array  # bytes that are copied; zeros follow


class Threads:
    """Threads of some blocks of a launch.

    Args:
        blocks: which of the grid, (x, y, z) each.
        ordinals: their numbers in the launch.
        parameters: bits of each parameter.
        late: asynchronous work is done when it is waited for, not at once.
        apart: whether warps (or warpgroups) run one after the other, not in lock-step.
        backwards: the last one first.
    """

    def __init__(
        self,
        program: Program,
        blocks: Sequence[tuple[int, int, int]],
        ordinals: Sequence[int],
        grid: tuple[int, int, int],
        size: int,
        parameters: dict[str, int],
        memory: Memory,
        shared: Shared,
        counts: Counts,
        late: bool,
        apart: bool,
        backwards: bool,
    ) -> None:
        self.program, self.memory, self.shared, self.counts = program, memory, shared, counts
        self.parameters, self.grid, self.late = parameters, grid, late
        count = len(blocks) * size
        self.block_size = size
        self.everyone = np.ones(count, bool)
        self.block = np.repeat(np.arange(len(blocks)), size)
        self.ordinal = np.repeat(np.array(ordinals), size)
        self.thread = np.tile(np.arange(size), len(blocks))
        self.warp = self.thread // WARP
        self.coordinates = np.array(blocks, np.uint32)[self.block]
        self.interval = np.zeros(len(blocks), np.int64)
        self.stamp = stamps(self.interval[self.block], self.warp)
        self.registers: list[Array | None] = [None] * len(program.registers)
        self.constants: dict[tuple[str, str], Array] = {}
        self.alive = self.everyone.copy()
        self.waiting = np.full(count, -1)  # where a thread goes on after the barrier it waits at
        self.copies: list[Copy] = []
        self.copy_groups = np.zeros(count, np.int64)
        self.wgmma = matrix.Flight(self) if program.uses("wgmma") else None
        unit = 4 * WARP if self.wgmma else WARP
        number = np.arange(count) // unit if apart else np.zeros(count, int)
        self.units: list[dict[int, Array]] = [{0: number == i} for i in range(number[-1] + 1)]
        if backwards:
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
            symbol = text[0].isalpha() or text[0] == "$"  # all of shared memory, at 0
            self.constants[key] = arithmetic.constant("0" if symbol else text, type_)
        return self.constants[key]

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

    # Control.

    def run(self) -> None:
        """Run until all threads have ended.

        Raises:
            KernelError: see :class:`KernelError`.
        """
        idle = 0
        while self.alive.any():
            for unit in self.units:
                self._run_unit(unit)
            if self._pass_barriers():
                idle = 0
            elif not any(self.units):
                if self.alive.any():
                    raise KernelError(f"{self.program.name}: threads wait at a barrier for ever")
            else:
                idle += 1
                if idle > TURNS:
                    raise KernelError(f"{self.program.name}: threads wait for others for ever")

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
        back = 0
        while unit:
            # Those that are behind go first; but they may be waiting for the others.
            patient = back <= PATIENCE
            at = min(unit) if patient else max(unit)
            back += self._run_together(unit, at, unit.pop(at), patient)
            if back > 2 * PATIENCE:
                return

    def _run_together(self, unit: dict[int, Array], at: int, mask: Array, patient: bool) -> int:
        """Run threads that are at one place until they part, end, wait, or others are due.

        Returns:
            How often they branched back.
        """
        code, back, start = self.program.code, 0, at
        self.choose(mask)
        warps = int(mask.reshape(-1, WARP).any(1).sum())
        while True:
            instruction = code[at]
            at += 1
            if instruction.name in CONTROL:
                self.counts.passed(start, at, warps)
                goes_on = self._control(instruction, unit, mask)
                if goes_on is None:
                    return back
                back += goes_on < at
                start = at = goes_on
                if back > PATIENCE or (patient and unit and min(unit) < at):
                    self._join(unit, at, mask)
                    return back
            else:
                self._execute(instruction, mask)
            if at in unit:
                self.counts.passed(start, at, warps)
                self._join(unit, at, mask)
                return back

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
        if not (mask & ~self.alive).any():
            per_warp = mask.reshape(-1, WARP)
            if (per_warp.any(1) & ~per_warp.all(1)).any():
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


CONTROL = ("bra", "ret", "exit", "trap", "bar", "barrier")
Handler = Callable[[Threads, Instruction], None]


def _compute(threads: Threads, instruction: Instruction) -> None:
    numbers = [
        threads.get(operand, arithmetic.operand_type(instruction, place))
        for place, operand in enumerate(instruction.operands[1:], 1)
    ]
    result = COMPUTE[instruction.name](instruction, *numbers)
    type_ = instruction.type
    wide = instruction.name in ("mul", "mad") and "wide" in instruction.kinds
    threads.set(instruction.operands[0], result, f"u{16 * size_of(type_)}" if wide else type_)


def _move(threads: Threads, instruction: Instruction) -> None:
    to, source = instruction.operands
    if isinstance(to, Vector):  # one register into its parts
        whole = threads.full(threads.bits(source, instruction.type))
        size = size_of(instruction.type) // len(to.elements)
        parts = np.ascontiguousarray(whole).view(UNSIGNED[size]).reshape(len(whole), -1)
        for i, element in enumerate(to.elements):
            threads.put(element, parts[:, i].copy())
    elif isinstance(source, Vector):
        size = size_of(instruction.type) // len(source.elements)
        parts = np.stack(
            [threads.full(threads.get(one, f"u{8 * size}")) for one in source.elements], 1
        )
        threads.put(to, parts.view(UNSIGNED[size_of(instruction.type)]).reshape(-1))
    else:
        threads.set(to, threads.get(source, _plain(instruction.type)), _plain(instruction.type))


def _plain(type_: str) -> str:
    """Bits of a type's size, to be moved as they are."""
    return type_ if type_ == "pred" else f"b{8 * size_of(type_)}"


def _select(threads: Threads, instruction: Instruction) -> None:
    to, one, other, which = instruction.operands
    type_ = _plain(instruction.type)
    chosen = np.where(
        threads.bits(which, "pred"), threads.get(one, type_), threads.get(other, type_)
    )
    threads.set(to, chosen, type_)


def _compare(threads: Threads, instruction: Instruction) -> None:
    to, one, other, *more = instruction.operands
    type_, relation = instruction.type, instruction.kinds[0]
    result = compare(relation, threads.get(one, type_), threads.get(other, type_))
    if more:  # and, or, xor with another predicate
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        result = join[instruction.kinds[1]](result, threads.bits(more[0], "pred"))
    if not isinstance(to, Vector):
        threads.put(to, result)
    elif type_.endswith("x2"):
        for i, element in enumerate(to.elements):
            threads.put(element, result[:, i].copy())
    else:
        threads.put(to.elements[0], result)
        threads.put(to.elements[1], ~result)


def _convert(threads: Threads, instruction: Instruction) -> None:
    to, *sources = instruction.operands
    *_, into, type_ = instruction.kinds
    if into.endswith("x2") and len(sources) == 2:  # the first one is the upper half
        numbers = [arithmetic.convert(instruction, threads.get(one, type_), into[:-2])
                   for one in reversed(sources)]  # fmt: skip
        threads.set(to, np.stack(np.broadcast_arrays(*numbers), 1), into)
    else:
        threads.set(to, arithmetic.convert(instruction, threads.get(sources[0], type_), into), into)


def _convert_address(threads: Threads, instruction: Instruction) -> None:
    to, source = instruction.operands
    threads.put(to, threads.bits(source, "u64").astype(np.uint64))


# Between the threads of a warp.


def _of_warps(threads: Threads, operand: Operand, type_: str) -> Array:
    """Numbers of an operand, (warps, 32)."""
    threads.chosen_groups(WARP)  # all threads of a warp, or none
    return threads.full(threads.get(operand, type_)).reshape(-1, WARP)


def _shuffle(threads: Threads, instruction: Instruction) -> None:
    to, source, by, _, members = instruction.operands
    mode = instruction.kinds[1]
    if members != Word("-1"):
        raise UnsupportedError("a shuffle among some threads of a warp")
    values = _of_warps(threads, source, "b32")
    lane = np.arange(WARP)
    distance = _of_warps(threads, by, "u32").astype(np.int64)
    other = {"bfly": lane ^ distance, "idx": distance, "up": lane - distance,
             "down": lane + distance}[mode]  # fmt: skip
    inside = (other >= 0) & (other < WARP)
    result = np.take_along_axis(values, np.where(inside, other, lane), 1)
    if isinstance(to, Vector):
        threads.put(to.elements[1], inside.reshape(-1))
        threads.put(to.elements[0], result.reshape(-1))
    else:
        threads.put(to, result.reshape(-1))


REDUCE: dict[str, Callable[..., Array]] = {
    "add": np.add.reduce, "min": np.minimum.reduce, "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce,
}  # fmt: skip


def _reduce(threads: Threads, instruction: Instruction) -> None:
    to, source, _ = instruction.operands
    values = _of_warps(threads, source, instruction.type)
    result = REDUCE[instruction.kinds[1]](values, axis=1).astype(values.dtype)
    threads.set(to, np.repeat(result, WARP), instruction.type)


def _vote(threads: Threads, instruction: Instruction) -> None:
    to, source, *_ = instruction.operands
    values = _of_warps(threads, source, "pred") ^ instruction.text.split(",")[1].strip().startswith(
        "!"
    )
    if "ballot" in instruction.kinds:
        result = (values.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
        threads.put(to, np.repeat(result.astype(np.uint32), WARP))
    else:
        threads.put(
            to, np.repeat(values.any(1) if "any" in instruction.kinds else values.all(1), WARP)
        )


# Memory.


def _addresses(threads: Threads, operand: Operand, type_: str) -> Array:
    """Of the threads that take part."""
    assert isinstance(operand, Address)
    base = threads.full(threads.bits(operand.base, type_))[threads.chosen]
    return base.astype(np.int64) + operand.offset


def _elements(operand: Operand) -> tuple[Operand | None, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


def shared_places(threads: Threads, operand: Operand, size: int) -> tuple[Array, Array]:
    """Where shared memory is accessed, and the stamps of those that do."""
    address = _addresses(threads, operand, "u32")
    threads.counts.shared(address, threads.chosen, size)
    block = threads.block[threads.chosen]
    return threads.shared.places(address, block, size), threads.stamp[threads.chosen]


def _global(threads: Threads, instruction: Instruction, operand: Operand, size: int) -> Array:
    address = _addresses(threads, operand, "u64")
    threads.counts.global_(instruction, address, threads.chosen, size)
    return address


def _era(threads: Threads) -> Array:
    """Of the threads that take part."""
    return np.asarray(threads.memory.eras.now[threads.ordinal[threads.chosen]])


def _space(instruction: Instruction) -> str:
    return next((k for k in instruction.kinds if k.startswith(("global", "shared", "param"))), "")


def _load(threads: Threads, instruction: Instruction) -> None:
    to, source = instruction.operands[:2]
    type_, space = _plain(instruction.type), _space(instruction)
    size, width = size_of(type_), instruction.width
    if space == "param":
        assert isinstance(source, Address)
        assert isinstance(source.base, Word)
        bits = threads.parameters[source.base.text] & ((1 << 8 * size) - 1)
        threads.set(to, np.array([bits], UNSIGNED[size]), type_)
        return
    if space.startswith("shared"):
        places, stamp = shared_places(threads, source, size * width)
        numbers = threads.shared.load(places, size, width, stamp)
    elif space == "global":
        address = _global(threads, instruction, source, size * width)
        if not {"acquire", "volatile", "relaxed"}.isdisjoint(instruction.kinds):
            numbers = _atomically(threads, instruction, address, size, lambda _, old: old)[:, None]
        else:
            numbers = threads.memory.load(
                address, size, width, _era(threads), threads.stamp[threads.chosen]
            )
    else:
        raise UnsupportedError("not known here")
    signed = f"s{8 * size}" if instruction.type[0] == "s" else type_
    for i, element in enumerate(_elements(to)):
        threads.put_chosen(element, np.ascontiguousarray(numbers[:, i]), signed)


def _store(threads: Threads, instruction: Instruction) -> None:
    to, source = instruction.operands[:2]
    type_, space = _plain(instruction.type), _space(instruction)
    size = size_of(type_)
    numbers = np.stack(
        [threads.full(threads.get(one, type_))[threads.chosen] for one in _elements(source)], 1
    )
    if space.startswith("shared"):
        places, stamp = shared_places(threads, to, size * numbers.shape[1])
        threads.shared.store(places, numbers, stamp)
    elif space == "global":
        address = _global(threads, instruction, to, size * numbers.shape[1])
        if not {"release", "volatile", "relaxed"}.isdisjoint(instruction.kinds):
            _atomically(threads, instruction, address, size, lambda i, _: numbers[i])
        else:
            threads.memory.store(address, numbers, _era(threads), threads.stamp[threads.chosen])
    else:
        raise UnsupportedError("not known here")


def _atomically(
    threads: Threads, instruction: Instruction, address: Array, size: int,
    update: Callable[[int, Array], Array],
) -> Array:  # fmt: skip
    synchronises = not {"acq_rel", "acquire", "release"}.isdisjoint(instruction.kinds)
    return threads.memory.atomic(address, size, _era(threads), synchronises, update)


ATOMIC: dict[str, Callable[..., Array]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda _, new: new,
}  # fmt: skip


def _atomic(threads: Threads, instruction: Instruction) -> None:
    """``atom``, and ``red``, which does not tell what was there."""
    operands = instruction.operands if instruction.name == "atom" else (None, *instruction.operands)
    to, where, *sources = operands
    assert where is not None
    type_ = instruction.type
    if instruction.width > 1 or _space(instruction) != "global":
        raise UnsupportedError("not known here")
    size = size_of(type_)
    address = _global(threads, instruction, where, size)
    given = [threads.full(threads.bits(one, type_))[threads.chosen] for one in sources]

    def update(i: int, old: Array) -> Array:
        values = [decode(one[i : i + 1], type_) for one in given]
        if "cas" in instruction.kinds:
            same = decode(old, type_) == values[0]
            return np.where(same, encode(values[1], type_, 8 * size), old)
        name = next(kind for kind in instruction.kinds if kind in ATOMIC)
        return encode(ATOMIC[name](decode(old, type_), values[0]), type_, 8 * size)

    old = _atomically(threads, instruction, address, size, update)
    threads.put_chosen(to, old, _plain(type_))


def _copy(threads: Threads, instruction: Instruction) -> None:
    """``cp.async`` in its three forms."""
    if "commit_group" in instruction.kinds:
        threads.copy_groups[threads.mask] += 1
    elif "wait_group" in instruction.kinds or "wait_all" in instruction.kinds:
        still = -1  # of wait_all: not even what is committed to no group
        if instruction.operands:
            word = instruction.operands[0]
            assert isinstance(word, Word)
            still = int(word.text, 0)
        _land(threads, threads.copy_groups - still)
    elif "bulk" in instruction.kinds or instruction.kinds[0] != "async":
        raise UnsupportedError("TMA is not known here")
    else:
        _start_copy(threads, instruction)


def _start_copy(threads: Threads, instruction: Instruction) -> None:
    to, source, size_word, *rest = instruction.operands
    assert isinstance(size_word, Word)
    size = int(size_word.text, 0)
    chosen = threads.chosen
    taken = np.full(len(chosen), size)
    if rest:
        taken = threads.full(threads.get(rest[0], "u32"))[chosen].astype(np.int64)
        if (taken > size).any():
            raise MisuseError("copies more than its size")
    places, stamp = shared_places(threads, to, size)
    address = _addresses(threads, source, "u64")
    reading = taken > 0
    if reading.any():
        threads.counts.global_(instruction, address[reading], chosen[reading], size)
        threads.memory.note_read(address[reading], size, _era(threads)[reading], stamp[reading])
    cells = threads.shared.cells(places, size)
    threads.shared.check_write(cells, stamp[:, None])
    threads.shared.coming[cells] = True
    copy = Copy(chosen, threads.copy_groups[chosen], places, address, size, taken)
    threads.copies.append(copy)
    if not threads.late:
        _fill(threads, copy)


def _land(threads: Threads, before: Array) -> None:
    """Finish the copies of groups before some number, which is given for each thread."""
    remaining = []
    for copy in threads.copies:
        done = threads.mask[copy.threads] & (copy.group < before[copy.threads])
        if done.any():
            landed = _part(copy, done)
            if threads.late:
                _fill(threads, landed)
            cells = threads.shared.cells(landed.places, copy.size)
            threads.shared.coming[cells] = False
            threads.shared.wrote[cells] = threads.stamp[landed.threads][:, None]
        if not done.all():
            remaining.append(_part(copy, ~done))
    threads.copies = remaining


def _part(copy: Copy, which: Array) -> Copy:
    if which.all():
        return copy
    return Copy(
        copy.threads[which], copy.group[which], copy.places[which], copy.address[which],
        copy.size, copy.taken[which],
    )  # fmt: skip


def _fill(threads: Threads, copy: Copy) -> None:
    data = np.zeros((len(copy.places), copy.size), np.uint8)
    reading = copy.taken > 0
    data[reading] = threads.memory.fetch(copy.address[reading], copy.size)
    data[np.arange(copy.size) >= copy.taken[:, None]] = 0
    threads.shared.bytes[copy.places[:, None] + np.arange(copy.size)] = data


def _fence(threads: Threads, instruction: Instruction) -> None:
    """Only that between threads and the units that read memory themselves means anything here."""
    if instruction.kinds[:2] == ("proxy", "async"):
        chosen = threads.chosen
        threads.shared.fence(threads.block[chosen], threads.stamp[chosen])


def _nothing(threads: Threads, instruction: Instruction) -> None:
    """Of no consequence here."""


def _wgmma(threads: Threads, instruction: Instruction) -> None:
    assert threads.wgmma is not None
    threads.wgmma.execute(instruction)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(COMPUTE, _compute),
    **dict.fromkeys(("nanosleep", "membar", "setmaxnreg", "prefetch", "createpolicy"), _nothing),
    "atom": _atomic,
    "cp": _copy,
    "cvt": _convert,
    "cvta": _convert_address,
    "fence": _fence,
    "ld": _load,
    "ldmatrix": matrix.load_matrices,
    "mma": matrix.multiply,
    "mov": _move,
    "red": _atomic,
    "redux": _reduce,
    "selp": _select,
    "setp": _compare,
    "shfl": _shuffle,
    "st": _store,
    "stmatrix": matrix.store_matrices,
    "vote": _vote,
    "wgmma": _wgmma,
}
