"""Kernels as they are compiled, executed on a CPU; and whether the executor finds faults.

In an ordinary run, one case of each mechanism; ``make test-ptx`` runs them all.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import mintnet_triton as mint
from mintnet_triton.kernels import dispatch
from mintnet_triton.kernels.gpu import configs, launching
from mintnet_triton.ordering import Ordering
from tests import grid
from tests.ptx import KernelError, Manner, Report, executed, kernels
from tests.ptx.elsewhere import compiled
from tests.ptx.launches import Argument, execute
from tests.ptx.measure import total
from tests.ptx.program import read

ARCHS = ("sm_90", "sm_80")

ORDERINGS: list[Any] = list(product(("channel", "pixel"), ("lower", "upper")))

#: of products; 16 bits by autocast
NUMBERS = ("bfloat16", "float16", "tf32", "float32", "float64")

#: where the interpreter, like torch, multiplies float32, the matrix unit drops bits of operands
TOLERANCES = grid.TOLERANCES | {"tf32": 1e-3}

#: what a GPU leaves open, other than by default
MANNERS = {
    "at once": Manner(late=False),
    "warp by warp": Manner(apart=True),
    "warps backwards": Manner(apart=True, backwards=True),
    "block by block": Manner(together=1),
    "blocks backwards": Manner(together=1, backwards=True),
    "all blocks": Manner(together=1000),
}


def cases(*kept: tuple[Any, ...], of: Iterator[tuple[Any, ...]]) -> list[Any]:
    return grid.thinned(of, kept)


# The package's kernels, by its own functions.


def random_layer(ordering: Any, numbers: str, activation: str = "elu") -> mint.MintLayer:
    """A layer whose hidden layers are about 1, and that Algorithm 1 inverts.

    Biases keep coarse numbers from the kink of ELU, where its slope jumps.
    """
    layer = mint.MintLayer(3, (3, 4), 6, ordering[1], ordering[0], 3, activation)
    with torch.no_grad():
        for conv in (layer.conv1, layer.conv2, layer.conv3):
            limit = (1.0 / conv.weight[0].numel()) ** 0.5
            torch.nn.init.uniform_(conv.weight, -limit, limit)
            assert conv.bias is not None
            conv.bias.copy_(2 * torch.randn(conv.bias.shape).sign())
        torch.nn.init.normal_(layer.t, mean=1, std=0.1)
    return layer.to(grid.dtype_of("float32" if "16" in numbers else numbers))


def of_layer(layer: mint.MintLayer, x: Tensor, ordering: Any) -> dict[str, Tensor]:
    """What a layer computes, with gradients for random ones upstream."""
    x = x.clone().requires_grad_()
    y, diagonal, log_det = dispatch.mint_forward(
        x, layer.effective_weights(), layer.activation, *ordering
    )
    generator = torch.Generator().manual_seed(1)
    total = log_det.sum().to(x.dtype)
    for one in (y, diagonal):
        upstream = torch.randn(one.shape, generator=generator, dtype=torch.float64)
        total = total + (one.to(x.dtype) * upstream.to(x.dtype)).sum()
    total.backward()
    assert x.grad is not None
    found = {"y": y, "diagonal": diagonal, "log_det": log_det, "by x": x.grad}
    named = layer.named_parameters()
    return found | {f"by {name}": one.grad for name, one in named if one.grad is not None}


def assert_layer(arch: str, ordering: Any, numbers: str, manner: Manner, **more: Any) -> None:
    layer = random_layer(ordering, numbers, **more)
    x = torch.randn(2, 3, 3, 4, dtype=layer.t.dtype)
    half = grid.dtype_of(numbers) if "16" in numbers else None
    with (
        executed(arch, manner) as launches,
        mint.use_backend("triton"),
        grid.precision_of(numbers),
        torch.autocast("cpu", half, enabled=half is not None),
    ):
        found = of_layer(copy.deepcopy(layer), x, ordering)
    assert launches
    with mint.use_backend("torch"):
        expected = of_layer(layer.double(), x.double(), ordering)
    assert found.keys() == expected.keys()
    for name, one in found.items():
        grid.assert_near(name, one, expected[name], TOLERANCES[numbers])


@pytest.mark.parametrize(
    ("arch", "ordering", "numbers"),
    cases(("sm_90", ORDERINGS[0], "bfloat16"), of=product(ARCHS, ORDERINGS, NUMBERS)),
)
@compiled
def test_layer_and_its_gradients(arch: str, ordering: Any, numbers: str) -> None:
    assert_layer(arch, ordering, numbers, Manner())


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("numbers", ["bfloat16", "tf32"])
@compiled
def test_layer_in_every_manner(arch: str, manner: str, numbers: str) -> None:
    assert_layer(arch, ORDERINGS[1], numbers, MANNERS[manner], activation="softplus")


@pytest.mark.full
@pytest.mark.parametrize("numbers", ["float16", "tf32"])
@compiled
def test_largest_tiles(numbers: str) -> None:
    """Those that only large batches get otherwise."""
    largest = patch.object(configs, "_clocks", lambda block_m, block_n, *_: -block_m * block_n)
    with largest, patch.object(configs, "FEW", 0):
        assert configs.hidden_tile("sm_90", "half", 3, 6, 6, 24).blocks.places == 256
        assert_layer("sm_90", ORDERINGS[2], numbers, MANNERS["warp by warp"])


@pytest.mark.parametrize(
    ("arch", "kernel", "numbers"),
    cases(("sm_80", 3, "tf32"), of=product(ARCHS, (1, 3, 5), NUMBERS)),
)
@compiled
def test_convolution_and_its_gradients(arch: str, kernel: int, numbers: str) -> None:
    left = Ordering("pixel", "lower").conv_mask(2, kernel)
    left = left.repeat_interleave(7, 0).repeat_interleave(9, 1)
    scale = left.sum((1, 2, 3), keepdim=True).clamp(min=1).sqrt()
    dtype = grid.dtype_of(numbers)
    x, upstream = torch.randn(2, 18, 3, 5).to(dtype), torch.randn(2, 14, 3, 5).to(dtype)
    weight, bias = (torch.randn(left.shape) * left / scale).to(dtype), torch.randn(14).to(dtype)

    def results(*given: Tensor) -> list[Tensor]:
        x, weight, bias = leaves = [one.clone().requires_grad_() for one in given]
        y = dispatch.masked_conv2d(x, weight, bias, 2, "pixel", "lower")
        y.backward(upstream.to(y.dtype))
        return [y, *(one.grad for one in leaves if one.grad is not None)]

    with executed(arch), mint.use_backend("triton"), grid.precision_of(numbers):
        found = results(x, weight, bias)
    with mint.use_backend("torch"):
        expected = results(x.double(), weight.double(), bias.double())
    tolerance = TOLERANCES[numbers]
    names = ("y", "by x", "by weight", "by bias")
    for name, one, other in zip(names, found, expected, strict=True):
        other = other * left if name == "by weight" else other
        one = one * left if name == "by weight" else one
        grid.assert_near(name, one, other, tolerance)


@pytest.mark.parametrize(
    ("arch", "ordering", "numbers", "manner"),
    cases(
        ("sm_90", ORDERINGS[1], "float16", "all blocks"),
        of=product(ARCHS, ORDERINGS, ("float16", "float32", "float64"), MANNERS),
    ),
)
@compiled
def test_fixed_point(arch: str, ordering: Any, numbers: str, manner: str) -> None:
    """Of "float16", begun with products in it, and finished in float32."""
    order, triangle = ordering
    layer = random_layer(ordering, numbers).requires_grad_(False)
    x = torch.randn(2, 3, 3, 4, dtype=layer.t.dtype)
    with mint.use_backend("torch"):
        z = layer.double()(x.double())[0]
    weights = dispatch.FrozenWeights(layer.to(x.dtype).effective_weights())
    z = z.to(x.dtype)
    with executed(arch, MANNERS[manner]), mint.use_backend("triton"):
        found, *_, steps = dispatch.fixed_point(
            z, z / layer.t, weights, layer.activation, order, triangle, 1.0, 12, 1e-5,
            coarse=numbers == "float16",
        )  # fmt: skip
    assert bool((steps > 0).all())
    grid.assert_near("x", found, x, 1e-4)


@pytest.mark.parametrize(
    ("arch", "ordering", "numbers"),
    cases(("sm_80", ORDERINGS[0], "float32"), of=product(ARCHS, ORDERINGS, ("float32", "float64"))),
)
@compiled
def test_wavefront(arch: str, ordering: Any, numbers: str) -> None:
    layer = random_layer(ordering, numbers).requires_grad_(False)
    x = torch.randn(2, 3, 3, 4, dtype=layer.t.dtype)
    with mint.use_backend("torch"):
        z = layer.double()(x.double())[0].to(x.dtype)
    weights = layer.to(x.dtype).effective_weights()
    with executed(arch), mint.use_backend("triton"):
        wave = dispatch.mint_wavefront(z, weights, layer.activation, *ordering)
    grid.assert_near("x", wave.x, x, 1e-5 if numbers == "float32" else 1e-11)


# What is executed, against numbers that torch computes.

#: block_m, block_n, block_k, warps
TILES = [(64, 32, 32, 4), (128, 64, 64, 8), (64, 16, 16, 4), (128, 128, 32, 8), (16, 16, 32, 2)]


def multiply(
    arch: str, numbers: str, turned: bool, tile: Any, **more: Any
) -> tuple[Tensor, Tensor, list[Report]]:
    """A product of ragged matrices, that of float64, and what was reported."""
    dtype = grid.dtype_of(numbers)
    rows, columns, depth = 100, 80, 208  # rows begin where 16 bytes may be copied
    a = torch.randn(rows, depth).to(dtype)
    b = torch.randn((columns, depth) if turned else (depth, columns)).to(dtype)
    c = torch.empty(rows, columns, dtype=torch.promote_types(dtype, torch.float32))
    block_m, block_n, block_k, warps = tile
    with executed(arch, **more) as launches:
        launching.launch(
            kernels.product_kernel, (-(-rows // block_m), -(-columns // block_n)),
            c, a, b, rows, columns, depth, TURNED=turned,
            PRECISION="tf32" if numbers == "tf32" else "ieee",
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=3,
        )  # fmt: skip
    return c, a.double() @ (b.double().T if turned else b.double()), launches


@pytest.mark.parametrize(
    ("arch", "numbers", "turned", "tile"),
    cases(
        ("sm_90", "bfloat16", True, TILES[0]),
        ("sm_90", "bfloat16", False, TILES[1]),
        ("sm_90", "float16", False, TILES[2]),
        ("sm_90", "tf32", True, TILES[3]),
        ("sm_90", "float64", True, TILES[4]),
        ("sm_80", "bfloat16", False, TILES[0]),
        ("sm_80", "tf32", True, TILES[4]),
        of=product(ARCHS, NUMBERS, (True, False), TILES),
    ),
)
@compiled
def test_products(arch: str, numbers: str, turned: bool, tile: Any) -> None:
    found, expected, [report] = multiply(arch, numbers, turned, tile, measured=True)
    tolerance = {"bfloat16": 1e-6, "float16": 1e-6}.get(numbers, TOLERANCES[numbers])
    grid.assert_near("product", found, expected, tolerance)
    tensor_core = "wgmma.mma_async" if arch == "sm_90" and tile[0] >= 64 else "mma"
    if numbers in ("bfloat16", "float16", "tf32"):
        assert tensor_core in report.instructions
        whole = [
            -(-size // block) * block for size, block in zip((100, 80, 208), tile[:3], strict=True)
        ]
        assert report.matrix_units == whole[0] * whole[1] * whole[2] / (64 * 128 * 16)


@pytest.mark.parametrize(
    ("arch", "numbers"),
    cases(("sm_90", "float32"), ("sm_80", "float64"), of=product(ARCHS, ("float32", "float64"))),
)
@compiled
def test_functions(arch: str, numbers: str) -> None:
    dtype = grid.dtype_of(numbers)
    x, y = 3 * torch.randn(2, 500, dtype=dtype)
    found = torch.empty(7, 500, dtype=dtype)
    with executed(arch):
        launching.launch(kernels.functions_kernel, (4,), found, x, y, 500, BLOCK=128)
    x, y = x.double(), y.double()
    expected = torch.stack([
        x.exp(), x.abs().log(), x.abs().sqrt(), x / y, x.floor(), x * y + x,
        torch.where(x < y, torch.minimum(x, y), -x),
    ])  # fmt: skip
    tolerance = 1e-6 if numbers == "float32" else 1e-15
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    cases(
        ("sm_90", torch.int32),
        ("sm_80", torch.int64),
        of=product(ARCHS, (torch.int32, torch.int64)),
    ),
)
@compiled
def test_integers(arch: str, dtype: torch.dtype) -> None:
    x, y = torch.randint(-(2**31), 2**31, (2, 300), dtype=torch.int64).to(dtype)
    y = torch.where(y == 0, 1, y)
    found = torch.empty(8, 300, dtype=dtype)
    with executed(arch):
        launching.launch(kernels.integers_kernel, (3,), found, x, y, 300, BLOCK=128)

    def towards_zero(a: Tensor, b: Tensor | int) -> Tensor:
        return a.div(b, rounding_mode="trunc")

    least, most = torch.minimum(x, y), torch.maximum(x, y)
    expected = [
        towards_zero(x, y), x.fmod(y), x * y - y, x << (y & 7), x >> (y & 7), (x & y) ^ (x | 3),
        towards_zero(most, 7), least.fmod(7),
    ]  # fmt: skip
    assert torch.equal(found, torch.stack(expected))


DTYPES = ("float64", "float32", "float16", "bfloat16", "int32", "int64")


@pytest.mark.parametrize(
    ("arch", "source", "to"),
    cases(
        ("sm_90", "float32", "bfloat16"),
        ("sm_90", "bfloat16", "float32"),
        ("sm_80", "float64", "float16"),
        ("sm_80", "float32", "int32"),
        ("sm_80", "int64", "float32"),
        of=product(ARCHS, DTYPES, DTYPES),
    ),
)
@compiled
def test_conversions(arch: str, source: str, to: str) -> None:
    x = (100 * torch.randn(260)).to(getattr(torch, source))
    found = torch.empty(260, dtype=getattr(torch, to))
    with executed(arch):
        launching.launch(kernels.convert_kernel, (2,), found, x, 260, BLOCK=256)
    assert torch.equal(found, x.to(found.dtype))


@pytest.mark.parametrize(
    ("arch", "dtype"),
    cases(
        ("sm_90", torch.float32),
        ("sm_80", torch.int32),
        of=product(ARCHS, (torch.float32, torch.float64, torch.int32)),
    ),
)
@compiled
def test_reductions(arch: str, dtype: torch.dtype) -> None:
    x = (100 * torch.randn(50, 60)).to(dtype)
    sums, largest = torch.empty(60, dtype=dtype), torch.empty(50, dtype=dtype)
    with executed(arch):
        launching.launch(kernels.reduce_kernel, (1,), sums, largest, x, 50, 60, ROWS=64, COLUMNS=64)
    torch.testing.assert_close(sums.double(), x.double().sum(0), rtol=1e-5, atol=1e-3)
    zero = torch.zeros((), dtype=dtype)
    assert torch.equal(largest, torch.maximum(x.amax(1), zero))


@pytest.mark.parametrize(
    ("arch", "manner"),
    cases(("sm_90", "all blocks"), ("sm_80", "blocks backwards"), of=product(ARCHS, MANNERS)),
)
@compiled
def test_atomics(arch: str, manner: str) -> None:
    x = torch.randint(-1000, 1000, (400,), dtype=torch.int32)
    total, largest, count = torch.zeros(3, dtype=torch.int32).chunk(3)
    with executed(arch, MANNERS[manner]):
        launching.launch(kernels.atomics_kernel, (4,), total, largest, count, x, 400, BLOCK=128)
    assert [int(total), int(largest), int(count)] == [
        int(x.sum()), int(x.max()), int((x > 0).sum())
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "manner"), cases(("sm_90", "all blocks"), of=product(ARCHS, MANNERS))
)
@compiled
def test_blocks_that_wait_for_each_other(arch: str, manner: str) -> None:
    x, out = torch.randn(300), torch.empty(1)
    partial, counter = torch.empty(3), torch.zeros(1, dtype=torch.int32)
    arguments = (out, partial, counter, x, 300, 3)
    with executed(arch, MANNERS[manner]):
        launching.launch(kernels.last_block_kernel, (3,), *arguments, SEM="acq_rel", BLOCK=128)
    torch.testing.assert_close(out, x.sum()[None])
    counter.zero_()
    with executed(arch, MANNERS[manner]), pytest.raises(KernelError, match="another one writes"):
        launching.launch(kernels.last_block_kernel, (3,), *arguments, SEM="relaxed", BLOCK=128)


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=pytest.mark.full)])
@compiled
def test_blocks_that_spin(arch: str) -> None:
    out, turn = torch.zeros(5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with executed(arch):
        launching.launch(kernels.relay_kernel, (5,), out, turn, SPINNING=True)
    assert out.tolist() == [0, 1, 3, 6, 10]
    turn.zero_()
    with executed(arch), pytest.raises(KernelError, match="another one writes to out"):
        launching.launch(kernels.relay_kernel, (5,), out, turn, SPINNING=False)
    turn.zero_()
    alone = Manner(together=1, backwards=True)
    with executed(arch, alone), pytest.raises(KernelError, match="wait for others for ever"):
        launching.launch(kernels.relay_kernel, (5,), out, turn, SPINNING=True)


@compiled
def test_reports() -> None:
    x = torch.randn(4096)
    out = torch.empty(4096, dtype=torch.bfloat16)
    with executed("sm_90", blocks=[(2, 0, 0)], measured=True, traced=True) as launches:
        launching.launch(kernels.convert_kernel, (4,), out[1:], x[1:], 4000, BLOCK=1024)
    [report] = launches
    assert torch.equal(out[2049:3073], x[2049:3073].bfloat16())  # and no other block was executed
    assert (report.kernel, report.grid, report.blocks) == ("convert_kernel", (4, 1, 1), 1)
    assert report.instructions["ld.global"] == report.instructions["st.global"] == 8 * 4
    loads = [one for one in report.stream if one.instruction.name == "ld"]
    assert {one.warp for one in loads} == set(range(4))
    # 128 bytes that begin 4 bytes after a sector does lie in five.
    assert all(len(one.sectors) == 5 and one.size == 4 for one in loads)
    assert total(report.sectors)[:2] == (2 * 32, 5 * 32 + 3 * 32)


# Faults, one by one, in PTX written by hand.


def run(
    body: str, *tensors: Tensor, threads: int = 64, blocks: int = 1, manner: Manner | None = None
) -> Report:
    """Execute a kernel: %rd1, ... are its tensors, %r1 is the thread, %r2 and %rd9 4 times that."""
    names = [f"test_param_{i}" for i in range(len(tensors))]
    parameters = ", ".join(f".param .u64 {name}" for name in names)
    loads = "".join(f"ld.param.b64 %rd{i}, [{name}];\n" for i, name in enumerate(names, 1))
    program = read(f""".visible .entry test({parameters})
{{
.reg .pred %p<9>;
.reg .b32 %r<99>;
.reg .b64 %rd<99>;
{loads}mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
cvt.u64.u32 %rd9, %r2;
{body.replace("; ", ";" + chr(10))}
ret;
}}
""")
    report = Report(program, (blocks, 1, 1), {}, threads, 1024, blocks, True, True)
    arguments = [Argument(f"x{i}", "*", tensor) for i, tensor in enumerate(tensors)]
    every = [(i, 0, 0) for i in range(blocks)]
    execute(report, arguments, every, manner or Manner())
    return report


STORE = "st.shared.b32 [%r2], %r1;"
LOAD = "xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3];"  # what the other warp has stored
COPY = "add.s64 %rd2, %rd1, %rd9; cp.async.ca.shared.global [%r2], [%rd2], 4;"
WAIT = "cp.async.commit_group; cp.async.wait_group 0;"


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("ld.global.b32 %r3, [%rd1+4096];", "4 bytes of global memory at 4096 in x0, of 4096"),
        ("st.global.b32 [%rd1+-4], %r1;", "global memory"),
        ("ld.global.b64 %rd2, [%rd1+4];", "no multiple"),
        ("st.shared.b32 [1024], %r1;", "beyond its 1024"),
        ("st.shared.b64 [4], %rd1;", "no multiple"),
        ("ld.shared.b32 %r3, [%r2];", "nobody has written"),
        ("add.s32 %r3, %r4, 1;", "%r4 is read before it is written"),
        (f"{STORE} {LOAD}", "another warp has written"),
        (f"{STORE} bar.sync 0; {LOAD} {STORE}", "another warp has read"),
        ("st.shared.b32 [0], %r1;", "different values"),
        (f"{COPY} ld.shared.b32 %r3, [%r2];", "copy is still on its way"),
        (f"{COPY} {WAIT} {LOAD}", "another warp has written"),
        (f"{COPY} {STORE}", "copy is still on its way"),
        ("st.global.b32 [%rd1], %r1;", "different values to the same place"),
        ("add.s64 %rd2, %rd1, %rd9; st.global.b32 [%rd2], %r1; ld.global.b32 %r3, [%rd1];",
         "another warp has written to x0"),
        ("ld.global.b32 %r3, [%rd1]; add.s64 %rd2, %rd1, %rd9; st.global.b32 [%rd2], %r1;",
         "another one has read of x0"),
        ("setp.lt.s32 %p1, %r1, 7; @%p1 bar.sync 0;", "not all threads of a warp"),
        ("setp.lt.s32 %p1, %r1, 7; @%p1 bra $end;\nshfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;\n$end:",
         "different places"),
        ("mbarrier.init.shared::cta.b64 [0], 1;", "not known here: mbarrier"),
        ("trap;", "gives up"),
    ],
)  # fmt: skip
def test_faults(body: str, match: str) -> None:
    with pytest.raises(KernelError, match=re.escape(match)):
        run(body, torch.zeros(1024))
    for manner in MANNERS.values():  # it may show itself in another way
        with pytest.raises(KernelError):
            run(body, torch.zeros(1024), manner=manner)


@pytest.mark.parametrize(
    "body",
    [
        f"{STORE} bar.sync 0; {LOAD} bar.sync 0; {STORE}",
        f"{COPY} {WAIT} bar.sync 0; {LOAD}",
        f"{COPY} {WAIT} ld.shared.b32 %r3, [%r2];",
        "st.shared.b32 [0], 7;",  # the same by all
        "setp.lt.s32 %p1, %r1, 32; @%p1 ret; st.shared.b32 [0], %r1; bar.sync 0;".replace(
            "[0]", "[%r2]"
        ),
    ],
)
def test_no_faults(body: str) -> None:
    for manner in (Manner(), *MANNERS.values()):
        run(body, torch.zeros(1024), manner=manner)


WRITE_OWN = "mov.u32 %r3, %ctaid.x; mul.wide.u32 %rd3, %r3, 4; add.s64 %rd3, %rd1, %rd3; "


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (f"{WRITE_OWN} st.global.b32 [%rd1], %r3;", "values to the same|another block has written"),
        (f"{WRITE_OWN} st.global.b32 [%rd3], 7; ld.global.b32 %r4, [%rd1];", "another one writes"),
        (f"{WRITE_OWN} ld.global.b32 %r4, [%rd1]; st.global.b32 [%rd3], 7;", "another one writes"),
        (f"{WRITE_OWN} red.global.gpu.relaxed.add.s32 [%rd1], 1; ld.global.b32 %r4, [%rd1];",
         "another one writes"),
        (f"{WRITE_OWN} st.global.b32 [%rd1], 7;", None),  # the same by all
        (f"{WRITE_OWN} st.global.b32 [%rd3], %r3; ld.global.b32 %r4, [%rd3];", None),
        (f"{WRITE_OWN} red.global.gpu.relaxed.add.s32 [%rd1], 1;", None),
    ],
)  # fmt: skip
def test_races_of_blocks(body: str, match: str | None) -> None:
    for together, backwards in product((1, 2, 1000), (False, True)):
        manner = Manner(together=together, backwards=backwards)
        arguments = body, torch.zeros(1024, dtype=torch.int32)
        if match is None:
            run(*arguments, threads=32, blocks=4, manner=manner)
        else:
            with pytest.raises(KernelError, match=match):
                run(*arguments, threads=32, blocks=4, manner=manner)


# Faults planted in what Triton has compiled.


def without(pattern: str) -> tuple[str, Callable[[re.Match[str]], str]]:
    return rf"^\t{pattern}[^;]*;", lambda found: ""


def swapped(pattern: str) -> tuple[str, Callable[[re.Match[str]], str]]:
    """Two operands that follow a pattern."""
    return rf"({pattern})(%\w+), (%\w+)", lambda found: f"{found[1]}{found[3]}, {found[2]}"


#: What is planted: in place of what, what becomes of that, and the share that has to be found. The
#: others are without consequence: Triton waits twice in places, and some masks hide nothing.
PLANTS: dict[str, tuple[str, Callable[[re.Match[str]], str], float]] = {
    "no barrier": (*without(r"bar\.sync"), 0.6),
    "no wait for copies": (*without(r"cp\.async\.wait_group"), 0.2),
    "copies not committed": (*without(r"cp\.async\.commit_group"), 0.8),
    "no wait for wgmma": (*without(r"wgmma\.wait_group"), 1),
    "wgmma waited for too late": (
        r"(wgmma\.wait_group\S*\s+)(\d)", lambda found: f"{found[1]}{int(found[2]) + 1}", 1,
    ),
    "wgmma not committed": (*without(r"wgmma\.commit_group"), 1),
    "no fence of registers": (*without(r"wgmma\.fence"), 1),
    "no fence of memory": (*without(r"fence\.proxy"), 1),
    "store without its mask": (r"@%p\d+ (st\.global)", lambda found: found[1], 0.5),
    "copy without its size": (
        r"^(\t(?:@%p\d+ )?cp\.async\.c[ag][^;]*), %r\d+;", lambda found: f"{found[1]};", 0.25,
    ),
    "mma with A swapped": (*swapped(r"^\tmma[^{]*\{[^}]*\}, \{ *"), 0.75),
    "mma with B swapped": (*swapped(r"^\tmma[^{]*\{[^}]*\}, \{[^}]*\}, \{ *"), 0.75),
    "wgmma with A for B": (*swapped(r"^\twgmma\.mma_async[^}]*\}, "), 1),
    "another swizzle": (
        r"(or\.b64\s+%rd\d+, %rd\d+, )(-?\d{18,})",
        lambda found: f"{found[1]}{int(found[2]) ^ 1 << 62}", 1,
    ),
    "ldmatrix not turned": (r"(ldmatrix\S*)\.trans", lambda found: found[1], 1),
}  # fmt: skip

#: what there is of either architecture alone
OF_WGMMA = {name for name in PLANTS if "wgmma" in name or "fence" in name} | {"another swizzle"}
OF_MMA = {"mma with A swapped", "mma with B swapped", "ldmatrix not turned"}


def planted(ptx: str) -> Iterator[tuple[str, str]]:
    """What is planted, and the PTX with it; at each place once."""
    for name, (pattern, replace, _) in PLANTS.items():
        for found in re.finditer(pattern, ptx, re.MULTILINE):
            yield name, ptx[: found.start()] + replace(found) + ptx[found.end() :]


@pytest.mark.parametrize(
    ("arch", "numbers", "turned", "tile"),
    cases(
        ("sm_90", "bfloat16", False, TILES[0]),
        ("sm_80", "bfloat16", False, TILES[0]),
        of=product(ARCHS, ("bfloat16", "tf32"), (True, False), TILES[:4]),
    ),
)
@compiled
def test_planted_faults_are_found(arch: str, numbers: str, turned: bool, tile: Any) -> None:
    found, planted_in_all = count_found(arch, numbers, turned, tile)
    missing = PLANTS.keys() - planted_in_all.keys() - (OF_MMA if arch == "sm_90" else OF_WGMMA)
    if turned or numbers == "tf32":  # ldmatrix has no reason to turn a matrix
        missing -= {"ldmatrix not turned"}
    assert not missing, "nothing to plant them in"
    for name, count in planted_in_all.items():
        share = PLANTS[name][2]
        assert found[name] >= share * count, f"{name}: {found[name]} of {count} found"


def count_found(*case: Any) -> tuple[Counter[str], Counter[str]]:
    """Of each kind, how many were found by a fault or by wrong numbers, and how many planted."""
    tolerance = TOLERANCES["tf32"]
    originals: list[str] = []

    def keep(_: str, ptx: str) -> str:
        originals.append(ptx)
        return ptx

    multiply(*case, change=keep)
    found: Counter[str] = Counter()
    planted_in_all: Counter[str] = Counter()
    for name, ptx in planted(originals[0]):
        planted_in_all[name] += 1
        try:
            computed, expected, _ = multiply(*case, change=lambda _, __, ptx=ptx: ptx)
            grid.assert_near(name, computed, expected, tolerance)
        except (KernelError, AssertionError):
            found[name] += 1
    return found, planted_in_all
