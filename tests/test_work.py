"""The work of the kernels: what the mask leaves, what tiles plan, what the kernels do."""

import pytest
import torch

import mintnet_triton as mint
from mintnet_triton.kernels import backend
from mintnet_triton.ordering import Order, Triangle

pytest.importorskip("triton")

from mintnet_triton.kernels import _configs, _launch, work
from mintnet_triton.kernels.masked_conv import run_conv
from mintnet_triton.kernels.weights import pack

CIFAR10 = [(3, 85, 1.25), (12, 21, 1.35), (48, 5, 1.35)]


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize(("colours", "kernel"), [(1, 3), (3, 3), (4, 5), (5, 1)])
def test_exact_work_is_what_the_mask_leaves(
    order: Order, triangle: Triangle, colours: int, kernel: int
) -> None:
    mask = mint.Ordering(order, triangle).conv_mask(colours, kernel)
    left = int(mask.sum()) * 7 * 5
    assert work.exact(7, 5, colours, kernel, order, triangle) == left
    assert work.dense(7, 5, colours, kernel) == mask.numel() * 7 * 5


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("operand", _configs.OPERANDS)
@pytest.mark.parametrize("arch", sorted(_configs.TABLES))
@pytest.mark.parametrize(("colours", "units", "bound"), CIFAR10)
def test_tiles_skip_what_the_mask_hides(
    colours: int, units: int, bound: float, arch: str, operand: str, triangle: str
) -> None:
    tile = _configs.hidden_tile(arch, operand, colours, units, colours * units)
    structure = (units, units, colours, 3, "channel", triangle)
    scheduled = work.scheduled(*structure, tile.block_n, tile.block_k)
    assert scheduled <= bound * work.exact(*structure)


@pytest.mark.skipif(
    not backend.INTERPRETED, reason="multiplications are counted in the interpreter"
)
@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize(("colours", "units"), [(3, 85), (12, 21), (4, 5)])
def test_kernels_do_the_scheduled_work(
    colours: int, units: int, order: Order, triangle: Triangle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    done = 0
    create_dot = InterpreterBuilder.create_dot

    def count(self: object, a: object, b: object, *rest: object) -> object:
        nonlocal done
        (m, k), (_, n) = a.data.shape, b.data.shape  # type: ignore[attr-defined]
        done += m * n * k
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    channels = colours * units
    x = torch.randn(1, channels, 2, 3)
    out = torch.empty(1, channels, 2, 3)
    weight = pack(torch.randn(channels, channels, 3, 3), torch.float32)
    run_conv(out, x, weight, None, units, colours, order, triangle, "identity", "ieee")
    tile = _configs.hidden_tile(_configs.architecture(x.device), "ieee", colours, units, channels)
    structure = (units, units, colours, 3, order, triangle)
    scheduled = work.scheduled(*structure, tile.block_n, tile.block_k)
    assert done == scheduled * tile.block_m  # six pixels are one tile


def test_metadata_declares_flops_and_bytes() -> None:
    declare = work.metadata("middle", units_in="units", units_out="units", own=True)
    h = torch.empty(10, 16, dtype=torch.float16)
    weight = torch.empty(9, 6, 16, dtype=torch.float16)
    arguments = {
        "h1": h, "h2": h, "weight": weight, "samples": 2, "height": 1, "width": 5, "units": 2,
        "colours": 3, "KERNEL": 3, "ORDER": "channel", "TRIANGLE": "lower",
    }  # fmt: skip
    declared = declare(None, None, arguments)
    mask = mint.Ordering("channel", "lower").conv_mask(3, 3)
    left = int(mask.sum()) * 2 * 2 + 3 * 2 * 2
    assert declared["flops16"] == 2 * left * 10
    assert declared["bytes"] == 2 * (2 * h.numel() + weight.numel())
    assert "3x2" in declared["name"]


def test_padding_keeps_rows_aligned() -> None:
    assert [_launch.padded(channels) for channels in (1, 16, 17, 255)] == [16, 16, 32, 256]
