"""What the instructions compute that look at one thread alone, on arrays of many threads' numbers.

Registers are arrays of unsigned integers (predicates: of bool) with an element for each thread.
A type of PTX is a view of them; bfloat16 becomes float32, and packed pairs a second axis.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.program import Instruction, UnsupportedError

Array = np.ndarray[Any, Any]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT = {2: np.float16, 4: np.float32, 8: np.float64}

#: types whose names do not say their bytes
SIZES = {"bf16": 2, "tf32": 4}


def size_of(type_: str) -> int:
    """Bytes of a number."""
    return 4 if type_.endswith("x2") else SIZES.get(type_) or int(type_[1:]) // 8


def plain(type_: str) -> str:
    """Bits of a type's size, to be moved as they are."""
    return type_ if type_ == "pred" else f"b{8 * size_of(type_)}"


def decode(bits: Array, type_: str) -> Array:
    """Numbers from the bits of registers, which may have more."""
    if type_ == "pred":
        return bits
    size = size_of(type_)
    if bits.dtype.itemsize != size:
        bits = bits.astype(UNSIGNED[size])
    if type_ == "bf16":
        return widen_bfloat16(bits)
    if type_.endswith("x2"):
        return decode(np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2), type_[:-2])
    if type_[0] == "s":
        return bits.view(SIGNED[size])
    return bits.view(FLOAT[size]) if type_[0] == "f" else bits


def encode(numbers: Array, type_: str, bits: int) -> Array:
    """Bits for registers of that many."""
    if bits == 1:
        return numbers.astype(bool, copy=False)
    if type_ == "bf16":
        numbers = narrow_bfloat16(numbers)
    elif type_.endswith("x2"):
        halves = np.ascontiguousarray(encode(numbers, type_[:-2], 16))
        numbers = halves.view(np.uint32).reshape(-1)
    elif type_[0] == "f":
        numbers = numbers.astype(FLOAT[size_of(type_)], copy=False)
    size = bits // 8
    if numbers.dtype.kind == "i":  # extends its sign to a wider register
        numbers = numbers.astype(SIGNED[size], copy=False)
    elif numbers.dtype.kind == "u":
        numbers = numbers.astype(UNSIGNED[size], copy=False)
    return numbers.view(UNSIGNED[size])


def widen_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow_bfloat16(numbers: Array) -> Array:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded)


def truncate_tf32(bits: Array) -> Array:
    """float32 as the matrix unit reads it for TensorFloat-32: it drops the last 13 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def constant(text: str, type_: str) -> Array:
    """An immediate number, as the bits of one element."""
    if text[:2] in ("0f", "0d") and len(text) in (10, 18):
        return np.array([int(text[2:], 16)], np.uint32 if text[1] == "f" else np.uint64)
    number = int(text.rstrip("U"), 0)
    if type_ == "pred":
        return np.array([number != 0])
    size = size_of(type_)
    return np.array([number & ((1 << 8 * size) - 1)], UNSIGNED[size])


def _fused(instruction: Instruction, a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once, but for float64 and rare cases of double rounding."""
    wide = np.longdouble if instruction.type == "f64" else np.float64
    return _rounded(instruction, a.astype(wide) * b.astype(wide) + c.astype(wide))


def _rounded(instruction: Instruction, exact: Array) -> Array:
    """Round a wider result as the instruction says: to nearest, or another way."""
    kinds = instruction.kinds
    numbers = exact.astype(np.float64 if instruction.type == "f64" else np.float32)
    if "rm" in kinds:
        return np.where(
            numbers > exact, np.nextafter(numbers, -np.inf, dtype=numbers.dtype), numbers
        )
    if "rp" in kinds:
        return np.where(
            numbers < exact, np.nextafter(numbers, np.inf, dtype=numbers.dtype), numbers
        )
    if "rz" in kinds:
        beyond = np.abs(numbers) > np.abs(exact)
        return np.where(beyond, np.nextafter(numbers, 0, dtype=numbers.dtype), numbers)
    return np.maximum(numbers, 0) if "relu" in kinds else numbers


def _wide(a: Array) -> Array:
    size = 2 * a.dtype.itemsize
    return a.astype(np.dtype(f"{a.dtype.kind}{size}"))


def _multiply(instruction: Instruction, a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a * b
    if "wide" in instruction.kinds:
        return _wide(a) * _wide(b)
    if "hi" in instruction.kinds:
        return _high(a, b)
    return a * b


def _high(a: Array, b: Array) -> Array:
    """The upper half of an integer product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        return np.asarray(_wide(a) * _wide(b) >> bits).astype(a.dtype)
    return np.array(
        [int(x) * int(y) >> bits for x, y in np.broadcast(a, b)], a.dtype
    )  # exact, for there is no wider type


def _multiply_add(instruction: Instruction, a: Array, b: Array, c: Array) -> Array:
    product = _multiply(instruction, a, b)
    return np.asarray(product + c.view(product.dtype))


def _divide(instruction: Instruction, a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.where(b == 0, -1, a // np.where(b == 0, 1, b)).astype(a.dtype)
    # PTX rounds towards zero.
    inexact = (quotient * b != a) & (b != 0)
    return np.asarray(quotient + (inexact & ((a < 0) != (b < 0))).astype(a.dtype))


def _remainder(_: Instruction, a: Array, b: Array) -> Array:
    return np.asarray(np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype)))


def _extremum(of_two: Any, of_numbers: Any) -> Callable[..., Array]:
    """NaN loses against a number, unless the instruction says otherwise."""

    def extremum(instruction: Instruction, a: Array, b: Array) -> Array:
        proper = a.dtype.kind != "f" or "NaN" in instruction.kinds
        result: Array = (of_two if proper else of_numbers)(a, b)
        return result

    return extremum


def _shift_left(_: Instruction, a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a << np.minimum(b, bits - 1).astype(a.dtype)
    return np.where(b >= bits, 0, shifted).astype(a.dtype)


def _shift_right(_: Instruction, a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(b >= bits, 0, shifted).astype(a.dtype)


def _extract(_: Instruction, a: Array, position: Array, length: Array) -> Array:
    """The bits of a field."""
    bits, unsigned = 8 * a.dtype.itemsize, UNSIGNED[a.dtype.itemsize]
    position, length = position.astype(np.int64), length.astype(np.int64)
    up = np.clip(bits - position - length, 0, bits - 1).astype(unsigned)
    field = (a.view(unsigned) << up).view(a.dtype) >> np.clip(bits - length, 0, bits - 1).astype(
        a.dtype
    )
    return np.where(length == 0, 0, field).astype(a.dtype)


def _insert(_: Instruction, a: Array, b: Array, position: Array, length: Array) -> Array:
    field = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << position.astype(
        np.uint64
    )
    moved = a.astype(np.uint64) << position.astype(np.uint64)
    return ((b.astype(np.uint64) & ~field) | (moved & field)).astype(a.dtype)


def _permute(instruction: Instruction, a: Array, b: Array, selector: Array) -> Array:
    """Four bytes out of eight."""
    if instruction.kinds != ("b32",):
        raise UnsupportedError(instruction.text)
    both = a.astype(np.uint64) | b.astype(np.uint64) << 32
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        chosen = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> ((chosen & 7).astype(np.uint64) * 8)) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
        result |= np.where(chosen & 8, sign, byte) << np.uint32(8 * i)
    return result


def _three(instruction: Instruction, a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any logical function of three bits."""
    result = np.zeros_like(a | b | c)
    for i in range(8):
        if int(table[0]) >> i & 1:
            chosen = [one if i >> (2 - j) & 1 else ~one for j, one in enumerate((a, b, c))]
            result |= chosen[0] & chosen[1] & chosen[2]
    return result


def _funnel(instruction: Instruction, low: Array, high: Array, by: Array) -> Array:
    """The middle of two words side by side."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << 32
    by = (by & 31 if "wrap" in instruction.kinds else np.minimum(by, 32)).astype(np.uint64)
    moved = both << by >> 32 if "l" in instruction.kinds else both >> by
    return np.asarray(moved & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _leading_zeros(_: Instruction, a: Array) -> Array:
    return np.array([8 * a.dtype.itemsize - int(x).bit_length() for x in a], np.uint32)


def _copy_sign(_: Instruction, a: Array, b: Array) -> Array:
    return np.copysign(b, a)


def _plainly(function: Callable[..., Any]) -> Callable[..., Array]:
    """A function that needs to know no more than the numbers; a sum may be rounded another way."""

    def compute(instruction: Instruction, *numbers: Array) -> Array:
        kinds = instruction.kinds
        if numbers[0].dtype == np.float32 and not {"rm", "rp", "rz"}.isdisjoint(kinds):
            numbers = tuple(one.astype(np.float64) for one in numbers)
        result: Array = function(*numbers)
        if result.dtype == np.float64 and instruction.type == "f32":
            return _rounded(instruction, result)
        if "sat" in kinds and result.dtype.kind == "f":
            return np.clip(result, 0, 1)
        return result

    return compute


#: name -> what it computes, given the instruction and its operands
COMPUTE: dict[str, Callable[..., Array]] = {
    "abs": _plainly(np.abs),
    "add": _plainly(np.add),
    "and": _plainly(np.bitwise_and),
    "bfe": _extract,
    "bfi": _insert,
    "brev": _plainly(
        lambda a: np.array([int(f"{int(x):0{8 * a.dtype.itemsize}b}"[::-1], 2) for x in a], a.dtype)
    ),
    "clz": _leading_zeros,
    "copysign": _copy_sign,
    "cos": _plainly(np.cos),
    "div": _divide,
    "ex2": _plainly(np.exp2),
    "fma": _fused,
    "lg2": _plainly(np.log2),
    "lop3": _three,
    "mad": _multiply_add,
    "max": _extremum(np.maximum, np.fmax),
    "min": _extremum(np.minimum, np.fmin),
    "mul": _multiply,
    "neg": _plainly(np.negative),
    "not": _plainly(np.invert),
    "or": _plainly(np.bitwise_or),
    "popc": _plainly(lambda a: np.array([int(x).bit_count() for x in a], np.uint32)),
    "prmt": _permute,
    "rcp": _plainly(np.reciprocal),
    "rem": _remainder,
    "rsqrt": _plainly(lambda a: 1 / np.sqrt(a)),
    "shf": _funnel,
    "shl": _shift_left,
    "shr": _shift_right,
    "sin": _plainly(np.sin),
    "sqrt": _plainly(np.sqrt),
    "sub": _plainly(np.subtract),
    "tanh": _plainly(np.tanh),
    "xor": _plainly(np.bitwise_xor),
}

#: operands that have not the instruction's own type: (name, place) -> type
TYPES = {
    ("shl", 2): "u32", ("shr", 2): "u32",
    ("bfe", 2): "u32", ("bfe", 3): "u32", ("bfi", 3): "u32", ("bfi", 4): "u32",
}  # fmt: skip


def operand_type(instruction: Instruction, place: int) -> str:
    """The type of an operand of an instruction of :data:`COMPUTE`."""
    if instruction.name == "mad" and place == 3 and "wide" in instruction.kinds:
        return f"{instruction.type[0]}{16 * size_of(instruction.type)}"
    return TYPES.get((instruction.name, place), instruction.type)


ORDERED = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(relation: str, a: Array, b: Array) -> Array:
    """``setp``: floats with NaN are related only by the relations that end with u."""
    nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(1, bool)
    if relation == "ne":
        return np.asarray((a != b) & ~nan)
    if relation in ORDERED:
        return np.asarray(ORDERED[relation](a, b))
    if relation in ("num", "nan"):
        return nan if relation == "nan" else ~nan
    unequal = a != b if relation == "neu" else ORDERED[relation[:2]](a, b)
    return np.asarray(unequal | nan)


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(instruction: Instruction, numbers: Array, to: str) -> Array:
    """``cvt`` of one number; floats out of an integer's range become its nearest, NaN 0."""
    kinds = instruction.kinds
    if to == "tf32":
        bits = numbers.view(np.uint32) + np.uint32(0x1000)  # nearest, ties away from zero
        if "rna" not in kinds:
            raise UnsupportedError(instruction.text)
        return bits & np.uint32(0xFFFFE000)
    how = next((ROUND[kind] for kind in kinds if kind in ROUND), None)
    if to == "bf16" or to[0] == "f":
        if how is not None:
            return np.asarray(how(numbers))
        if "relu" in kinds:
            numbers = np.maximum(numbers, 0)
        if not {"rz", "rm", "rp"}.isdisjoint(kinds):
            raise UnsupportedError(instruction.text)
        return numbers if to == "bf16" else numbers.astype(FLOAT[size_of(to)])
    dtype = np.dtype((SIGNED if to[0] == "s" else UNSIGNED)[size_of(to)])
    if numbers.dtype.kind != "f":
        if "sat" in kinds:
            raise UnsupportedError(instruction.text)
        return numbers.astype(dtype)
    if how is None:
        raise UnsupportedError(instruction.text)
    limits: Any = np.iinfo(dtype)
    whole = np.asarray(how(numbers)).astype(np.float64)
    # float64 does not hold the largest 64-bit integers: what reaches beyond them is set apart.
    inside = np.where(np.isnan(whole) | (whole >= limits.max) | (whole <= limits.min), 0, whole)
    result = inside.astype(dtype)
    result = np.where(whole >= limits.max, dtype.type(limits.max), result)
    return np.where(whole <= limits.min, dtype.type(limits.min), result)
