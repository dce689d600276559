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
        signature = compiled.src.signature
        live = {name: (kind, values[name]) for name, kind in signature.items()
                if kind != "constexpr"}  # fmt: skip
        execute(report, live, chosen[::-1] if manner.backwards else chosen, manner)
        reports.append(report)

    triton.runtime.driver.set_active(Driver(arch))
    with (
        patch.object(launching, "launch", launch),
        patch.object(backend, "INTERPRETED", True),  # kernels run on a CPU
        patch.object(configs, "architecture", lambda device: arch),
    ):
        yield reports


def execute(
    report: Report,
    arguments: dict[str, tuple[str, Any]],
    blocks: Sequence[Block],
    manner: Manner,
) -> None:
    """Execute blocks of a launch, and complete its report.

    Args:
        arguments: type and value of each that the kernel has a parameter for.

    Raises:
        KernelError: see :func:`executed`.
    """
    program = report.program
    tensors = {name: one for name, (_, one) in arguments.items() if isinstance(one, Tensor)}
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


def parameters_of(
    program: Program, arguments: dict[str, tuple[str, Any]], memory: Memory
) -> dict[str, int]:
    """Bits of each parameter; those that Triton adds at the end are 0."""
    bits = dict.fromkeys(program.parameters, 0)
    for parameter, (name, (type_, value)) in zip(
        program.parameters, arguments.items(), strict=False
    ):
        if isinstance(value, Tensor):
            bits[parameter] = memory.address(value)
        elif type_ in ("fp32", "fp64"):
            form = "<f" if type_ == "fp32" else "<d"
            bits[parameter] = int.from_bytes(struct.pack(form, value), "little")
        elif type_[0] in "iu":
            bits[parameter] = int(value) & 0xFFFFFFFFFFFFFFFF
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
