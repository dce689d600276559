"""PTX, read: instructions with their operands, registers, labels, and lines of the source."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


class UnsupportedError(Exception):
    """PTX that is not known here."""


@dataclass(frozen=True)
class Register:
    """A thread's register: 1 (a predicate), 16, 32, 64 or 128 bits."""

    name: str
    index: int
    bits: int


@dataclass(frozen=True)
class Word:
    """An immediate number, the name of a special register, a symbol or a label, as written."""

    text: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Word
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``, or two results ``a|b``; an element that is None is thrown away."""

    elements: tuple[Register | Word | None, ...]


Operand = Register | Word | Address | Vector


@dataclass(eq=False)
class Instruction:
    """One instruction; ``ld.global.v4.b32`` has the name "ld", and the rest are its kinds."""

    index: int
    text: str
    line: int  # of the PTX
    where: str  # file and line of what it was compiled from
    guard: Register | None
    negated: bool
    name: str
    kinds: tuple[str, ...]
    operands: tuple[Operand, ...]

    @cached_property
    def type(self) -> str:
        """Of its operands: the last of its kinds."""
        return self.kinds[-1]

    @cached_property
    def width(self) -> int:
        """Elements of a vector that is loaded or stored."""
        return next((int(kind[1:]) for kind in self.kinds if re.fullmatch(r"v\d", kind)), 1)

    @cached_property
    def registers(self) -> frozenset[int]:
        """All that it reads or writes, but for its guard."""
        return frozenset(register.index for one in self.operands for register in _registers(one))

    @cached_property
    def results(self) -> tuple[Register, ...]:
        """What it writes: its first operand, unless it stores or only synchronises."""
        if not self.operands or self.name in ("st", "stmatrix", "red", "bar", "bra", "cp", "fence"):
            return ()
        first = self.operands[0]
        return () if isinstance(first, Address) else tuple(_registers(first))

    def shape(self) -> tuple[int, int, int]:
        """m, n and k of a matrix instruction."""
        for kind in self.kinds:
            if found := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", kind):
                return int(found[1]), int(found[2]), int(found[3])
        raise UnsupportedError(f"no shape in {self.text}")


def _registers(operand: Operand | None) -> Iterator[Register]:
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Address):
        yield from _registers(operand.base)
    elif isinstance(operand, Vector):
        for element in operand.elements:
            yield from _registers(element)


@dataclass(eq=False)
class Program:
    """A kernel."""

    name: str
    parameters: tuple[str, ...]
    registers: tuple[Register, ...]
    code: tuple[Instruction, ...]
    labels: dict[str, int]  # the instruction that comes next

    def uses(self, name: str) -> bool:
        return any(instruction.name == name for instruction in self.code)


STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*)((?:(?:\.|::)\w+)*)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+(?:\s*\|\s*[^,\s|]+)?")
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


def read(ptx: str) -> Program:
    """The one kernel of what Triton compiles.

    Raises:
        UnsupportedError: a statement is not understood.
    """
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise UnsupportedError("PTX without a kernel")
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.MULTILINE))
    start = ptx.index("{", entry.end())
    reader = _Reader({number: Path(path).name for number, path in files.items()})
    first = ptx.count("\n", 0, start) + 1
    for number, line in enumerate(ptx[start + 1 :].split("\n"), first):
        if line.strip() == "}" or line.lstrip().startswith(".section"):
            break  # an inline block never closes on a line of its own
        reader.read_line(number, line.partition("//")[0])
    parameters = re.findall(r"\.param\s[^,)]*?(\w+)\s*(?:,|$)", entry[2].strip(), re.MULTILINE)
    registers = tuple(reader.registers.values())
    return Program(entry[1], tuple(parameters), registers, tuple(reader.code), reader.labels)


class _Reader:
    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.registers: dict[str, Register] = {}
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.where = ""

    def read_line(self, number: int, line: str) -> None:
        if found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            self.where = f"{self.files.get(found[1], '?')}:{found[2]}"
        elif found := re.match(r"\s*([$\w]+):\s*$", line):
            self.labels[found[1]] = len(self.code)
        else:
            # Inline assembly may hold several statements in braces of their own.
            for statement in line.strip().removeprefix("{ ").removesuffix("}").split(";"):
                self._read_statement(number, statement.strip())

    def _read_statement(self, number: int, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text and not text.startswith(".") and text not in "{}":
            found = STATEMENT.fullmatch(text)
            if found is None:
                raise UnsupportedError(f"line {number} of the PTX: {text}")
            negated, guard, name, kinds, operands = found.groups()
            instruction = Instruction(
                len(self.code), text, number, self.where,
                self.registers[guard] if guard else None, bool(negated),
                name, tuple(re.split(r"\.", kinds)[1:]),
                tuple(self._operand(one) for one in OPERAND.findall(operands)),
            )  # fmt: skip
            self.code.append(instruction)

    def _declare(self, text: str) -> None:
        kind, names = text.removeprefix(".reg").split(None, 1)
        bits = 1 if kind == ".pred" else int(kind[2:])
        for name in re.split(r"\s*,\s*", names):
            if found := re.fullmatch(r"(%\w+?)<(\d+)>", name):
                for i in range(int(found[2])):
                    self._add(f"{found[1]}{i}", bits)
            else:
                self._add(name, bits)

    def _add(self, name: str, bits: int) -> None:
        known = self.registers.setdefault(name, Register(name, len(self.registers), bits))
        if known.bits != bits:  # blocks may name their own anew
            raise UnsupportedError(f"register {name} with {known.bits} bits and with {bits}")

    def _operand(self, text: str) -> Operand:
        if text[0] == "[":
            found = ADDRESS.fullmatch(text)
            if found is None:
                raise UnsupportedError(f"address {text}")
            base = self._element(found[1])
            assert base is not None
            return Address(base, int(found[2] or "0", 0))
        if text[0] == "{" or "|" in text:
            return Vector(tuple(map(self._element, re.split(r"[,|]", text.strip("{}")))))
        return self._element(text) or Vector((None,))

    def _element(self, text: str) -> Register | Word | None:
        text = text.strip()
        return None if text == "_" else self.registers.get(text) or Word(text)
