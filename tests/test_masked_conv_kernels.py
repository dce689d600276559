"""The convolution kernels against the torch twin, in float64."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mintnet_triton.kernels import reference
from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.gpu import configs, launching, masked_conv
from mintnet_triton.kernels.gpu.canvas import TAIL
from mintnet_triton.ordering import Order, Ordering, Triangle
from tests import grid

ORDERINGS: list[tuple[Order, Triangle]] = [
    ("channel", "lower"),
    ("channel", "upper"),
    ("pixel", "lower"),
    ("pixel", "upper"),
]


def affordable(case: grid.Case) -> bool:
    """At most 255 channels, and few products: the interpreter is slow."""
    colours, inputs, outputs = (case.get(name, 1) for name in ("colours", "inputs", "outputs"))
    products = colours**2 * inputs * outputs * case.get("kernel", 1) ** 2
    most = 100_000 if case.get("numbers") == "float64" else 600_000
    return colours * max(inputs, outputs) <= 255 and (grid.FULL or products <= most)


def mask(colours: int, inputs: int, outputs: int, kernel: int, ordering: Any) -> Tensor:
    """The mask of a weight, shaped like it."""
    by_colour = Ordering(*ordering).conv_mask(colours, kernel).to(grid.DEVICE)
    return by_colour.repeat_interleave(outputs, 0).repeat_interleave(inputs, 1)


def random(*shape: int, numbers: str = "float64") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(grid.DEVICE, grid.dtype_of(numbers))


def random_weight(left: Tensor, numbers: str = "float64") -> Tensor:
    """A masked weight whose outputs are about 1."""
    weight = random(*left.shape) * left / left.sum((1, 2, 3), keepdim=True).sqrt()
    return weight.to(grid.dtype_of(numbers))


@grid.over(
    affordable,
    main=["colours", "inputs", "outputs", "kernel", "ordering", "numbers"],
    colours=[1, 3, 4, 12],
    inputs=[1, 5, 16, 45, 85],
    outputs=[1, 5, 16, 45, 85],
    kernel=[1, 3, 5],
    ordering=ORDERINGS,
    numbers=["float64", "float32", "tf32", "float16"],
    size=[(1, 1), (3, 5), (7, 4), (1, 9)],
    batch=[1, 3],
    layout=grid.LAYOUTS,
    upstream=grid.LAYOUTS,
    bias=[True, False],
)
def test_convolution_and_its_gradients(case: grid.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    colours, inputs, outputs, kernel = list(case.values())[:4]
    ordering, numbers, tolerance = (
        case["ordering"],
        case["numbers"],
        grid.TOLERANCES[case["numbers"]],
    )
    left = mask(colours, inputs, outputs, kernel, ordering)
    weight = random_weight(left, numbers).requires_grad_()
    bias = random(colours * outputs, numbers=numbers).requires_grad_() if case["bias"] else None
    shape = (case["batch"], colours * inputs, *case["size"])
    x = grid.laid_out(random(*shape, numbers=numbers), case["layout"]).requires_grad_()
    by_y = random(case["batch"], colours * outputs, *case["size"], numbers=numbers)
    by_y = grid.laid_out(by_y, case["upstream"])
    arguments = [x, weight] if bias is None else [x, weight, bias]

    with grid.guarded(monkeypatch), grid.precision_of(numbers):
        y = masked_conv.masked_conv2d(x, weight, bias, colours, *ordering)
        gradients = torch.autograd.grad(y, arguments, by_y)
    twins = [tensor.detach().double().requires_grad_() for tensor in arguments]
    exact = reference.masked_conv2d(twins[0], twins[1], None, colours, *ordering)
    if bias is not None:
        exact = exact + twins[2].view(-1, 1, 1)
    expected = torch.autograd.grad(exact, twins, by_y.double())

    assert y.dtype == x.dtype
    grid.assert_near("y", y, exact, tolerance)
    grid.assert_near("gradient by x", gradients[0], expected[0], tolerance)
    assert bool(gradients[1].isfinite().all())
    grid.assert_near("gradient by weight", gradients[1][left], expected[1][left], tolerance)
    if bias is not None:
        grid.assert_near("gradient by bias", gradients[2], expected[2], tolerance)


@pytest.mark.parametrize("numbers", ["float64", "float32", "float16"])
@pytest.mark.parametrize("ordering", ORDERINGS[:2])
def test_many_pixels(numbers: str, ordering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of pixels, some across two samples, and several parts of the gradient."""
    left = mask(2, 3, 2, 3, ordering)
    weight = random_weight(left, numbers).requires_grad_()
    size = (19, 31) if numbers == "float16" else (11, 13)
    x = random(2, 6, *size, numbers=numbers).requires_grad_()
    by_y = random(2, 4, *size, numbers=numbers)
    with grid.guarded(monkeypatch):
        y = masked_conv.masked_conv2d(x, weight, None, 2, *ordering)
        gradients = torch.autograd.grad(y, [x, weight], by_y)
    twins = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    exact = reference.masked_conv2d(twins[0], twins[1], None, 2, *ordering)
    expected = torch.autograd.grad(exact, twins, by_y.double())
    tolerance = grid.TOLERANCES[numbers]
    grid.assert_near("y", y, exact, tolerance)
    grid.assert_near("gradient by x", gradients[0], expected[0], tolerance)
    grid.assert_near("gradient by weight", gradients[1][left], expected[1][left], tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_bfloat16(ordering: Any) -> None:
    left = mask(3, 16, 16, 3, ordering)
    weight = random_weight(left, "bfloat16").requires_grad_()
    x = random(2, 48, 7, 5, numbers="bfloat16").requires_grad_()
    y = masked_conv.masked_conv2d(x, weight, None, 3, *ordering)
    by_y = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, weight], by_y)
    twins = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    exact = reference.masked_conv2d(twins[0], twins[1], None, 3, *ordering)
    expected = torch.autograd.grad(exact, twins, by_y.double())
    tolerance = grid.TOLERANCES["bfloat16"]
    grid.assert_near("y", y, exact, tolerance)
    grid.assert_near("gradient by x", gradients[0], expected[0], tolerance)
    grid.assert_near("gradient by weight", gradients[1][left], expected[1][left], tolerance)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize(
    ("colours", "size"), [(3, (2, 3)), (2, (1, 1)), (17, (3, 2)), (16, (5, 1))]
)
@pytest.mark.parametrize(("kernel", "columns"), [(1, False), (3, False), (3, True), (5, True)])
def test_a_canvas_holds_an_image_and_zeros(
    colours: int, size: Any, kernel: int, columns: bool, layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x = grid.laid_out(random(3, colours, *size), layout)
    with grid.guarded(monkeypatch):
        out, canvas = masked_conv.to_canvas(x, kernel, torch.float64, columns)
    assert canvas == Canvas(size[0], size[1], kernel // 2)
    assert out.shape == (canvas.positions(3) + TAIL, out.shape[1])
    assert out.shape[1] % configs.ALIGN == 0
    expected = x
    if columns:
        expected = F.unfold(x, kernel, padding=kernel // 2).view(3, -1, *size)
    rest = out.clone()
    for sample, row, column in product(range(3), *map(range, size)):
        place = canvas.place(sample, row, column)
        channels = expected.shape[1]
        assert torch.equal(out[place, :channels], expected[sample, :, row, column])
        rest[place, :channels] = 0
    assert not bool(rest.any())  # nor is any of it NaN


@pytest.mark.parametrize(("colours", "inputs", "kernel"), [(3, 2, 3), (2, 9, 3), (4, 4, 1)])
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_what_the_mask_hides_of_a_weight_is_not_used(
    colours: int, inputs: int, kernel: int, ordering: Any
) -> None:
    left = mask(colours, inputs, 3, kernel, ordering)
    weight, x = random_weight(left), random(2, colours * inputs, 2, 3)
    results = []
    for given in (weight, weight.masked_fill(~left, float("nan"))):
        x.requires_grad_()
        y = masked_conv.masked_conv2d(x, given, None, colours, *ordering)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_empty_batch() -> None:
    weight = random_weight(mask(3, 2, 2, 3, ORDERINGS[0])).requires_grad_()
    x, bias = random(0, 6, 3, 4).requires_grad_(), random(6).requires_grad_()
    y = masked_conv.masked_conv2d(x, weight, bias, 3, *ORDERINGS[0])
    assert y.shape == (0, 6, 3, 4)
    gradients = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert gradients[0].shape == x.shape
    assert not bool(gradients[1].any())
    assert not bool(gradients[2].any())


@pytest.mark.parametrize("colours", [2, 16])
def test_no_gradient_that_is_not_asked_for(colours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(mask(colours, 1, 1, 1, ORDERINGS[0]))
    x = random(1, colours, 2, 2)
    by_x = ["pack_conv_kernel", "columns_kernel", "hidden_kernel", "image_kernel"]
    by_weight = ["columns_kernel", "columns_kernel", "weight_gradient_kernel"]
    for wanted, kernels in ((x, by_x), (weight, by_weight)):
        wanted.requires_grad_()
        y = masked_conv.masked_conv2d(x, weight, None, colours, *ORDERINGS[0])
        with grid.guarded(monkeypatch) as launched:
            y.sum().backward()
        assert launched == kernels
        wanted.requires_grad_(False)


@pytest.mark.parametrize(
    ("colours", "units", "dtype", "ordering"),
    grid.thinned(
        (
            (*layer, ordering)
            for layer in ((3, 85, torch.float16), (4, 20, torch.float32))
            for ordering in ORDERINGS
        ),
        kept=[
            (3, 85, torch.float16, ORDERINGS[0]),
            *((4, 20, torch.float32, ordering) for ordering in ORDERINGS),
        ],
    ),
)
def test_hidden_inputs_are_not_read(
    colours: int, units: int, dtype: torch.dtype, ordering: Any
) -> None:
    """A tile reads, at each tap, no more than the mask leaves, rounded out to whole blocks."""
    left = mask(colours, units, units, 3, ordering)
    weight = random_weight(left).to(dtype)
    x = random(1, colours * units, 3, 3).to(dtype)
    blocks = hidden_blocks(x, dtype, colours, units, units)
    expected = reference.masked_conv2d(x.double(), weight.double(), None, colours, *ordering)
    poisoned = 0
    for start in range(0, colours * units, blocks.outputs):
        rows = slice(start, start + blocks.outputs)
        seen = left[rows].any(0)  # (inputs, 3, 3)
        readable = torch.zeros_like(seen)
        for row, column in product(range(3), repeat=2):
            inputs = seen[:, row, column].nonzero()
            if len(inputs):
                low = int(inputs.min()) // blocks.inputs * blocks.inputs
                high = launching.padded(int(inputs.max()) + 1, blocks.inputs)
                readable[low:high, row, column] = True
        poisoned += int((~readable).sum())
        y = masked_conv.conv_op(
            x.masked_fill(~readable, float("nan")), weight, None, colours, ordering, dtype, False
        )
        grid.assert_near("centre", y[0, rows, 1, 1], expected[0, rows, 1, 1], 5e-3)
    assert poisoned > 0


def hidden_blocks(
    x: Tensor, dtype: torch.dtype, colours: int, units: int, units_in: int
) -> configs.Blocks:
    """The tile of a 3 x 3 convolution of x."""
    samples, _, height, width = x.shape
    return configs.hidden_tile(
        configs.architecture(x.device), launching.operand(dtype), colours, units, units_in,
        samples * height * Canvas(height, width, 1).pitch,
    ).blocks  # fmt: skip


@pytest.mark.parametrize("triangle", ["lower", "upper"])
def test_hidden_columns_are_not_read(triangle: Triangle) -> None:
    """By columns, too: of few channels in channel order."""
    colours, units = 12, 21
    ordering: Any = ("channel", triangle)
    weight = random_weight(mask(colours, 1, units, 3, ordering), "float32")
    x = random(1, colours, 2, 3, numbers="float32")
    blocks = hidden_blocks(x, x.dtype, colours, units, 9)
    expected = reference.masked_conv2d(x.double(), weight.double(), None, colours, *ordering)
    poisoned = 0
    for start in range(0, colours * units, blocks.outputs):
        rows = slice(start, start + blocks.outputs)
        first, last = start // units, min(start + blocks.outputs - 1, colours * units - 1) // units
        low, high = (0, last + 1) if triangle == "lower" else (first, colours)
        low = low * 9 // blocks.inputs * blocks.inputs
        high = launching.padded(high * 9, blocks.inputs)
        unread = [not low < 9 * colour + 9 <= high + 8 for colour in range(colours)]
        hidden = torch.tensor(unread, device=x.device).view(-1, 1, 1)
        poisoned += int(hidden.sum())
        y = masked_conv.conv_op(
            x.masked_fill(hidden, float("nan")), weight, None, colours, ordering, x.dtype, False
        )
        grid.assert_near("y", y[0, rows], expected[0, rows], 1e-5)
    assert poisoned > 0


@pytest.mark.parametrize("ordering", ORDERINGS[:2])
def test_hidden_tiles_of_the_gradient_are_not_computed(ordering: Any) -> None:
    colours, units = 3, 64
    channels = colours * units
    left = mask(colours, units, units, 1, ordering)
    x, by_y = (random(1, channels, 1, 1, numbers="float32") for _ in range(2))
    arguments = (colours, 1, ordering, torch.float32)
    expected = masked_conv.weight_gradient_op(by_y, x, *arguments)
    arch = configs.architecture(x.device)
    blocks = configs.gradient_plan(arch, "ieee", channels, channels, 1, 2).tile.blocks
    hidden_tiles = 0
    for row in range(0, channels, blocks.outputs):
        rows = slice(row, row + blocks.outputs)
        seen = left[rows].any(0).flatten()
        for column in range(0, channels, blocks.inputs):
            columns = slice(column, column + blocks.inputs)
            if not bool(seen[columns].any()):
                hidden_tiles += 1
                assert not bool(expected[rows, columns].any())
                poisoned = x.clone()
                poisoned[:, columns] = float("nan")
                by_weight = masked_conv.weight_gradient_op(by_y, poisoned, *arguments)
                assert torch.equal(by_weight[rows], expected[rows])
    assert hidden_tiles > 0
    assert expected.dtype == launching.accumulator(torch.float32)


@pytest.mark.parametrize(
    ("colours", "ordering"),
    [*((1, ordering) for ordering in ORDERINGS), *((3, ordering) for ordering in ORDERINGS[2:])],
)
def test_hidden_taps_of_the_gradient_are_not_computed(colours: int, ordering: Any) -> None:
    units = 18 // colours  # not by columns; a tile reaches beyond the inputs
    x, by_y = (random(2, colours * units, 3, 4, numbers="float32") for _ in range(2))
    # Three taps side by side are computed together.
    seen = mask(colours, units, units, 3, ordering).any(0).any(0).any(1)
    by_weight = masked_conv.weight_gradient_op(by_y, x, colours, 3, ordering, torch.float32)
    assert int((~seen).sum()) == 1
    assert bool((by_weight[:, :, ~seen] == 0).all())
    assert bool(by_weight[:, :, seen].flatten(0, 1).any(0).all())
