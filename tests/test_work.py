"""The work of the kernels: what the mask leaves, what tiles plan, what the kernels do."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mintnet_triton as mint
from mintnet_triton.kernels import backend
from mintnet_triton.ordering import Order, Triangle

pytest.importorskip("triton")

from bench.contest import cases
from mintnet_triton.kernels import work
from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.gpu import configs, launching, masked_conv

#: what the tiles may multiply, of what the mask leaves: wide ones have less to do beside
CIFAR10 = list(zip(cases.CIFAR10, (1.5, 1.7, 1.7), strict=True))


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
@pytest.mark.parametrize(("scale", "bound"), CIFAR10, ids=str)
def test_tiles_skip_what_the_mask_hides(
    scale: cases.Scale, bound: float, arch: str, operand: str, triangle: str
) -> None:
    colours, units, size = scale
    places = 32 * size * Canvas(size, size, 1).pitch  # of the paper's batch
    blocks = configs.hidden_tile(arch, operand, colours, units, units, places).blocks
    structure = (units, units, colours, 3, "channel", triangle)
    scheduled = work.scheduled(*structure, blocks.outputs, blocks.inputs)
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
    x, weight = torch.randn(1, channels, 2, 3), torch.randn(channels, channels, 3, 3)
    masked_conv.conv_op(x, weight, None, colours, [order, triangle], torch.float32, False)
    places = 2 * Canvas(2, 3, 1).pitch
    blocks = configs.hidden_tile("sm_90", "ieee", colours, units, units, places).blocks
    structure = (units, units, colours, 3, order, triangle)
    scheduled = work.scheduled(*structure, blocks.outputs, blocks.inputs)
    assert done == scheduled * blocks.places  # all places are one tile


@pytest.mark.skipif(not backend.INTERPRETED, reason="the interpreter keeps what a kernel declares")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kernels", [(1, 3, 5), (3, 1, 3)])
def test_kernels_declare_their_work(
    kernels: tuple[int, int, int], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours, units, size, samples = 3, 5, (3, 4), 2
    declared = []
    launch = launching.launch

    def note(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        metadata = kernel.kwargs.get("launch_metadata")
        if metadata is not None:
            declared.append(metadata(None, None, values))
            tensors = launching.tensors_in(arguments)
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
    area = size[0] * size[1]
    own = colours * units**2 * area
    first, middle, last = units * pairs[0], units**2 * pairs[1], units * pairs[2]
    # By columns, a colour sees all taps of the colours that it sees.
    taps, taps_out = kernels[0] ** 2, kernels[2] ** 2
    columns, columns_out = (6 * taps * units * area for taps in (taps, taps_out))
    outer = [(f"weight_gradient 3x{taps}->3x5", 2 * columns)]
    if taps != taps_out:
        outer = [
            (f"weight_gradient 3x{taps}->3x5", columns),
            (f"weight_gradient 3x{taps_out}->3x5", columns_out),
        ]
    expected = [
        (f"hidden 3x{taps}->3x5", columns),
        ("hidden 3x5->3x5", middle + own),
        ("output 3x5->3x1", last),
        (f"hidden 3x{taps_out}->3x5", columns_out + own),
        ("hidden 3x5->3x5", middle + own),
        ("output 3x5->3x1", first),
        ("weight_gradient 3x5->3x5", middle + own),
        *outer,
    ]
    flops = "flops16" if half else "flops32"
    assert [(one["name"], one[flops]) for one in declared] == [
        (name, 2 * samples * count) for name, count in expected
    ]


def test_padding_keeps_rows_aligned() -> None:
    assert [launching.padded(channels) for channels in (1, 16, 17, 255)] == [16, 16, 32, 256]
