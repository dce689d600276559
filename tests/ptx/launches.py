"""Launches of kernels, compiled for a GPU that is not there, and executed."""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from mintnet_triton.kernels import backend
from mintnet_triton.kernels.gpu import configs, launching
from tests.ptx.arithmetic import size_of
from tests.ptx.measure import Counts
from tests.ptx.memory import Memory
from tests.ptx.program import Program, Word, read
from tests.ptx.shared import MisuseError, Shared
from tests.ptx.threads import WARP, KernelError, Threads

Block = tuple[int, int, int]


class Driver:
    """What a launch asks of a GPU's driver."""

    def __init__(self, arch: str) -> None:
        self.capability = int(arch.removeprefix("sm_"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiles by device

    def get_current_stream(self, device: int) -> int:
        return 0


def cell_of(program: Program, space: str) -> int:
    """The fewest bytes that a kernel touches at once, at most 16."""
    sizes = [16]
    for one in program.code:
        spaces = [kind for kind in one.kinds if kind.startswith(space)]
        if spaces and one.name in ("ld", "st", "atom", "red"):
            sizes.append(size_of(one.type) * one.width)
        elif spaces and one.name == "cp" and len(one.operands) > 2:
            size = one.operands[2]
            assert isinstance(size, Word)
            sizes.append(int(size.text, 0))
    return min(sizes)


def parameters_of(
    compiled: Any, program: Program, values: dict[str, Any], memory: Memory
) -> dict[str, int]:
    """Bits of each parameter; those that Triton adds at the end are 0."""
    bits = dict.fromkeys(program.parameters, 0)
    live = [(name, type_) for name, type_ in compiled.src.signature.items() if type_ != "constexpr"]
    for parameter, (name, type_) in zip(program.parameters, live, strict=False):
        value = values[name]
        if isinstance(value, Tensor):
            bits[parameter] = memory.address(value)
        elif type_ in ("fp32", "fp64"):
            form = "<f" if type_ == "fp32" else "<d"
            bits[parameter] = int.from_bytes(struct.pack(form, value), "little")
        elif type_[0] in "iu":
            bits[parameter] = int(value) & 0xFFFFFFFFFFFFFFFF
        else:
            raise KernelError(f"{program.name}: an argument of type {type_} is not known here")
    return bits


def execute(
    compiled: Any,
    grid: Sequence[int],
    values: dict[str, Any],
    ptx: str,
    late: bool = True,
    apart: bool = False,
    backwards: bool = False,
    together: int = 16,
    blocks: Sequence[Block] | None = None,
) -> Counts:
    program = read(ptx)
    counts = Counts(program)
    tensors = {name: one for name, one in values.items() if isinstance(one, Tensor)}
    width, height, depth = [*grid, 1, 1][:3]
    size = width, height, depth
    every = [(x, y, z) for z in range(depth) for y in range(height) for x in range(width)]
    memory = Memory(tensors, cell_of(program, "global"), len(every))
    parameters = parameters_of(compiled, program, values, memory)
    chosen = every if blocks is None else list(blocks)
    number = {block: i for i, block in enumerate(every)}
    if backwards:
        chosen = chosen[::-1]
    threads_of = compiled.metadata.num_warps * WARP
    with np.errstate(all="ignore"):
        for first in range(0, len(chosen), together):
            part = chosen[first : first + together]
            shared = Shared(compiled.metadata.shared, len(part), cell_of(program, "shared"))
            Threads(
                program, part, [number[block] for block in part], size, threads_of, parameters,
                memory, shared, counts, late, apart, backwards,
            ).run()  # fmt: skip
        try:
            memory.check_blocks()
        except MisuseError as error:
            raise KernelError(f"{program.name}: {error}") from None
    return counts


@contextmanager
def executed(
    arch: str,
    late: bool = True,
    apart: bool = False,
    backwards: bool = False,
    together: int = 16,
    blocks: Sequence[Block] | None = None,
    change: Callable[[str, str], str] | None = None,
) -> Iterator[list[Counts]]:
    launches: list[Counts] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if 0 in grid:
            return
        compiled = kernel.warmup(*arguments, grid=grid, **constants, enable_fp_fusion=True)
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        ptx = compiled.asm["ptx"]
        if change is not None:
            ptx = change(kernel.__name__, ptx)
        launches.append(
            execute(compiled, grid, values, ptx, late, apart, backwards, together, blocks)
        )

    triton.runtime.driver.set_active(Driver(arch))
    with (
        patch.object(launching, "launch", launch),
        patch.object(backend, "INTERPRETED", True),
        patch.object(configs, "architecture", lambda device: arch),
    ):
        yield launches
