"""The convolution kernels against the torch twin, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mintnet_triton.kernels import reference
from mintnet_triton.kernels.activation import NAMES, find_activation
from mintnet_triton.kernels.gpu import configs, launching, masked_conv
from mintnet_triton.kernels.gpu.weights import pack
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


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("numbers", ["float64", "float32", "float16"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_activation_and_bias_per_sample(
    activation: str, numbers: str, per_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(mask(3, 2, 7, 3, ORDERINGS[0]), numbers)
    x = random(3, 6, 3, 4, numbers=numbers)
    bias = 3 * random(3, 21) if per_sample else 3 * random(21)
    bias = bias.to(weight.dtype)
    with grid.guarded(monkeypatch):
        packed = pack(weight, weight.dtype)
        y = masked_conv.conv_op(x, packed, bias, 2, 3, *ORDERINGS[0], activation)
    exact = reference.masked_conv2d(x.double(), weight.double(), None, 3, *ORDERINGS[0])
    exact = exact + bias.double().view(-1, 21, 1, 1)
    expected = find_activation(activation).function(exact)
    grid.assert_near("h", y, expected, grid.TOLERANCES[numbers])


@pytest.mark.parametrize("numbers", ["float64", "float32", "float16"])
def test_channels_beyond_the_outputs_become_zeros(
    numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(mask(3, 2, 7, 3, ORDERINGS[0]), numbers)
    x = random(2, 6, 3, 4, numbers=numbers)
    bias = random(21, numbers=numbers)
    out = x.new_full((2, 40, 3, 4), float("nan"))
    with grid.guarded(monkeypatch):
        packed = pack(weight, weight.dtype)
        masked_conv.run_conv(
            out, x, packed, bias, 2, 3, *ORDERINGS[0], activation="sigmoid", precision="ieee"
        )
    assert bool((out[:, 21:] == 0).all())
    exact = reference.masked_conv2d(x.double(), weight.double(), None, 3, *ORDERINGS[0])
    expected = (exact + bias.double().view(-1, 1, 1)).sigmoid()
    grid.assert_near("h", out[:, :21], expected, grid.TOLERANCES[numbers])


def test_an_empty_batch() -> None:
    weight = random_weight(mask(3, 2, 2, 3, ORDERINGS[0])).requires_grad_()
    x, bias = random(0, 6, 3, 4).requires_grad_(), random(6).requires_grad_()
    y = masked_conv.masked_conv2d(x, weight, bias, 3, *ORDERINGS[0])
    assert y.shape == (0, 6, 3, 4)
    gradients = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert gradients[0].shape == x.shape
    assert not bool(gradients[1].any())
    assert not bool(gradients[2].any())


def test_no_gradient_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(mask(1, 2, 2, 1, ORDERINGS[0]))
    x = random(1, 2, 2, 2)
    for wanted, kernel in ((x, "masked_conv_kernel"), (weight, "weight_gradient_kernel")):
        wanted.requires_grad_()
        y = masked_conv.masked_conv2d(x, weight, None, 1, *ORDERINGS[0])
        with grid.guarded(monkeypatch) as launched:
            y.sum().backward()
        assert launched == [kernel]
        wanted.requires_grad_(False)


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize(
    ("colours", "units", "dtype"), [(3, 85, torch.float16), (4, 20, torch.float32)]
)
def test_hidden_inputs_are_not_read(
    ordering: Any, colours: int, units: int, dtype: torch.dtype
) -> None:
    """A tile reads, at each tap, no more than the mask leaves, rounded out to whole blocks."""
    left = mask(colours, units, units, 3, ordering)
    weight = random_weight(left).to(dtype)
    x = random(1, colours * units, 3, 3).to(dtype)
    packed = pack(weight, dtype)
    arch = configs.architecture(x.device)
    tile = configs.hidden_tile(arch, configs.operand(dtype, "ieee"), colours, units, x.shape[1])
    expected = reference.masked_conv2d(x.double(), weight.double(), None, colours, *ordering)
    poisoned = 0
    for start in range(0, colours * units, tile.block_n):
        rows = slice(start, start + tile.block_n)
        seen = left[rows].any(0)  # (inputs, 3, 3)
        readable = torch.zeros_like(seen)
        for row in range(3):
            for column in range(3):
                inputs = seen[:, row, column].nonzero()
                if len(inputs):
                    low = int(inputs.min()) // tile.block_k * tile.block_k
                    high = -(-int(inputs.max() + 1) // tile.block_k) * tile.block_k
                    readable[low:high, row, column] = True
        poisoned += int((~readable).sum())
        y = masked_conv.conv_op(
            x.masked_fill(~readable, float("nan")),
            packed, None, units, colours, *ordering, "identity",
        )  # fmt: skip
        grid.assert_near("centre", y[0, rows, 1, 1], expected[0, rows, 1, 1], 5e-3)
    assert poisoned > 0


@pytest.mark.parametrize("ordering", ORDERINGS[:2])
def test_hidden_tiles_of_the_gradient_are_not_computed(ordering: Any) -> None:
    colours, units, kernel = 3, 40, 1
    left = mask(colours, units, units, kernel, ordering)
    x, by_y = random(1, 120, 1, 1, numbers="float32"), random(1, 120, 1, 1, numbers="float32")
    hidden = x.new_zeros(120, dtype=torch.bool)
    hidden[80:] = ordering[1] == "lower"
    hidden[:40] = ordering[1] == "upper"
    poisoned = x.masked_fill(hidden.view(-1, 1, 1), float("nan"))
    by_weight = masked_conv.weight_gradient_op(by_y, poisoned, 3, 1, *ordering, torch.float32)
    # Tiles that hold no unit of the last (first) colour see nothing of it.
    arch = configs.architecture(x.device)
    tile = configs.gradient_tile(arch, "ieee", 120, 120)
    for row in range(0, 120, tile.block_n):
        for column in range(0, 120, tile.block_k):
            block = slice(row, row + tile.block_n), slice(column, column + tile.block_k)
            if not bool(left[block].any()):
                assert not bool(by_weight[block].any())
    assert launching.accumulator(torch.float32) == by_weight.dtype


@pytest.mark.parametrize(
    ("colours", "ordering"),
    [*((1, ordering) for ordering in ORDERINGS), *((3, ordering) for ordering in ORDERINGS[2:])],
)
def test_hidden_taps_of_the_gradient_are_not_computed(colours: int, ordering: Any) -> None:
    units = 5  # a tile reaches beyond the inputs
    x, by_y = (random(2, colours * units, 3, 4, numbers="float32") for _ in range(2))
    seen = mask(colours, units, units, 3, ordering).any(0).any(0)
    by_weight = masked_conv.weight_gradient_op(by_y, x, colours, 3, *ordering, torch.float32)
    assert int((~seen).sum()) == 4
    assert bool((by_weight[:, :, ~seen] == 0).all())
    assert bool(by_weight[:, :, seen].flatten(0, 1).any(0).all())
