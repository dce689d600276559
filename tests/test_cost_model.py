"""The cost model of ``python -m bench.work``: what it counts, and that it is what is committed."""

import math
from collections import Counter
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton

from bench import work
from bench.contest.cases import CIFAR10, MNIST
from bench.count import launched
from bench.count.issued import Loop, loops_of
from bench.count.launched import CORES, Cost, held, sample
from bench.count.traffic import L1, Traffic
from mintnet_triton.kernels.gpu import configs, launching
from tests.ptx import kernels
from tests.ptx.elsewhere import compiled
from tests.ptx.program import Instruction, Program

VERSION, COMMITTED = work.from_json((work.RESULTS / work.COUNTED).read_text())

ON_THIS_TRITON = pytest.mark.skipif(
    triton.__version__ != VERSION, reason=f"what is committed is of Triton {VERSION}"
)


# The model.


def test_a_cache_forgets_what_was_not_used_for_longest() -> None:
    cache = L1(3 * 128)
    assert [cache.read(line, 0b1111) for line in (1, 2, 3, 1, 2, 3)] == [4, 4, 4, 0, 0, 0]
    assert cache.read(1, 0b1111) == 0
    assert cache.read(4, 0b0001) == 1  # in place of 2
    assert [cache.read(line, 0b1111) for line in (1, 4, 2)] == [0, 3, 4]
    assert cache.read(3, 0b0011) == 2


def instruction(name: str, *kinds: str) -> Instruction:
    return Instruction(0, name, 0, "", None, False, name, kinds, ())


def traffic(blocks: int) -> Traffic:
    """Of blocks with two warps."""
    return Traffic(Program("", (), (), (), {}), (blocks, 1, 1), {}, 64, 0, blocks, False, False)


def test_reads_of_a_core_share_its_cache() -> None:
    load = instruction("ld", "global", "b32")
    one = traffic(4)
    for _ in range(2):
        # Each warp of all blocks reads the same 128 bytes, block 3 the next ones.
        threads = np.arange(4 * 64)
        one.touched_global(load, 1024 + threads % 32 * 4 + 128 * (threads // 192), threads, 4)
    assert [one.missed(resident, 1 << 16) for resident in (1, 2, 4)] == [16, 4 + 8, 8]
    assert one.missed(4, 0) == 2 * 4 * 4  # a cache that holds nothing
    assert one.past == 0
    assert len(np.unique(np.concatenate(one.touched))) == 8


@pytest.mark.parametrize(
    "kinds", [("ld", "global", "cg", "b32"), ("st", "global", "b32"), ("cp", "async", "cg"),
              ("ld", "acquire", "gpu", "global", "b32"), ("atom", "global", "add", "u32")],
)  # fmt: skip
def test_some_go_past_the_cache(kinds: tuple[str, ...]) -> None:
    one, threads = traffic(1), np.arange(64)
    for _ in range(2):
        one.touched_global(instruction(*kinds), 1024 + threads % 32 * 4, threads, 4)
    assert (one.past, one.missed(1, 1 << 16)) == (2 * 2 * 4, 0)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (128, 0, 256, 2),
        (33, 0, 64, 25),  # rounded to 40
        (32, 0, 256, 8),
        (16, 0, 32, 32),
        (32, 112 << 10, 256, 2),  # 113 KB each
        (32, 113 << 10, 256, 1),
    ],
)
def test_how_many_blocks_a_core_holds(
    registers: int, shared: int, threads: int, blocks: int
) -> None:
    assert held(registers, shared, threads) == blocks


@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize(
    ("grid", "period", "is_sum"),
    [((1056,), 2, False), ((33,), 3, False), ((32, 8), 32, True), ((2, 68, 2), 2, True),
     ((572, 3), 1, False), ((5, 4), 1, False)],
)  # fmt: skip
def test_sample_has_each_kind_as_often(
    grid: tuple[int, ...], period: int, is_sum: bool, resident: int
) -> None:
    total = math.prod(grid)
    resident = min(resident, -(-total // CORES))
    groups = sample(grid, period, is_sum, resident)
    for group in groups:
        assert len(set(group)) == resident
        assert {(one - group[0]) % total % CORES for one in group} == {0}
    of_first = Counter(group[0] % period for group in groups)
    of_all = Counter(one % period for group in groups for one in group)
    roles = [group[0] // (total // grid[-1] if len(grid) > 1 else total) for group in groups]
    assert set(of_first.values()) == {len(groups) // period}
    assert set(of_all.values()) == {resident * len(groups) // period}
    if not is_sum:
        assert len(set(Counter(roles).values())) == 1


def test_a_launch_takes_as_long_as_what_it_needs_most_of() -> None:
    cost = Cost("", (CORES * 4,), 0, 0, 2, 0, 0, 0, 0, 0, 0)
    flops, l2, memory = 989_000_000_000, 11_000_000_000, 4_800_000_000
    one_second = CORES * 4 * 1_830_000_000
    h100, h200 = work.DEVICES
    for changed, bound, milliseconds in (
        (cost._replace(flops=flops), "matrix", 1),
        (cost._replace(flops=flops, l2=l2), "L2", 2),
        (cost._replace(l2=l2 // 100, memory=memory), "memory", 4.8 / 3.35),
        (cost._replace(flops=flops, instructions=one_second // 100), "issue", 10),
    ):
        found = work.predict(changed, "half", h100)
        assert found.bound == bound
        assert found.microseconds == pytest.approx(1e3 * milliseconds)
    assert work.predict(cost._replace(memory=memory), "half", h200).microseconds == 1e3
    # Of five blocks for each core two run at once: three times two.
    more = work.predict(cost._replace(grid=(CORES * 5,), flops=flops, exact=flops), "half", h100)
    assert more.microseconds == pytest.approx(1e3 * 6 / 5)
    assert more.of_peak == pytest.approx(5 / 6)
    assert work.predict(cost._replace(flops=flops), "tf32", h100).microseconds == 2e3


def test_loops_that_hold_no_others() -> None:
    plain, matrix = (None, False), (None, True)
    code = [plain, plain, matrix, (2, False), matrix, (1, False), (6, False), plain, (7, False)]
    assert loops_of(code) == [Loop(2, 3, 1), Loop(7, 8, 0)]  # a branch to itself is none


# What is counted.


@compiled
def test_counts_of_a_product() -> None:
    """As many as the size of the matrices says."""
    m, n, k = 128, 192, 64
    a, b, c = torch.zeros(m, k).bfloat16(), torch.zeros(k, n).bfloat16(), torch.zeros(m, n)
    with launched.costs(lambda kernel, _: kernel) as found:
        launching.launch(
            kernels.product_kernel, (m // 64, n // 64), c, a, b, m, n, k,
            TURNED=False, PRECISION="ieee", BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4,
        )  # fmt: skip
    cost = found["product"]
    assert cost.flops == 2 * m * n * k
    assert cost.memory == 2 * (m * k + k * n) + 4 * m * n
    assert cost.l2 == 2 * (m * k * n // 64 + k * n * m // 64) + 4 * m * n
    assert (cost.resident, cost.exact) == (1, 0)
    assert 0 < cost.in_loops < cost.instructions


@compiled
def test_a_long_sum_costs_what_a_short_one_tells() -> None:
    """In 16 bits to the byte, but for what L1 has at the beginning."""
    (whole,) = work.step(MNIST[1], "half", "gradient by W2")
    longer = launched.Counts.longer
    extended: list[float] = []

    def noted(short: Any, twice: Any, rounds: float) -> Any:
        extended.append(rounds)
        return longer(short, twice, rounds)

    with patch.object(launched, "ROUNDS", 2), patch.object(launched.Counts, "longer", noted):
        (told,) = work.step(MNIST[1], "half", "gradient by W2")
    assert extended
    assert extended[0] > 2
    assert told._replace(l2=0) == whole._replace(l2=0)
    assert told.l2 == pytest.approx(whole.l2, rel=0.02)


# What is committed.


def committed(operand: str) -> Cost:
    """Of the smallest middle convolution."""
    (found,) = (one for one in COMMITTED if one[:3] == ("step", MNIST[2], operand))
    (middle,) = (cost for cost in found.launches if cost.kernel == "middle")
    return middle


@ON_THIS_TRITON
@pytest.mark.parametrize("operand", work.PEAK)
@compiled
def test_costs_what_is_committed(operand: str) -> None:
    """If a change is meant, ``python -m bench.work --out bench/results`` writes it."""
    assert work.step(MNIST[2], operand, "middle") == [committed(operand)]


@ON_THIS_TRITON
@compiled
def test_worse_tiles_are_caught() -> None:
    hidden_tile = configs.hidden_tile

    def narrow(*arguments: Any) -> configs.Launch:
        tile = hidden_tile(*arguments)
        return tile._replace(blocks=tile.blocks._replace(outputs=16))

    with patch.object(configs, "hidden_tile", narrow):
        (middle,) = work.step(MNIST[2], "half", "middle")
    assert middle.l2 > committed("half").l2
    assert middle.instructions > committed("half").instructions


def test_tables_say_what_was_counted() -> None:
    assert (work.RESULTS / work.TABLES).read_text() == work.report(COMMITTED)
    assert work.from_json(work.as_json(COMMITTED))[1] == COMMITTED
    steps = {(one.scale, one.operand) for one in COMMITTED if one.work == "step"}
    assert steps == set(product((*CIFAR10, *MNIST), work.PEAK))


def test_targets_are_of_what_was_counted() -> None:
    (first,) = (one for one in COMMITTED if one[:3] == ("step", CIFAR10[0], "half"))
    assert [one.what for one in work.targets(COMMITTED)] == [
        "middle, MB from L2",
        "middle, instructions of loops for each m64n128k16",
        "middle, us",
        "gradient by h1, us",
        "gradient by W2, us",
        "step, us",
        "inversion of 64 samples, ms",
    ]
    assert len(work.targets([first])) == 6
    assert work.targets([]) == []
