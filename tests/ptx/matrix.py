"""Matrices: fragments in the registers of a warp, ``mma`` and Hopper's ``wgmma``.

A fragment spreads a matrix over the 32 threads of a warp: thread 4 g + t holds elements of row g,
or g + 8, and of columns about t. PTX's manual shows where each lies, under each instruction.

``wgmma`` multiplies for a warpgroup of four warps, on its own time: what it reads of shared memory
may be read, and what it adds be added, at any moment up to the wait for it. Here that is the last
one, or the first; and in between, nobody else may touch either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.arithmetic import FLOAT, Array, size_of, truncate_tf32, widen_bfloat16
from tests.ptx.program import Instruction, Operand, Register, UnsupportedError, Vector, Word
from tests.ptx.shared import SEVERAL, MisuseError, stamps

if TYPE_CHECKING:
    from tests.ptx.threads import Threads

WARP, WARPGROUP = 32, 128

LANE = np.arange(WARP)[:, None]
G, T = LANE // 4, LANE % 4

Places = tuple[Array, Array]


def left_places(registers: int, type_: str) -> Places:
    """Rows and columns of A's elements, (threads, elements)."""
    if size_of(type_) == 2:
        i, half = np.divmod(np.arange(2 * registers), 2)
        return G + 8 * (i % 2), 2 * T + 8 * (i // 2) + half
    i = np.arange(registers)
    return G + 8 * (i % 2), T + 4 * (i // 2)


def right_places(registers: int, type_: str) -> Places:
    """Rows and columns of B's elements."""
    if size_of(type_) == 2:
        i, half = np.divmod(np.arange(2 * registers), 2)
        return 2 * T + 8 * i + half, G + 0 * i
    i = np.arange(registers)
    return T + 4 * i, G + 0 * i


def sum_places(registers: int) -> Places:
    """Rows and columns of the accumulators' elements."""
    i = np.arange(registers)
    return G + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * T + i % 2


def to_numbers(bits: Array, type_: str) -> Array:
    """Operands as the matrix unit reads them, with an axis for the elements of a register."""
    if type_ == "tf32":
        return truncate_tf32(bits)
    if size_of(type_) == 2:
        halves = np.ascontiguousarray(bits)[..., None].view(np.uint16)
        halves = halves.reshape(*bits.shape[:-1], -1)
        return widen_bfloat16(halves) if type_ == "bf16" else halves.view(np.float16).astype("f4")
    return bits.view(FLOAT[size_of(type_)])


def of_warps(threads: Threads, vector: Operand, warps: Array, type_: str) -> Array:
    """Registers of a fragment, (warps, 32, registers), as bits."""
    names = vector.elements if isinstance(vector, Vector) else (vector,)
    bits = [threads.full(threads.bits(one, type_)).reshape(-1, WARP)[warps] for one in names]
    return np.stack(bits, 2)


def spread(numbers: Array, places: Places, rows: int, columns: int) -> Array:
    """The matrices (warps, rows, columns) of fragments (warps, 32, elements)."""
    result = np.empty((len(numbers), rows, columns), numbers.dtype)
    result[:, places[0], places[1]] = numbers
    return result


def put_sums(threads: Threads, vector: Operand, warps: Array, sums: Array) -> None:
    """Write accumulators (warps, 16 or 8, n) back to the registers of those warps."""
    assert isinstance(vector, Vector)
    spread_sums = sums[:, *sum_places(len(vector.elements))]
    for i, register in enumerate(vector.elements):
        assert isinstance(register, Register)
        old = threads.registers[register.index]
        bits = np.zeros(
            (len(threads.mask) // WARP, WARP), np.uint32 if sums.itemsize == 4 else "u8"
        )
        if old is not None:
            bits[:] = old.reshape(bits.shape)
        bits[warps] = np.ascontiguousarray(spread_sums[:, :, i]).view(bits.dtype)
        threads.registers[register.index] = bits.reshape(-1)


def multiply(threads: Threads, instruction: Instruction) -> None:
    """``mma.sync``."""
    d, a, b, c = instruction.operands
    assert isinstance(a, Vector)
    assert isinstance(b, Vector)
    assert isinstance(c, Vector)
    m, n, k = instruction.shape()
    *_, sum_type, type_, other_type, _ = instruction.kinds
    known = {"bf16": "f32", "f16": "f32", "tf32": "f32", "f64": "f64"}
    if known.get(type_) != sum_type or other_type != type_ or "row" not in instruction.kinds:
        raise UnsupportedError("not known here")
    warps = threads.chosen_groups(WARP)
    bits = f"b{32 if sum_type == 'f32' else 64}"
    count = len(a.elements), len(b.elements), len(c.elements)
    left = spread(to_numbers(of_warps(threads, a, warps, bits), type_),
                  left_places(count[0], type_), m, k)  # fmt: skip
    right = spread(to_numbers(of_warps(threads, b, warps, bits), type_),
                   right_places(count[1], type_), k, n)  # fmt: skip
    before = to_numbers(of_warps(threads, c, warps, bits), sum_type)
    total = spread(before, sum_places(count[2]), m, n)
    put_sums(threads, d, warps, total + left @ right)
    threads.report.multiplied(m * n * k * len(warps))


def _matrix_places(
    threads: Threads, instruction: Instruction, where: Operand
) -> tuple[int, Array, Array]:
    """How many 8 x 8 matrices, where their rows are, (warps, matrices, 8), and the stamps."""
    if "m8n8" not in instruction.kinds or instruction.type != "b16":
        raise UnsupportedError("not known here")
    count = next(int(kind[1]) for kind in instruction.kinds if kind in ("x1", "x2", "x4"))
    warps = threads.chosen_groups(WARP)
    mask = threads.mask
    threads.choose(mask & (threads.thread % WARP < 8 * count))
    places, stamp = threads.shared_places(instruction, where, 16)
    threads.choose(mask)
    shape = len(warps), count, 8
    return count, places.reshape(shape), stamp.reshape(shape)


def load_matrices(threads: Threads, instruction: Instruction) -> None:
    """``ldmatrix``: each thread has two neighbours of a row."""
    to, source = instruction.operands
    count, places, stamp = _matrix_places(threads, instruction, source)
    rows = threads.shared.load(places.reshape(-1), 2, 8, stamp.reshape(-1))
    matrices = rows.reshape(-1, count, 8, 8)
    if "trans" in instruction.kinds:
        matrices = matrices.swapaxes(2, 3)
    pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)
    for i, register in enumerate(to.elements if isinstance(to, Vector) else (to,)):
        threads.put_chosen(register, pairs[:, i].reshape(-1), "b32")


def store_matrices(threads: Threads, instruction: Instruction) -> None:
    """``stmatrix``."""
    to, source = instruction.operands
    count, places, stamp = _matrix_places(threads, instruction, to)
    warps = threads.chosen_groups(WARP)
    pairs = np.ascontiguousarray(of_warps(threads, source, warps, "b32").swapaxes(1, 2))
    matrices = pairs.view(np.uint16).reshape(-1, count, 8, 8)
    if "trans" in instruction.kinds:
        matrices = matrices.swapaxes(2, 3)
    threads.shared.store(places.reshape(-1), matrices.reshape(-1, 8), stamp.reshape(-1))


#: of a descriptor's last two bits: bytes of a row of the swizzled pattern
SWIZZLE = {0: 16, 1: 128, 2: 64, 3: 32}


def described(descriptor: int, rows: int, depth: int, size: int, turned: bool) -> Array:
    """Where an operand of ``wgmma`` lies in shared memory, in chunks of 16 bytes.

    Args:
        descriptor: the matrix descriptor.
        rows, depth: of the operand: m or n, and k.
        size: bytes of an element.
        turned: rows lie side by side, not columns.

    Returns:
        Addresses (rows, chunks of a row), or turned (depth, chunks of a column).
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise UnsupportedError("a descriptor with a base offset")
    row = SWIZZLE[descriptor >> 62]
    per_row = row // 16
    if turned:
        line, chunk = np.arange(depth)[:, None], np.arange(rows * size // 16)
        far = (stride, leading) if row == 16 else (leading, stride)
        address = chunk // per_row * far[0] + line // 8 * far[1]
    else:
        line, chunk = np.arange(rows)[:, None], np.arange(depth * size // 16)
        address = chunk // per_row * leading + line // 8 * stride
    address = start + address + line % 8 * row + chunk % per_row * 16
    return np.asarray(address ^ (address >> 7 & per_row - 1) << 4)


@dataclass
class Tile:
    """An operand in shared memory, of some warpgroups."""

    places: Array  # of chunks, (warpgroups, lines, chunks)
    turned: bool

    def numbers(self, threads: Threads, type_: str) -> Array:
        """(warpgroups, rows, depth)"""
        chunks = threads.shared.bytes.reshape(-1, 16)[self.places // 16]
        words = chunks.view(np.uint32).reshape(*self.places.shape[:2], -1)
        result = to_numbers(words, type_)
        return result.swapaxes(1, 2) if self.turned else result

    def part(self, which: Array) -> Tile:
        """Of some warpgroups alone."""
        return Tile(self.places[which], self.turned)

    def cells(self, threads: Threads) -> Array:
        return threads.shared.cells(self.places, 16)


@dataclass
class Product:
    """A ``wgmma`` under way."""

    instruction: Instruction
    groups: Array  # warpgroups
    number: Array  # of the group of instructions that it is in, by warpgroup
    left: Tile | Array
    right: Tile
    adds: Array  # whether it adds, by warpgroup
    done: bool

    def part(self, which: Array) -> Product:
        """Of some of its warpgroups alone."""
        left = self.left.part(which) if isinstance(self.left, Tile) else self.left[which]
        return replace(
            self, groups=self.groups[which], number=self.number[which], left=left,
            right=self.right.part(which), adds=self.adds[which],
        )  # fmt: skip

    def tiles(self) -> list[Tile]:
        return [one for one in (self.left, self.right) if isinstance(one, Tile)]


class Flight:
    """The ``wgmma`` instructions under way, and the registers that they have to themselves."""

    def __init__(self, threads: Threads) -> None:
        self.threads = threads
        count = len(threads.everyone) // WARPGROUP
        self.committed = np.zeros(count, np.int64)
        self.products: list[Product] = []
        #: registers that are summed in, or multiplied from, now: of which warpgroups
        self.sums: dict[int, Array] = {}
        self.factors: dict[int, Array] = {}
        #: registers written by threads since the last fence
        self.unfenced: dict[int, Array] = {}
        self._used = {
            register
            for one in threads.program.code
            if one.name == "wgmma" and one.operands
            for operand in one.operands[:2]
            for register in _indices(operand)
        }

    def _present(self) -> Array:
        """Warpgroups of which threads take part."""
        return np.asarray(self.threads.mask.reshape(-1, WARPGROUP).any(1))

    def check(self, instruction: Instruction) -> None:
        """Look at the registers of another instruction.

        Raises:
            MisuseError: it uses one that a wgmma under way has to itself.
        """
        results = [one.index for one in instruction.results]
        written = self._used.intersection(results)
        if instruction.name == "wgmma" or not (self.products or written):
            return
        here = self._present()
        if _meet(self.sums, instruction.registers, here):
            raise MisuseError("uses a sum of a wgmma under way")
        if _meet(self.factors, results, here):
            raise MisuseError("changes a factor of a wgmma under way")
        for index in written:
            self.unfenced[index] = self.unfenced.get(index, False) | here

    def execute(self, instruction: Instruction) -> None:
        kind = instruction.kinds[0]
        if kind == "fence":
            here = self._present()
            self.unfenced = {index: one & ~here for index, one in self.unfenced.items()}
        elif kind == "commit_group":
            self.committed[self.threads.chosen_groups(WARPGROUP)] += 1
        elif kind == "wait_group":
            word = instruction.operands[0]
            assert isinstance(word, Word)
            self._finish(self.threads.chosen_groups(WARPGROUP), int(word.text, 0))
        elif kind == "mma_async":
            self._start(instruction)
        else:
            raise UnsupportedError("not known here")

    def _start(self, instruction: Instruction) -> None:
        threads = self.threads
        sums, left, right, adds, *signs = instruction.operands
        *_, sum_type, type_, other_type = instruction.kinds
        if sum_type != "f32" or type_ not in ("bf16", "f16", "tf32") or other_type != type_:
            raise UnsupportedError("not known here")
        words = [one.text for one in signs if isinstance(one, Word)]
        turned = [word == "1" for word in words[2:]]  # of A, if it lies in memory, and of B
        if words[:2] != ["1", "1"]:
            raise UnsupportedError("a factor that is negated")
        m, n, k = instruction.shape()
        groups = threads.chosen_groups(WARPGROUP)
        first = groups * WARPGROUP
        assert isinstance(sums, Vector)
        if len(sums.elements) != n // 2:
            raise MisuseError(f"{len(sums.elements)} sums of a thread for n = {n}")
        self._check_registers(sums, left)
        factor: Tile | Array
        if isinstance(left, Vector):
            warps = (groups[:, None] * 4 + np.arange(4)).reshape(-1)
            numbers = to_numbers(of_warps(threads, left, warps, "b32"), type_)
            factor = spread(numbers, left_places(len(left.elements), type_), 16, k).reshape(
                -1, m, k
            )
        else:
            factor = self._tile(left, groups, m, k, size_of(type_), bool(turned) and turned[0])
        tile = self._tile(right, groups, n, k, size_of(type_), bool(turned) and turned[-1])
        product = Product(
            instruction, groups, self.committed[groups], factor, tile,
            threads.full(threads.bits(adds, "pred"))[first], not threads.late,
        )  # fmt: skip
        for one in product.tiles():
            cells = one.cells(threads)
            threads.shared.check_read(cells, self._stamp(groups))
            if threads.shared.unfenced[cells].any():
                raise MisuseError("reads what threads have written, without fence.proxy.async")
            np.add.at(threads.shared.wanted, cells, 1)
        if product.done:
            self._compute(product)
        self.products.append(product)
        self._note_registers()
        threads.report.multiplied(m * n * k * len(groups))

    def _stamp(self, groups: Array) -> Array:
        """Of whole warpgroups, to go with cells."""
        interval = self.threads.interval[self.threads.block[groups * WARPGROUP]]
        return stamps(interval, SEVERAL)[:, None, None, None]

    def _check_registers(self, sums: Vector, left: Operand) -> None:
        here = self._present()
        factors = _indices(left)
        if _meet(self.sums, factors, here):
            raise MisuseError("multiplies a sum of a wgmma under way")
        if _meet(self.unfenced, [*_indices(sums), *factors], here):
            raise MisuseError("uses a register that threads have written, without wgmma.fence")

    def _tile(
        self, operand: Operand, groups: Array, rows: int, depth: int, size: int, turned: bool
    ) -> Tile:
        threads = self.threads
        descriptors = threads.full(threads.bits(operand, "b64")).reshape(-1, WARPGROUP)[groups]
        if (descriptors != descriptors[:, :1]).any():
            raise MisuseError("threads of a warpgroup have different descriptors")
        addresses = [described(int(one), rows, depth, size, turned) for one in descriptors[:, 0]]
        address = np.stack(addresses)
        block = threads.block[groups * WARPGROUP]
        return Tile(threads.shared.places(address, block[:, None, None], 16), turned)

    def _note_registers(self) -> None:
        self.sums, self.factors = {}, {}
        for product in self.products:
            here = np.zeros(len(self.committed), bool)
            here[product.groups] = True
            sums, left = product.instruction.operands[:2]
            for index in _indices(sums):
                self.sums[index] = self.sums.get(index, False) | here
            for index in _indices(left):
                self.factors[index] = self.factors.get(index, False) | here

    def _finish(self, groups: Array, still: int) -> None:
        """Finish all but the last ``still`` groups of instructions of these warpgroups."""
        waits = np.zeros(len(self.committed), bool)
        waits[groups] = True
        remaining = []
        for product in self.products:
            which = waits[product.groups]
            which &= product.number < self.committed[product.groups] - still
            if which.any():
                finished = product.part(which)
                if not product.done:
                    self._compute(finished)
                now = self._stamp(finished.groups)
                for tile in finished.tiles():
                    cells = tile.cells(self.threads)
                    np.subtract.at(self.threads.shared.wanted, cells, 1)
                    # A warp that has waited does not know whether the others have.
                    self.threads.shared.read[cells] = now
            if not which.all():
                remaining.append(product.part(~which))
        self.products = remaining
        self._note_registers()

    def _compute(self, product: Product) -> None:
        threads = self.threads
        type_ = product.instruction.type
        left = product.left
        if isinstance(left, Tile):
            left = left.numbers(threads, type_)
        total = left @ product.right.numbers(threads, type_).swapaxes(1, 2)
        sums = product.instruction.operands[0]
        assert isinstance(sums, Vector)
        warps = (product.groups[:, None] * 4 + np.arange(4)).reshape(-1)
        if product.adds.any():
            before = to_numbers(of_warps(threads, sums, warps, "b32"), "f32")
            spread_before = spread(before, sum_places(len(sums.elements)), 16, total.shape[2])
            old = spread_before.reshape(total.shape)
            total = np.where(product.adds[:, None, None], total + old, total)
        put_sums(threads, sums, warps, total.reshape(len(warps), 16, -1))


def _indices(operand: Operand) -> list[int]:
    """Registers of a fragment; none, if it lies in memory."""
    elements = operand.elements if isinstance(operand, Vector) else ()
    return [one.index for one in elements if isinstance(one, Register)]


def _meet(busy: dict[int, Array], registers: Iterable[int], here: Array) -> bool:
    """Whether registers of these warpgroups are among the busy ones."""
    return any(bool((busy[index] & here).any()) for index in busy.keys() & set(registers))
