"""What the kernels become when they are compiled: resources and instructions, without a GPU.

Triton compiles for any architecture on any machine. So the library's own calls are made here on a
CPU, and where they would launch a kernel, it is compiled as that launch would have it. That needs
a process of its own, without Triton's interpreter:

    python -m tests.compiled --arch sm_90 --operand half    # to standard output, or --out FILE
    python -m tests.compiled --arch sm_90 --operand half --brief    # the kernels that matter most
    python -m tests.compiled --write                        # these, of sm_90, to tests/data
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

import mintnet_triton as mint
from bench.contest.cases import CIFAR10, MNIST
from mintnet_triton.kernels.canvas import padded
from mintnet_triton.kernels.gpu import configs, inversion, masked_conv, mint_layer, wavefront
from mintnet_triton.kernels.reference import Condition, Structure

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "tests" / "data" / "compiled.json"

#: what the tables are compiled for; "generic" may be met on any GPU from sm_80 on
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "generic": GPUTarget("cuda", 80, 32),
}

#: one kernel's record, of numbers and names alone
Record = dict[str, Any]


class Case(NamedTuple):
    """A layer, and which of its kernels are compiled."""

    colours: int
    units: int
    size: int
    batch: int = 16  # so that rows with a number for each sample are aligned
    half: torch.dtype = torch.bfloat16
    kernels: str = ".*"  # what a kernel's name (see :func:`name`) begins with
    inverse: bool = True
    alone: bool = True  # the convolution, outside a layer
    structure: Structure = Structure("channel", "lower", "elu")
    given: bool = False  # with a context


#: for sm_90 every scale of the flows, and so every tile that its tables yield
SCALES = (
    Case(*CIFAR10[0]),
    *(Case(*scale, alone=False) for scale in CIFAR10[1:]),
    *(Case(*scale, half=torch.float16, alone=False) for scale in MNIST),
)

#: for the others, as compiling takes its time: the first scale whole, and tiles that differ most
CASES = (
    Case(3, 85, 32),
    Case(48, 5, 8, kernels="hidden.* of 5$", inverse=False),
    Case(1, 45, 28, half=torch.float16, kernels="hidden_kernel of 45", inverse=False),
)

#: what the mask and the activation make of the kernels, once
MIRRORED = Case(
    4, 11, 14, kernels="hidden|weight", inverse=False, alone=False,
    structure=Structure("pixel", "upper", "softplus"),
)  # fmt: skip

#: for tables that a listed architecture has too: the tiles that take most memory
GENERIC = Case(3, 85, 32, kernels="hidden_kernel of 85|weight_gradient", inverse=False)

#: where every integer is 1, which Triton compiles into the kernel
DEGENERATE = Case(1, 1, 1, batch=1)

#: in brief, of the first scale: every kernel once, with the operands that ask most of it
BRIEF = {
    "half": "hidden.* of 85|weight_gradient|output_kernel of",
    "tf32": "hidden_kernel of 85|weight_gradient",
    "ieee": "hidden_kernel of 9|output_kernel, update|wavefront|pack_conv|columns|image",
    "float64": "weight_gradient|output_kernel, update|pack_kernel|upstream|finish",
}

#: in brief, too: kernels that are given a context
GIVEN = {
    "half": "(hidden|output|finish)_kernel.*, given",
    "ieee": "wavefront_kernel, given",
}

#: matrix instructions, as a cubin has them
MATRIX = r"HGMMA|[DHQ]MMA|UTC\wMMA"

#: a core of sm_90: registers, warps, and bytes of shared memory, of which a block takes some more
REGISTERS, WARPS, MEMORY, RESERVED = 65536, 64, 228 * 1024, 1024


class Driver:
    """What a launch asks of a GPU's driver, for a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(arch: str, operand: str, brief: bool = False) -> list[Record]:
    """Compile the kernels of every case, or in brief, with an architecture's tables."""
    triton.runtime.driver.set_active(Driver(TARGETS[arch]))
    torch.set_float32_matmul_precision("high" if operand == "tf32" else "highest")
    records: list[Record] = []
    done: set[Any] = set()
    cases: tuple[Case, ...] = CASES
    if brief:
        cases = (Case(*CIFAR10[0], kernels=BRIEF[operand]),)
        if operand in GIVEN:
            cases += (Case(*CIFAR10[0], kernels=GIVEN[operand], alone=False, given=True),)
    elif arch == "generic":
        cases = (GENERIC,)
    elif arch == "sm_90":
        more = {"half": (MIRRORED,), "ieee": (DEGENERATE,)}
        cases = (*SCALES, *more.get(operand, ()))
    case = cases[0]

    def compile_launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        """In place of ``kernel[grid]``."""

        def launch(*arguments: Any, **constants: Any) -> None:
            values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
            record = describe(kernel, case, values)
            if not re.match(case.kernels, name(record)):
                return
            # Scales share tiles; what differs beside makes no other code, or next to none.
            fixed = frozenset((key, constants[key]) for key in constants.keys() - {"SHARES"})
            launched = (name(record), fixed, values.get("units_in") == 1, case is DEGENERATE)
            if launched not in done:
                done.add(launched)
                compiled = kernel.warmup(*arguments, grid=grid, **constants)
                records.append(record | measure(compiled))

        return launch

    with (
        patch.object(triton.JITFunction, "__getitem__", compile_launch),
        patch.object(configs, "architecture", lambda device: arch),
    ):
        for case in cases:
            call(case, operand)
    return [{"arch": arch, "operand": operand} | record for record in records]


def call(case: Case, operand: str) -> None:
    """Call what launches kernels: a layer and its gradients, its inversion, a convolution."""
    batch, colours, size = case.batch, case.colours, case.size
    hidden = colours * case.units
    dtype = torch.float64 if operand == "float64" else torch.float32
    layer = mint.MintLayer(colours, size, case.units).to(dtype)
    weights, structure = layer.raw_weights(), case.structure
    x = torch.zeros(batch, colours, size, size, dtype=dtype, requires_grad=True)
    condition = None
    if case.given:
        channels = (hidden, hidden, colours, colours)
        condition = Condition(*(torch.ones(batch, n, 1, 1, dtype=dtype) for n in channels))
    with torch.autocast("cpu", case.half, enabled=operand == "half"):
        y, _, log_det = mint_layer.mint_forward(x, weights, structure, condition=condition)
        torch.autograd.backward((y, log_det), (torch.ones_like(y), torch.ones_like(log_det)))
        if case.alone:
            masked_conv.masked_conv2d(
                torch.zeros(batch, hidden, size, size, dtype=dtype),
                torch.zeros(hidden, hidden, 3, 3, dtype=dtype),
                None, colours, structure.order, structure.triangle,
            )  # fmt: skip
    if case.inverse and operand != "tf32":
        with torch.no_grad():
            products = torch.float16 if operand == "half" else dtype
            packed = mint_layer.packed(weights, products, "ieee", structure)
            inversion.fixed_point(
                x, x, packed, weights, structure, 1.0, 1, 1e-5, condition=condition
            )
    if case.inverse and operand in ("ieee", "float64"):  # the wavefront is never rounded
        effective, order = layer.effective_weights(), (structure.order, structure.triangle)
        wavefront.wavefront(x, effective, layer.activation, *order, condition)


def describe(kernel: Any, case: Case, values: dict[str, Any]) -> Record:
    """Which launch it is."""
    blocks = [value for key, value in values.items() if key.startswith("BLOCK")]
    return {
        "kernel": kernel.__name__ + role(values),
        "layer": [case.colours, case.units, case.size, *case.structure],
        "units_in": values.get("units_in", values.get("units", values.get("channels"))),
        "tile": [int(size) for size in (blocks[0] if isinstance(blocks[0], tuple) else blocks)],
        "warps": values["num_warps"],
        "stages": values.get("num_stages"),
    }


def role(values: dict[str, Any]) -> str:
    """What a kernel is launched for, where it does more than one thing."""
    own, found = (values.get(name) for name in ("shift", "scale")), ""
    if values.get("own") is not None or values.get("shares", "") is None:
        found = ", gradient"
    elif "shares" in values and values["z"] is not None:
        found = ", update"
    given = any(one is not None for one in (*own, values.get("shifts", (None,))[0]))
    return found + ", given" * given


def name(record: Record) -> str:
    """Of a kernel, with what it does and the input channels of a colour."""
    return f"{record['kernel']} of {record['units_in']}"


def measure(compiled: Any) -> Record:
    """What became of it: bytes of shared memory and of a thread's stack, registers, instructions.

    ``copies`` are asynchronous copies from global memory to shared memory, ``loads`` those to
    registers, both by their bytes. For sm_90 also the ``resident`` warps of a core; ``loops``, the
    instructions and among them the matrix instructions of each innermost loop; ``serialised``, how
    often these loops wait for all of Hopper's that they have issued.
    """
    shared = {"shared": compiled.metadata.shared}
    if "ptx" not in compiled.asm:
        return shared | amd(compiled.asm["amdgcn"])
    found = shared | nvidia_resources(compiled.asm["cubin"]) | nvidia_code(compiled.asm["ptx"])
    if compiled.metadata.target.arch == 90:
        found["resident"] = resident_warps(found, compiled.metadata.num_warps)
        found |= innermost(disassemble(compiled.asm["cubin"]))
    return found


def resident_warps(record: Record, warps: int) -> int:
    """How many fit a core at once, in whole blocks."""
    registers = padded(record["registers"], 8) * 32 * warps
    blocks = min(REGISTERS // registers, MEMORY // (record["shared"] + RESERVED), WARPS // warps)
    return int(blocks) * warps


class Instruction(NamedTuple):
    """Of a cubin."""

    at: int
    name: str
    rest: str


def dump(option: str, cubin: bytes) -> str:
    """What cuobjdump tells."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> list[Instruction]:
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([\w.]+)([^;]*);"
    found = re.findall(line, dump("-sass", cubin), re.MULTILINE)
    return [Instruction(int(at, 16), name, rest) for at, name, rest in found]


def loops_of(code: list[Instruction]) -> list[tuple[int, int]]:
    """Where a branch leads back to, and where it stands."""
    targets = (
        (int(target[1], 16), one.at)
        for one in code
        if one.name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", one.rest))
    )
    return [(start, stop) for start, stop in targets if start < stop]


def innermost(code: list[Instruction]) -> Record:
    """The loops that hold no other, and what they wait for."""
    loops, serialised = loops_of(code), 0
    sizes = []
    for start, stop in loops:
        if any(start <= a and b <= stop for a, b in loops if (a, b) != (start, stop)):
            continue
        body = [one for one in code if start <= one.at <= stop]
        sizes.append([len(body), sum(bool(re.match(MATRIX, one.name)) for one in body)])
        issued = False
        for one in body:
            if one.name.startswith("HGMMA"):
                issued = True
            elif one.name.startswith("WARPGROUP.DEPBAR") and issued:
                serialised += one.rest.split()[-1] == "0x0"
                issued = False
    return {"loops": sizes, "serialised": serialised}


def nvidia_resources(cubin: bytes) -> Record:
    """As ptxas allotted them. Registers that it spilled are on the stack."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage", cubin))
    assert found
    registers, stack = int(found[1]), int(found[2])
    in_loops = spills_in_loops(disassemble(cubin)) if stack else 0
    return {"registers": registers, "stack": stack, "spills_in_loops": in_loops}


def spills_in_loops(code: list[Instruction]) -> int:
    """Loads and stores of the stack between a branch back and where it leads."""
    loops = loops_of(code)
    spills = [one.at for one in code if one.name.startswith(("LDL", "STL"))]
    return sum(any(start <= at <= stop for start, stop in loops) for at in spills)


def nvidia_code(ptx: str) -> Record:
    kinds = re.findall(r"\b(wgmma\.mma|mma\.sync|tcgen05\.mma)", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global [^;]*?, 0x([0-9a-f]+)", ptx)
    loads = re.findall(r"\bld\.global[.:\w]*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx)
    return {
        "matrix": count(kinds),
        "copies": count(int(size, 16) for size in copies),
        "loads": count(int(vector or 1) * int(bits) // 8 for vector, bits in loads),
    }


AMD_SIZES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def amd(assembly: str) -> Record:
    """Spilled vector registers are on the stack; scalar ones mostly in vector registers."""

    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, name
        return int(found[1])

    loads = re.findall(r"\b(?:global|buffer)_load_[us]?(byte|short|dword(?:x\d)?)\b", assembly)
    return {
        "registers": entry("vgpr_count"),
        "stack": entry("private_segment_fixed_size"),
        "spills_in_loops": entry("vgpr_spill_count"),  # wherever they are
        "scalar_spills": entry("sgpr_spill_count"),
        "matrix": count(re.findall(r"\bv_(mfma_\w+?)_\d+x\d+x\w+", assembly)),
        "copies": {},
        "loads": count(AMD_SIZES[name] for name in loads),
    }


def count(found: Any) -> dict[str, int]:
    """How often each occurs, as JSON has it."""
    return {str(key): times for key, times in sorted(Counter(found).items())}


def compile_elsewhere(arch: str, operand: str, brief: bool = False) -> list[Record]:
    """:func:`compile_all` in a process without the interpreter.

    Raises:
        RuntimeError: it failed; the message is what the process wrote.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["MINTNET_TRITON_CACHE"] = os.devnull  # the tables alone, no tiles tuned here
    command = ["-m", "tests.compiled", "--arch", arch, "--operand", operand]
    result = subprocess.run(
        [sys.executable, "-W", "error", *command, *(["--brief"] if brief else [])],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"{arch} {operand}\n{result.stdout}{result.stderr}")
    records: list[Record] = json.loads(result.stdout)
    return records


def report(records: list[Record]) -> str:
    """JSON, one record a line."""
    lines = ",\n".join(json.dumps(record) for record in records)
    return f'{{"triton": "{triton.__version__}", "records": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", choices=TARGETS)
    parser.add_argument("--operand", choices=configs.OPERANDS)
    parser.add_argument("--brief", action="store_true", help="the kernels that matter most")
    parser.add_argument("--out", type=Path, help="a file for the records of one of each")
    parser.add_argument("--write", action="store_true", help="write the report of these anew")
    options = parser.parse_args()
    if options.write:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = pool.map(lambda one: compile_elsewhere("sm_90", one, True), configs.OPERANDS)
            REPORT.write_text(report([record for part in parts for record in part]))
    elif options.arch and options.operand:
        text = json.dumps(compile_all(options.arch, options.operand, options.brief))
        if options.out:
            options.out.write_text(text)
        else:
            print(text)
    else:
        parser.error("either --write, or --arch and --operand")


if __name__ == "__main__":
    main()
