"""Loads, stores, atomic operations and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.arithmetic import UNSIGNED, Array, decode, encode, plain, size_of
from tests.ptx.program import (
    Address,
    Instruction,
    Operand,
    UnsupportedError,
    Vector,
    Word,
)
from tests.ptx.shared import MisuseError

if TYPE_CHECKING:
    from tests.ptx.threads import Threads


@dataclass
class Copy:
    """A ``cp.async`` under way, of some threads."""

    threads: Array
    group: Array  # the number of the group it is of, by thread
    places: Array
    address: Array
    size: int
    taken: Array  # bytes that are copied; zeros follow


def _elements(operand: Operand) -> tuple[Operand | None, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


def _global(threads: Threads, instruction: Instruction, operand: Operand, size: int) -> Array:
    address = threads.addresses(operand, "u64")
    threads.report.touched_global(instruction, address, threads.chosen, size)
    return address


def _era(threads: Threads) -> Array:
    """Of the threads that take part."""
    return np.asarray(threads.memory.eras.now[threads.ordinal[threads.chosen]])


def _space(instruction: Instruction) -> str:
    return next((k for k in instruction.kinds if k.startswith(("global", "shared", "param"))), "")


def load(threads: Threads, instruction: Instruction) -> None:
    to, source = instruction.operands[:2]
    type_, space = plain(instruction.type), _space(instruction)
    size, width = size_of(type_), instruction.width
    if space == "param":
        assert isinstance(source, Address)
        where = threads.bits(source.base, "u64").astype(np.int64) + source.offset
        if (where % 8).any() or width > 1:
            raise UnsupportedError("a part of a parameter")
        threads.set(to, threads.parameters[where // 8].astype(UNSIGNED[size]), type_)
        return
    if space.startswith("shared"):
        places, stamp = threads.shared_places(instruction, source, size * width)
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


def store(threads: Threads, instruction: Instruction) -> None:
    to, source = instruction.operands[:2]
    type_, space = plain(instruction.type), _space(instruction)
    size = size_of(type_)
    numbers = np.stack(
        [threads.full(threads.get(one, type_))[threads.chosen] for one in _elements(source)], 1
    )
    if space.startswith("shared"):
        places, stamp = threads.shared_places(instruction, to, size * numbers.shape[1])
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
    threads.polling = True
    synchronises = not {"acq_rel", "acquire", "release"}.isdisjoint(instruction.kinds)
    return threads.memory.atomic(address, size, _era(threads), synchronises, update)


ATOMIC: dict[str, Callable[..., Array]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda _, new: new,
}  # fmt: skip


def atomic(threads: Threads, instruction: Instruction) -> None:
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
    threads.put_chosen(to, old, plain(type_))


def copy(threads: Threads, instruction: Instruction) -> None:
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
    places, stamp = threads.shared_places(instruction, to, size)
    address = threads.addresses(source, "u64")
    reading = taken > 0
    if reading.any():
        threads.report.touched_global(instruction, address[reading], chosen[reading], size)
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
            threads.shared.note_copied(cells, threads.stamp[landed.threads][:, None])
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


def fence(threads: Threads, instruction: Instruction) -> None:
    """Only that between threads and the units that read memory themselves means anything here."""
    if instruction.kinds[:2] == ("proxy", "async"):
        chosen = threads.chosen
        threads.shared.fence(threads.block[chosen], threads.stamp[chosen])
