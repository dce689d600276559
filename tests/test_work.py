"""The work of the kernels: what the mask leaves, what tiles plan, what the kernels do."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mintnet_triton as mint
from mintnet_triton.kernels import backend
from mintnet_triton.ordering import Order, Triangle

pytest.importorskip("triton")

from mintnet_triton.kernels import work
from mintnet_triton.kernels.gpu import configs, launching
from mintnet_triton.kernels.gpu.masked_conv import run_conv
from mintnet_triton.kernels.gpu.weights import pack

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
    for size in ((1, 1), (1, 9), (4, 3)):
        of_image = work.exact_of_image(7, 5, colours, kernel, order, triangle, *size)
        assert of_image == products(mask, size) * 7 * 5


def products(mask: torch.Tensor, size: tuple[int, int]) -> int:
    """Pairs of variables, not units, that a masked convolution of an image multiplies."""
    return int(F.conv2d(torch.ones(1, len(mask), *size), mask.float(), padding="same").sum())


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("operand", configs.OPERANDS)
@pytest.mark.parametrize("arch", sorted(configs.TABLES))
@pytest.mark.parametrize(("colours", "units", "bound"), CIFAR10)
def test_tiles_skip_what_the_mask_hides(
    colours: int, units: int, bound: float, arch: str, operand: str, triangle: str
) -> None:
    tile = configs.hidden_tile(arch, operand, colours, units, colours * units)
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
    tile = configs.hidden_tile(configs.architecture(x.device), "ieee", colours, units, channels)
    structure = (units, units, colours, 3, order, triangle)
    scheduled = work.scheduled(*structure, tile.block_n, tile.block_k)
    assert done == scheduled * tile.block_m  # six pixels are one tile


@pytest.mark.skipif(not backend.INTERPRETED, reason="the interpreter keeps what a kernel declares")
@pytest.mark.parametrize("half", [False, True])
def test_kernels_declare_their_work(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    colours, units, size, samples, kernels = 3, 5, (3, 4), 2, (1, 3, 5)
    declared = []
    launch = launching.launch

    def note(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        declared.append(kernel.kwargs["launch_metadata"](None, None, values))
        tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert declared[-1]["bytes"] == size
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(launching, "launch", note)
    layer = mint.MintLayer(colours, size, units, "upper", kernel_size=kernels)
    x = torch.randn(samples, colours, *size, requires_grad=True)
    with mint.use_backend("triton"):
        with torch.autocast("cpu", torch.float16, enabled=half):
            y, log_det = layer(x)
        (y.sum() + log_det.sum()).backward()
    ordering = mint.Ordering("channel", "upper")
    pairs = [products(ordering.conv_mask(colours, kernel), size) for kernel in kernels]
    own = colours * units**2 * size[0] * size[1]
    first, middle, last = units * pairs[0], units**2 * pairs[1], units * pairs[2]
    expected = [
        ("masked_conv 3x1->3x5", first),
        ("middle 3x5->3x5", middle + own),
        ("output 3x5->3x1", last),
        ("hidden_gradient 3x1->3x5", last + own),
        ("hidden_gradient 3x5->3x5", middle + own),
        ("output 3x5->3x1", first),
        ("weight_gradient 3x1->3x5", first),
        ("weight_gradient 3x5->3x5", middle),
        ("weight_gradient 3x5->3x1", last),
        ("weight_gradient 3x5->3x5", own),
    ]
    flops = "flops16" if half else "flops32"
    assert [(one["name"], one[flops]) for one in declared] == [
        (name, 2 * samples * count) for name, count in expected
    ]


def test_padding_keeps_rows_aligned() -> None:
    assert [launching.padded(channels) for channels in (1, 16, 17, 255)] == [16, 16, 32, 256]
