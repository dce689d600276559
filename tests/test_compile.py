"""Every kernel compiles for every architecture, within its limits, to the instructions meant.

An ordinary run compiles every kernel once, for the architecture that its tables are made for, and
compares what became of it with a report.
"""

import json
from collections.abc import Iterator

import pytest

triton = pytest.importorskip("triton")

from mintnet_triton.kernels.gpu import configs  # noqa: E402
from tests.compiled import REPORT, TARGETS, Record, compile_elsewhere  # noqa: E402

#: bytes of shared memory that a block may have; the generic tables are for GPUs not known
SHARED = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    "generic": 64 * 1024,
}

#: bytes of the stack, outside loops: tiles that fit a core twice spill what is held across theirs
STACK = 640

#: blocks on a core of sm_90, or warps, so that some compute while others wait
BLOCKS, WARPS = 2, 16

#: bytes of an operand
SIZES = {"half": 2, "tf32": 4, "ieee": 4, "float64": 8}

#: what the names of kernels that multiply canvases begin with
CONVOLVING = ("hidden", "output", "weight_gradient")

#: what Triton 3.6 is known to make worse than later ones, and no change here has mended
OLDEST = {
    ("sm_90", "float64", "registers spilled"),  # 48 bytes, at the end of an update of 48 colours
    ("sm_100", "tf32", "registers spilled"),  # 8 bytes, in the first convolution
    ("sm_100", "float64", "matrix instructions"),  # it does without
}


@pytest.mark.parametrize("operand", configs.OPERANDS)
@pytest.mark.parametrize(
    ("arch", "brief"),
    [("sm_90", True), *(pytest.param(arch, False, marks=pytest.mark.full) for arch in TARGETS)],
)
def test_compiles(arch: str, operand: str, brief: bool) -> None:
    records = compile_elsewhere(arch, operand, brief)
    assert records
    known = OLDEST if triton.__version__.startswith("3.6.") else set()
    problems = [
        f"{problem}: {record}"
        for record in records
        for problem in find_problems(record)
        if (arch, operand, problem) not in known
    ]
    assert not problems, "\n".join(problems)

    report = json.loads(REPORT.read_text())
    if not brief:
        return
    if report["triton"] != triton.__version__:  # which allots registers in its own way
        pytest.skip(f"all is well; the report to compare with is of Triton {report['triton']}")
    expected = [record for record in report["records"] if record["operand"] == operand]
    assert records == expected, "if the change is meant: python -m tests.compiled --write"


def find_problems(record: Record) -> Iterator[str]:
    if record["shared"] > SHARED[record["arch"]]:
        yield "too much shared memory"
    if record["stack"] > STACK or record["spills_in_loops"]:
        yield "registers spilled"
    if record["layer"][1] > 1:  # a degenerate layer need only compile
        yield from find_matrix_problems(record)
        if record["kernel"].startswith(CONVOLVING):
            yield from find_load_problems(record)


def find_matrix_problems(record: Record) -> Iterator[str]:
    """Products are the matrix unit's; NVIDIA's has none of exact float32, AMD's has."""
    arch, operand = record["arch"], record["operand"]
    multiplies = record["kernel"].startswith((*CONVOLVING, "wavefront"))
    if bool(record["matrix"]) != (multiplies and (operand != "ieee" or arch == "gfx942")):
        yield "matrix instructions"
    # Hopper's own instruction, which takes 64 rows, is for operands of at most 32 bits.
    rows = record["tile"][1 if record["kernel"] == "weight_gradient_kernel" else 0]
    hopper = arch == "sm_90" and operand in ("half", "tf32") and multiplies and rows >= 64
    if ("wgmma.mma" in record["matrix"]) != hopper:
        yield "Hopper's matrix instructions"
    if hopper:
        if record["resident"] < min(WARPS, BLOCKS * record["warps"]):
            yield "too few warps on a core"
        if record["serialised"]:
            yield "matrix instructions waited for at once"


def find_load_problems(record: Record) -> Iterator[str]:
    """Rows of canvases and weights are read 16 bytes at a time, or all that a thread has."""
    arch, operand = record["arch"], record["operand"]
    block_m, block_n, block_k = record["tile"][:3]
    threads = record["warps"] * (64 if arch == "gfx942" else 32)
    if record["kernel"] == "weight_gradient_kernel":
        # From Hopper on, TensorFloat-32 is multiplied with places side by side: 4 bytes at a time.
        turned = operand == "tf32" and record["matrix"].keys() & {"wgmma.mma", "tcgen05.mma"}
        tiles = (
            {4 // SIZES[operand] * threads} if turned else {block_m * block_n, block_m * block_k}
        )
    else:
        tiles = {block_m * block_k, block_n * block_k}
    expected = {min(16, elements * SIZES[operand] // threads) for elements in tiles}
    copies, loads = ({int(size) for size in record[kind]} for kind in ("copies", "loads"))
    # NVIDIA copies 4 bytes or more; AMD's loads are not told apart from those of biases and such.
    if arch == "gfx942" and not expected <= loads:
        yield f"no loads of {expected} bytes"
    if arch != "gfx942" and copies != expected - {1, 2}:
        yield f"copies not of {expected} bytes"
