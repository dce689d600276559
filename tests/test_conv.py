import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mintnet_triton import MaskedConv2d, Ordering
from mintnet_triton.checks import NonFiniteError, check_finite
from mintnet_triton.kernels import reference
from mintnet_triton.ordering import Order, Triangle


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("colours", "size"), [(1, 3), (3, 5), (5, 3), (6, 1)])
def test_outputs_see_only_what_they_may(
    order: Order, triangle: Triangle, strict: bool, colours: int, size: int
) -> None:
    conv = MaskedConv2d(
        2 * colours,
        3 * colours,
        size,
        colours=colours,
        triangle=triangle,
        order=order,
        strict=strict,
    ).double()
    shape = (colours, 3, 4)
    x = torch.randn(2 * colours, 3, 4, dtype=torch.float64)
    matrix = torch.as_tensor(
        torch.autograd.functional.jacobian(lambda v: conv(v[None])[0], x, vectorize=True)
    )
    rank = Ordering(order, triangle).rank(*shape)
    outputs = rank.repeat_interleave(3, 0).reshape(-1, 1)
    inputs = rank.repeat_interleave(2, 0).reshape(1, -1)
    allowed = inputs < outputs if strict else inputs <= outputs
    matrix = matrix.reshape(allowed.shape)
    assert float(matrix[~allowed].abs().sum()) == 0
    # Nothing more is hidden: the nearest allowed variables do matter.
    dense = F.conv2d(torch.zeros_like(x)[None], torch.ones_like(conv.weight), padding="same")
    assert dense.shape[1] == 3 * colours
    assert int((matrix != 0).sum()) == _visible(conv, shape)


def _visible(conv: MaskedConv2d, shape: tuple[int, int, int]) -> int:
    """How many (output, input) pairs the mask joins inside the image, both of every unit."""
    ones = torch.ones(1, shape[0], *shape[1:], dtype=torch.float64)
    seen = F.conv2d(ones, conv.mask.double(), padding="same")
    return int(seen.sum()) * 2 * 3


@pytest.fixture
def blocks_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are some in the smallest convolutions."""
    for name, value in {"VECTOR": 1, "COPY": 0, "START": 0}.items():
        monkeypatch.setattr(reference, name, value)


@pytest.mark.usefixtures("blocks_cost_nothing")
@pytest.mark.parametrize("colours", [2, 3, 4, 5, 7, 12])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("bias", [True, False])
def test_skipped_blocks_change_nothing(colours: int, triangle: Triangle, bias: bool) -> None:
    conv = MaskedConv2d(
        2 * colours, 3 * colours, 3, colours=colours, triangle=triangle, bias=bias
    ).double()
    x = torch.randn(2, 2 * colours, 5, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3 * colours, 5, 4, dtype=torch.float64)
    inputs = [x, *conv.parameters()]
    dense = F.conv2d(x, conv.masked_weight(), conv.bias, padding="same")
    blocked = conv(x)
    torch.testing.assert_close(blocked, dense, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(blocked, inputs, upstream),
        torch.autograd.grad(dense, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_masked_weights_get_no_gradient() -> None:
    conv = MaskedConv2d(3, 3, 3, colours=3)
    conv(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert conv.weight.grad is not None
    assert float(conv.weight.grad[~conv.mask].abs().sum()) == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"kernel_size must be odd.*got 4"):
        MaskedConv2d(2, 2, 4)
    with pytest.raises(ValueError, match="out_channels must be a multiple of colours=3, got 4"):
        MaskedConv2d(3, 4, 3, colours=3)
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        MaskedConv2d(0, 4, 3)
    with pytest.raises(TypeError, match=r"kernel_size must be an integer, got 3\.0"):
        MaskedConv2d(3, 3, 3.0)  # type: ignore[arg-type]
    conv = MaskedConv2d(3, 3, 3)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 3, any, any\), got"):
        conv(torch.randn(2, 4, 5, 5))
    assert "colours=1, triangle='lower'" in repr(conv)


def share_of_dense(conv: MaskedConv2d, x: torch.Tensor) -> float:
    """Flops of a call, of those of a dense convolution."""
    with FlopCounterMode(display=False) as flops:
        conv(x)
    return float(flops.get_total_flops()) / (2 * conv.weight.numel() * x[:, 0].numel())


@pytest.mark.usefixtures("blocks_cost_nothing")
def test_hidden_colours_are_skipped_not_multiplied_by_zero() -> None:
    for colours, share in ((1, 1.0), (2, 3 / 4), (3, 2 / 3), (4, 5 / 8), (12, 5 / 8)):
        conv = MaskedConv2d(2 * colours, 2 * colours, 3, colours=colours)
        x = torch.randn(1, 2 * colours, 5, 5)
        assert share_of_dense(conv, x) == pytest.approx(share)


@pytest.mark.parametrize(
    ("colours", "inputs", "outputs", "shape", "share"),
    [
        (3, 85, 85, (8, 32, 32), 2 / 3),
        (12, 21, 21, (1, 16, 16), 5 / 8),
        (48, 5, 5, (8, 8, 8), 2 / 3),
        (48, 5, 5, (1, 8, 8), 1),  # too few pixels
        (4, 11, 11, (32, 14, 14), 1),  # too few channels
        (16, 2, 2, (64, 7, 7), 1),
        (3, 85, 1, (8, 32, 32), 1),  # few outputs
        (3, 1, 85, (8, 32, 32), 1),  # few inputs
        (1, 256, 256, (8, 16, 16), 1),
    ],
)
def test_hidden_colours_are_skipped_where_that_is_faster(
    colours: int, inputs: int, outputs: int, shape: tuple[int, int, int], share: float
) -> None:
    conv = MaskedConv2d(colours * inputs, colours * outputs, 3, colours=colours).to("meta")
    x = torch.empty(shape[0], colours * inputs, *shape[1:], device="meta")
    assert share_of_dense(conv, x) == pytest.approx(share)


@pytest.mark.parametrize("assign", [False, True])
def test_masks_survive_construction_on_the_meta_device(assign: bool) -> None:
    conv = MaskedConv2d(4, 4, 3, colours=2, order="pixel", triangle="upper")
    with torch.device("meta"):
        other = MaskedConv2d(4, 4, 3, colours=2, order="pixel", triangle="upper")
    if not assign:
        other = other.to_empty(device="cpu")
    other.load_state_dict(conv.state_dict(), assign=assign)
    assert torch.equal(other.masked_weight(), conv.masked_weight())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(other(x), conv(x))
    assert set(conv.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_finite_is_taken_even_if_its_sum_is_not(dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 8, 8), torch.finfo(dtype).max, dtype=dtype)
    check_finite("x", x)
    x[0, 0, 2, 3], x[0, 0, 7, 7] = torch.inf, -torch.inf
    with pytest.raises(NonFiniteError, match=r"0 NaN and 2 infinite .* index \(0, 0, 2, 3\)"):
        check_finite("x", x)
    check_finite("x", x[:0])
