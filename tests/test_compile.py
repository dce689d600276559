"""Every kernel compiles for every architecture, within its limits, to the instructions meant.

An ordinary run compiles every kernel once, for the architecture that its tables are made for.
"""

import json
from collections.abc import Iterator

import pytest

triton = pytest.importorskip("triton")

from mintnet_triton.kernels.gpu import configs  # noqa: E402
from tests.compiled import REPORT, TARGETS, Record, compile_elsewhere, in_brief  # noqa: E402

#: bytes of shared memory that a block may have; the generic tables are for GPUs not known
SHARED = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    "generic": 64 * 1024,
}

#: bytes of the stack, outside loops: ptxas spills a few registers to fit one more block on a core
STACK = 32

#: bytes of an operand
SIZES = {"half": 2, "tf32": 4, "ieee": 4, "float64": 8}

TURNED = {("sm_90", "tf32"), ("sm_100", "tf32")}

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
    if report["triton"] != triton.__version__:  # which allots registers in its own way
        pytest.skip(f"all is well; the report to compare with is of Triton {report['triton']}")
    expected = [
        record
        for record in report["records"]
        if (record["arch"], record["operand"]) == (arch, operand)
        if not brief or in_brief(record)
    ]
    assert records == expected, "if the change is meant: python -m tests.compiled --write"


def find_problems(record: Record) -> Iterator[str]:
    if record["shared"] > SHARED[record["arch"]]:
        yield "too much shared memory"
    if record["stack"] > STACK or record["spills_in_loops"]:
        yield "registers spilled"
    if record["layer"][1] > 1:  # a degenerate layer need only compile
        yield from find_matrix_problems(record)
        yield from find_load_problems(record)


def find_matrix_problems(record: Record) -> Iterator[str]:
    """Products are the matrix unit's; NVIDIA's has none of exact float32, AMD's has."""
    arch, operand = record["arch"], record["operand"]
    if bool(record["matrix"]) != (operand != "ieee" or arch == "gfx942"):
        yield "matrix instructions"
    # Hopper's own instruction, which takes 64 rows, is for operands of at most 32 bits.
    rows = record["tile"][1 if record["kernel"] == "weight_gradient_kernel" else 0]
    hopper = arch == "sm_90" and operand in ("half", "tf32") and rows >= 64
    if ("wgmma.mma" in record["matrix"]) != hopper:
        yield "Hopper's matrix instructions"


def find_load_problems(record: Record) -> Iterator[str]:
    """Rows of hidden layers and weights are read 16 bytes at a time, or all that a thread has."""
    arch, operand, kernel = record["arch"], record["operand"], record["kernel"]
    block_m, block_n, block_k = record["tile"]
    threads = record["warps"] * (64 if arch == "gfx942" else 32)

    def widest(elements: int) -> int:
        return min(16, elements * SIZES[operand] // int(threads))

    copies, loads = ({int(size) for size in record[kind]} for kind in ("copies", "loads"))
    if kernel in ("middle_kernel", "hidden_gradient_kernel") and record["units_in"] > 1:
        # Both operands have such rows. NVIDIA copies 4 bytes or more; AMD's loads are not told
        # apart from those of biases and the like.
        expected = {widest(rows * block_k) for rows in (block_m, block_n)}
        if arch == "gfx942" and not expected <= loads:
            yield f"no loads of {expected} bytes"
        if arch != "gfx942" and copies != expected - {1, 2}:
            yield f"copies not of {expected} bytes"
    elif kernel != "masked_conv_kernel":  # which reads images in any layout
        # From Hopper on, TensorFloat-32 is multiplied with pixels side by side: 4 bytes at a time.
        of_weights = kernel == "weight_gradient_kernel"
        turned = of_weights and (arch, operand) in TURNED
        elements = (
            block_m * max(block_n, block_k) if of_weights else max(block_m, block_n) * block_k
        )
        if not turned and widest(elements) not in copies | loads:
            yield f"no loads of {widest(elements)} bytes"
