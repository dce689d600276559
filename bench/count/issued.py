"""What executed blocks issue: instructions of warps, and multiply-adds.

PTX is what is executed; the code of the machine, which ptxas makes of it, is longer or shorter.
"""

import re
import subprocess
import tempfile
from typing import NamedTuple

import numpy as np
import triton

from tests.ptx.arithmetic import Array
from tests.ptx.measure import UNIT, WARP
from tests.ptx.program import Instruction, Program, Word

#: warps that issue a matrix instruction together
TOGETHER = {"wgmma": 4, "mma": 1}


def multiplied(instruction: Instruction, warps: float) -> float:
    """Multiply-adds of the matrix unit, if that many warps execute an instruction."""
    if not is_matrix(instruction):
        return 0
    m, n, k = instruction.shape()
    return warps * m * n * k / TOGETHER[instruction.name]


def is_matrix(instruction: Instruction) -> bool:
    return instruction.name in TOGETHER and instruction.kinds[0] in ("mma_async", "sync")


#: of an instruction, where it branches to, if it does; and is it one for the matrix unit?
Code = list[tuple[int | None, bool]]


class Loop(NamedTuple):
    """A loop that holds no other."""

    start: int
    stop: int  # the branch back
    matrix: int  # instructions for the matrix unit

    @property
    def length(self) -> int:
        return self.stop + 1 - self.start


def loops_of(code: Code) -> list[Loop]:
    loops = [(to, at) for at, (to, _) in enumerate(code) if to is not None and to < at]
    return [
        Loop(start, stop, sum(matrix for _, matrix in code[start : stop + 1]))
        for start, stop in sorted(loops)
        if not any(start <= one and other < stop for one, other in loops)
    ]


def in_ptx(program: Program) -> Code:
    code: Code = []
    for one in program.code:
        label = one.operands[0] if one.name == "bra" else None
        to = program.labels[label.text] if isinstance(label, Word) else None
        code.append((to, is_matrix(one)))
    return code


def in_machine_code(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([\w.]+)([^;]*);"
    found = [one for one in re.findall(line, sass, re.MULTILINE) if one[1] != "NOP"]
    number = {int(at, 16): i for i, (at, _, _) in enumerate(found)}
    code: Code = []
    for _, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        to = number.get(int(target[1], 16)) if target else None
        code.append((to, name.startswith(("HGMMA", "HMMA", "DMMA"))))
    return code


def instructions(program: Program, issued: Array, machine: Code) -> tuple[float, float]:
    """Issued by warps; and in loops with matrix instructions, by a warp for each m64n128k16.

    Args:
        issued: how many warps have executed each instruction of the program.

    PTX says how often each is executed. If the machine's code has the same loops, they are as long
    as there, and what is outside of them is longer by one factor; if not, PTX's are counted.
    """
    loops, theirs = loops_of(in_ptx(program)), loops_of(machine)
    if [one.matrix for one in loops] != [one.matrix for one in theirs]:
        theirs = loops
        machine = in_ptx(program)
    outside = float(issued.sum())
    inside = multiplying = products = 0.0
    for loop, their in zip(loops, theirs, strict=True):
        body = slice(loop.start, loop.stop + 1)
        executed_in = float(issued[body].sum())
        outside -= executed_in
        inside += executed_in * their.length / loop.length
        if loop.matrix:
            multiplying += executed_in * their.length / loop.length
            products += sum(map(multiplied, program.code[body], issued[body].tolist()))
    length, their_length = len(program.code), len(machine)
    length -= sum(loop.length for loop in loops)
    their_length -= sum(loop.length for loop in theirs)
    per_unit = multiplying * UNIT / (products * TOGETHER["wgmma"]) if products else 0.0
    return inside + outside * their_length / length, per_unit


def flops_of(program: Program, issued: Array) -> float:
    """Of matrix instructions, or of all multiply-adds if there are none."""
    products = sum(map(multiplied, program.code, issued.tolist()))
    if not products:
        fused = np.array([one.name == "fma" for one in program.code])
        products = WARP * float(issued[fused].sum())
    return 2 * products
