"""The innermost loops of the layer on a CPU: sums of products that stay in registers.

No compiler can be relied on to keep a tile of sums in vector registers, so these two loops are
written as LLVM's instructions, for the vectors of the machine that they run on. Everything in them
is a multiply-add but one load for each factor.

The addresses that they are given are of float32, where nothing else is said.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from mintnet_triton.kernels.cpu._numba import called_through_pointer

# Those that numba compiles for, which its settings may make fewer than the machine has; they are
# in the key of its cache, so that machines that share one do not take each other's sizes.
*_, _FEATURES = cpu_target.target_context.codegen().magic_tuple()


def _sizes(features: str) -> tuple[int, int]:
    """Floats in a vector, and vectors that the registers hold."""
    present = features.split(",")
    if "+avx512f" in present:
        return 16, 32
    if "+avx" in present:
        return 8, 16
    return 4, 32 if "+neon" in present else 16


VECTOR, REGISTERS = _sizes(_FEATURES)
#: the most outputs of a tile that is one or two vectors wide, and four: beside the sums, the
#: registers hold the inputs and one weight
MOST, FEW = (REGISTERS - 1 - 2) // 2, (REGISTERS - 1 - 4) // 4
#: outputs and inputs of a tile of a gradient by weights: sums of all pairs, and the factors
OUTPUTS, INPUTS = (5, 5) if REGISTERS == 32 else (3, 3)

_LONG, _FLOAT = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, VECTOR)


def _number(value: int) -> Any:
    return ir.Constant(_LONG, value)


def _floats(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _FLOAT.as_pointer())


def _vector_at(builder: Any, pointer: Any, vectors: int) -> Any:
    place = builder.gep(pointer, [_number(vectors * VECTOR)])
    return builder.bitcast(place, _VECTOR.as_pointer())


def _load(builder: Any, pointer: Any, vectors: int = 0) -> Any:
    loaded = builder.load(_vector_at(builder, pointer, vectors))
    loaded.align = 4
    return loaded


def _everywhere(builder: Any, value: Any) -> Any:
    """A vector of equal values."""
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), VECTOR), [0] * VECTOR)
    return builder.shuffle_vector(one, nothing, zeros)


def _add_product(builder: Any, total: Any, left: Any, right: Any) -> None:
    """``total += left * right``; the total is a variable that gets a register.

    Rounded once where the machine can: elsewhere ``llvm.fma`` would call a function for each float.
    """
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{VECTOR}f32")
    builder.store(builder.call(fma, [left, right, builder.load(total)]), total)


def _store_sums(builder: Any, values: list[Any], place: Any) -> None:
    """Store the sum of each vector, up to whole vectors of them.

    Two vectors become one that has the sums of neighbours of both, again and again: a third of the
    instructions of summing each by itself.
    """
    values = values + [ir.Constant(_VECTOR, None)] * (-len(values) % VECTOR)
    for start in range(0, len(values), VECTOR):
        some = values[start : start + VECTOR]
        while len(some) > 1:
            some = [
                builder.fadd(*(_every_other(builder, left, right, odd) for odd in (0, 1)))
                for left, right in zip(some[::2], some[1::2], strict=True)
            ]
        stored = builder.store(some[0], _vector_at(builder, place, start // VECTOR))
        stored.align = 4


def _every_other(builder: Any, left: Any, right: Any, first: int) -> Any:
    """The elements 0, 2, 4 ... of two vectors, or 1, 3, 5 ..."""
    kind = ir.VectorType(ir.IntType(32), VECTOR)
    return builder.shuffle_vector(left, right, ir.Constant(kind, list(range(first, 2 * VECTOR, 2))))


def _totals(builder: Any, rows: int, columns: int) -> list[list[Any]]:
    return [[cgutils.alloca_once(builder, _VECTOR) for _ in range(columns)] for _ in range(rows)]


def _for_each_size(
    builder: Any, sizes: list[tuple[int, int]], rows: Any, columns: Any, emit: Callable[..., None]
) -> None:
    """Code for each size that a tile may have."""
    end = builder.append_basic_block("end")
    switch = builder.switch(builder.add(builder.mul(rows, _number(8)), columns), end)
    for m, n in sizes:
        block = builder.append_basic_block(f"tile{m}x{n}")
        switch.add_case(_number(8 * m + n), block)
        builder.position_at_end(block)
        emit(m, n)
        builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def _add_products(typing, rows, vectors, sums, stride, weights, source, distance, runs, count):
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, vectors, sums, stride, weights, source, distance, runs, count = arguments
        sums, weights, source = (_floats(builder, one) for one in (sums, weights, source))
        runs = builder.inttoptr(runs, _LONG.as_pointer())

        def tile(height: int, width: int) -> None:
            totals = _totals(builder, height, width)
            lines = [builder.gep(sums, [builder.mul(stride, _number(m))]) for m in range(height)]
            for line, row in zip(lines, totals, strict=True):
                for n, total in enumerate(row):
                    builder.store(_load(builder, line, n), total)
            with cgutils.for_range(builder, count) as run:
                entry = builder.gep(runs, [builder.mul(run.index, _number(3))])
                begin, length, begin_weights = (
                    builder.load(builder.gep(entry, [_number(n)])) for n in range(3)
                )
                seen = cgutils.alloca_once(builder, source.type)
                builder.store(builder.gep(source, [begin]), seen)
                weight = cgutils.alloca_once(builder, weights.type)
                builder.store(builder.gep(weights, [begin_weights]), weight)
                with cgutils.for_range(builder, length):
                    line, factors = builder.load(seen), builder.load(weight)
                    inputs = [_load(builder, line, n) for n in range(width)]
                    for m, row in enumerate(totals):
                        factor = builder.load(builder.gep(factors, [_number(m)]))
                        factor = _everywhere(builder, factor)
                        for one, total in zip(inputs, row, strict=True):
                            _add_product(builder, total, factor, one)
                    builder.store(builder.gep(line, [distance]), seen)
                    builder.store(builder.gep(factors, [_number(height)]), weight)
            for line, row in zip(lines, totals, strict=True):
                for n, total in enumerate(row):
                    stored = builder.store(builder.load(total), _vector_at(builder, line, n))
                    stored.align = 4

        sizes = [(m, n) for n, most in ((1, MOST), (2, MOST), (4, FEW)) for m in range(1, most + 1)]
        _for_each_size(builder, sizes, rows, vectors, tile)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), code


@intrinsic
def _sum_of_products(
    typing, outputs, inputs, sums, left, line_left, row_left, right, line_right, row_right, rows,
    vectors,
):  # fmt: skip
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        outputs, inputs, sums, left, line_left, row_left, right, line_right, row_right = arguments[
            :9
        ]
        rows, vectors = arguments[9:]
        sums, left, right = (_floats(builder, one) for one in (sums, left, right))

        def tile(height: int, width: int) -> None:
            totals = _totals(builder, height, width)
            for row in totals:
                for total in row:
                    builder.store(ir.Constant(_VECTOR, None), total)
            with cgutils.for_range(builder, rows) as y, cgutils.for_range(builder, vectors) as v:
                along = builder.mul(v.index, _number(VECTOR))
                factors = []
                for start, line, row, many in (
                    (left, line_left, row_left, height),
                    (right, line_right, row_right, width),
                ):
                    start = builder.gep(start, [builder.add(builder.mul(y.index, row), along)])
                    lines = (builder.mul(line, _number(n)) for n in range(many))
                    factors.append([_load(builder, builder.gep(start, [one])) for one in lines])
                for ours, row in zip(factors[0], totals, strict=True):
                    for theirs, total in zip(factors[1], row, strict=True):
                        _add_product(builder, total, ours, theirs)
            values = [builder.load(total) for row in totals for total in row]
            _store_sums(builder, values, sums)

        sizes = [(m, k) for m in range(1, OUTPUTS + 1) for k in range(1, INPUTS + 1)]
        _for_each_size(builder, sizes, outputs, inputs, tile)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), code


@called_through_pointer(9)
def add_products(rows, vectors, sums, stride, weights, source, distance, runs, count):
    """``sums[row, :] += sum_k weights[k, row] * source[k, :]``, over several runs of k.

    Args:
        rows, vectors: of the tile.
        sums, stride: the first row's address, and how far rows are apart.
        weights: address; of each k, those of all rows stand together.
        source, distance: address, and how far the lines of two k are apart.
        runs, count: address of (count, 3) integers: where a run begins in the source, its length,
            and where its weights begin.
    """
    _add_products(  # type: ignore[call-arg]  # numba passes the typing context itself
        rows, vectors, sums, stride, weights, source, distance, runs, count
    )


@called_through_pointer(11)
def sum_of_products(
    outputs, inputs, sums, left, line_left, row_left, right, line_right, row_right, rows, vectors
):
    """``sums[m, k] = sum left[m, :] * right[k, :]``, along lines of several rows.

    Args:
        outputs, inputs: of the tile.
        sums: address of (outputs, inputs) and then up to a whole vector, to write to.
        left, line_left, row_left: address of the first line, and how far lines and rows are apart.
            The right factor likewise.
        rows, vectors: to sum along.
    """
    _sum_of_products(  # type: ignore[call-arg]  # numba passes the typing context itself
        outputs, inputs, sums, left, line_left, row_left, right, line_right, row_right, rows,
        vectors,
    )  # fmt: skip


class Loops(NamedTuple):
    """Both loops, and the sizes of what they take.

    Callers are given them: as constants they would stay in what numba keeps of a caller, for it
    looks for changes in the caller's own file alone.
    """

    add: Any
    dot: Any
    vector: int
    most: int
    few: int
    outputs: int
    inputs: int


LOOPS = Loops(add_products, sum_of_products, VECTOR, MOST, FEW, OUTPUTS, INPUTS)
