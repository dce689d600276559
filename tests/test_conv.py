import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mintnet_triton import MaskedConv2d, Ordering
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


def test_hidden_colours_are_skipped_not_multiplied_by_zero() -> None:
    for colours, share in ((1, 1.0), (2, 3 / 4), (3, 2 / 3), (4, 5 / 8), (12, 5 / 8)):
        conv = MaskedConv2d(2 * colours, 2 * colours, 3, colours=colours)
        with FlopCounterMode(display=False) as flops:
            conv(torch.randn(1, 2 * colours, 5, 5))
        dense = 2 * (2 * colours) ** 2 * 9 * 25
        assert flops.get_total_flops() == pytest.approx(share * dense)


@pytest.mark.parametrize("assign", [False, True])
def test_masks_survive_construction_on_the_meta_device(assign: bool) -> None:
    conv = MaskedConv2d(4, 4, 3, colours=2, order="pixel", triangle="upper")
    with torch.device("meta"):
        other = MaskedConv2d(4, 4, 3, colours=2, order="pixel", triangle="upper")
    if not assign:
        other = other.to_empty(device="cpu")
    other.load_state_dict(conv.state_dict(), assign=assign)
    assert torch.equal(other.mask, conv.mask)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(other(x), conv(x))
    assert set(conv.state_dict()) == {"weight", "bias"}
