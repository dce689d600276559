"""What each instruction does: those of one thread or of a warp here, the others by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import arithmetic, matrix, transfers
from tests.ptx.arithmetic import COMPUTE, UNSIGNED, Array, compare, plain, size_of
from tests.ptx.program import Instruction, Operand, UnsupportedError, Vector, Word

if TYPE_CHECKING:
    from tests.ptx.threads import Threads

WARP = 32


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
        threads.set(to, threads.get(source, plain(instruction.type)), plain(instruction.type))


def _select(threads: Threads, instruction: Instruction) -> None:
    to, one, other, which = instruction.operands
    type_ = plain(instruction.type)
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


def _nothing(threads: Threads, instruction: Instruction) -> None:
    """Of no consequence here."""


def _wgmma(threads: Threads, instruction: Instruction) -> None:
    assert threads.wgmma is not None
    threads.wgmma.execute(instruction)


Handler = Callable[["Threads", Instruction], None]

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(COMPUTE, _compute),
    **dict.fromkeys(("nanosleep", "membar", "setmaxnreg", "prefetch", "createpolicy"), _nothing),
    "atom": transfers.atomic,
    "cp": transfers.copy,
    "cvt": _convert,
    "cvta": _convert_address,
    "fence": transfers.fence,
    "ld": transfers.load,
    "ldmatrix": matrix.load_matrices,
    "mma": matrix.multiply,
    "mov": _move,
    "red": transfers.atomic,
    "redux": _reduce,
    "selp": _select,
    "setp": _compare,
    "shfl": _shuffle,
    "st": transfers.store,
    "stmatrix": matrix.store_matrices,
    "vote": _vote,
    "wgmma": _wgmma,
}
