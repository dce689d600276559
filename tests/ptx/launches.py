"""Launches of kernels, compiled for a GPU that is not there, and executed."""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from mintnet_triton.kernels import backend
from mintnet_triton.kernels.gpu import configs, launching
from tests.ptx.arithmetic import size_of
from tests.ptx.measure import Report
from tests.ptx.memory import Memory
from tests.ptx.program import Program, Word, read
from tests.ptx.shared import MisuseError, Shared
from tests.ptx.threads import DEFAULT, WARP, KernelError, Manner, Threads

Block = tuple[int, int, int]

#: Whether Triton fences what ``cp.async`` has written before ``wgmma`` reads it, as PTX asks for.
#: Triton 3.6 is known not to.
FENCES_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)

#: (name of a kernel, its PTX) -> the PTX that is executed
Change = Callable[[str, str], str]


class Driver:
    """What a launch asks of a GPU's driver."""

    def __init__(self, arch: str) -> None:
        self.capability = int(arch.removeprefix("sm_"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def executed(
    arch: str,
    manner: Manner = DEFAULT,
    blocks: Sequence[Block] | None = None,
    measured: bool = False,
    traced: bool = False,
    change: Change | None = None,
) -> Iterator[list[Report]]:
    """Within the block, what is launched is compiled for ``arch``, and executed here.

    Args:
        arch: "sm_80" or "sm_90"; tiles are those of its tables.
        manner: what a GPU leaves open: orders, and when asynchronous work is done.
        blocks: of each grid, (x, y, z) each; all of them by default.
        measured: count the traffic of global and shared memory.
        traced: keep the accesses to global memory of the first block that is executed.
        change: what becomes of the PTX; for tests of this package.

    Yields:
        a :class:`Report` of each launch, in their order, as they are made.

    Raises:
        KernelError: a kernel did what it may not do, or what is not known here.
        RuntimeError: Triton's interpreter is in place of its compiler.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and have no PTX")
    reports: list[Report] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if 0 in grid:
            return
        compiled = kernel.warmup(*arguments, grid=grid, **constants, enable_fp_fusion=True)
        ptx = compiled.asm["ptx"]
        program = read(ptx if change is None else change(kernel.__name__, ptx))
        x, y, z = [*grid, 1, 1][:3]
        chosen = blocks
        if chosen is None:
            chosen = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        report = Report(
            program, (x, y, z), constants, compiled.metadata.num_warps * WARP,
            compiled.metadata.shared, len(chosen), measured, traced,
        )  # fmt: skip
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        live = [
            argument
            for name, kind in compiled.src.signature.items()
            for argument in flatten(name, kind, values[name])
        ]
        execute(report, live, chosen[::-1] if manner.backwards else chosen, manner)
        reports.append(report)

    triton.runtime.driver.set_active(Driver(arch))
    with (
        patch.object(launching, "launch", launch),
        patch.object(backend, "INTERPRETED", True),  # kernels run on a CPU
        patch.object(configs, "architecture", lambda device: arch),
    ):
        yield reports


class Argument(NamedTuple):
    """One that the kernel has a parameter for."""

    name: str
    type: str  # "*bf16", "i32" ..., as Triton has it
    value: Any


def flatten(name: str, type_: Any, value: Any) -> Iterator[Argument]:
    """Tuples have a parameter for each element; constants have none."""
    if isinstance(type_, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        for field, kind, element in zip(fields, type_, value, strict=True):
            yield from flatten(f"{name}.{field}", kind, element)
    elif type_ != "constexpr":
        yield Argument(name, type_, value)


def execute(
    report: Report,
    arguments: Sequence[Argument],
    blocks: Sequence[Block],
    manner: Manner,
) -> None:
    """Execute blocks of a launch, and complete its report.

    Raises:
        KernelError: see :func:`executed`.
    """
    program = report.program
    tensors = {one.name: one.value for one in arguments if isinstance(one.value, Tensor)}
    memory = Memory(tensors, cell_of(program, "global"), len(blocks))
    parameters = parameters_of(program, arguments, memory)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), manner.together):
            part = blocks[first : first + manner.together]
            cell = cell_of(program, "shared")
            shared = Shared(report.shared_memory, len(part), cell, FENCES_COPIES)
            Threads(
                program, part, first, report.grid, report.threads, parameters, memory, shared,
                report, manner,
            ).run()  # fmt: skip
    try:
        memory.check_blocks()
    except MisuseError as error:
        raise KernelError(f"{program.name}: {error}") from None


def parameters_of(program: Program, arguments: Sequence[Argument], memory: Memory) -> list[int]:
    """Bits of each parameter; those that Triton adds at the end are 0."""
    bits = [0] * len(program.parameters)
    for i, (name, type_, value) in enumerate(arguments):
        if isinstance(value, Tensor):
            bits[i] = memory.address(value)
        elif type_ in ("fp32", "fp64"):
            form = "<f" if type_ == "fp32" else "<d"
            bits[i] = int.from_bytes(struct.pack(form, value), "little")
        elif type_[0] in "iu":
            bits[i] = int(value) & 0xFFFFFFFFFFFFFFFF
        else:
            raise KernelError(f"{program.name}: {name} is of type {type_}, not known here")
    return bits


def cell_of(program: Program, space: str) -> int:
    """The fewest bytes that a kernel touches at once, at most 16."""
    sizes = [16]
    for one in program.code:
        if not any(kind.startswith(space) for kind in one.kinds):
            continue
        if one.name in ("ld", "st", "atom", "red"):
            sizes.append(size_of(one.type) * one.width)
        elif one.name == "cp" and len(one.operands) > 2:
            size = one.operands[2]
            assert isinstance(size, Word)
            sizes.append(int(size.text, 0))
    return min(sizes)
