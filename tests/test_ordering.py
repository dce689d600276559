import itertools

import pytest
import torch

from mintnet_triton import Ordering, OrderingError
from mintnet_triton.ordering import Order, Triangle, common_ordering

ORDERS: list[Order] = ["channel", "pixel"]
TRIANGLES: list[Triangle] = ["lower", "upper"]


def sees(order: str, out: tuple[int, int, int], inp: tuple[int, int, int]) -> bool:
    """The rule in words: may the lower-triangular output (colour, row, column) see the input?"""
    if order == "channel":
        if inp[0] != out[0]:
            return inp[0] < out[0]
        return inp[1:] <= out[1:]
    if inp[1] != out[1]:
        return inp[1] < out[1]
    if inp[2] != out[2]:
        return inp[2] < out[2]
    return inp[0] <= out[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("triangle", TRIANGLES)
@pytest.mark.parametrize("colours", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_mask_follows_the_rule(order: Order, triangle: Triangle, colours: int, size: int) -> None:
    mask = Ordering(order, triangle).conv_mask(colours, size)
    strict = Ordering(order, triangle).conv_mask(colours, size, strict=True)
    middle = size // 2
    for out, inp, row, column in itertools.product(
        range(colours), range(colours), range(size), range(size)
    ):
        here, there = (out, middle, middle), (inp, row, column)
        allowed = sees(order, here, there) if triangle == "lower" else sees(order, there, here)
        assert bool(mask[out, inp, row, column]) == allowed
        assert bool(strict[out, inp, row, column]) == (allowed and here != there)


@pytest.mark.parametrize("order", ORDERS)
def test_upper_is_lower_reversed(order: Order) -> None:
    lower, upper = (Ordering(order, triangle).conv_mask(3, 3) for triangle in TRIANGLES)
    assert torch.equal(upper, lower.flip(0, 1, 2, 3))
    shape = (3, 4, 5)
    assert torch.equal(
        Ordering(order, "upper").rank(*shape), 59 - Ordering(order, "lower").rank(*shape)
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("triangle", TRIANGLES)
def test_rank_numbers_every_variable_once(order: Order, triangle: Triangle) -> None:
    rank = Ordering(order, triangle).rank(3, 4, 5)
    assert rank.flatten().sort().values.tolist() == list(range(60))


def test_share_of_work_that_is_not_structurally_zero() -> None:
    for colours, size, order in itertools.product((1, 3, 12), (3, 5), ORDERS):
        share = Ordering(order).conv_mask(colours, size).double().mean()
        assert float(share) == pytest.approx(0.5 + 1 / (2 * colours * size**2))


def test_a_vector_has_one_order() -> None:
    assert Ordering("channel", "upper").rank(4).tolist() == [3, 2, 1, 0]
    assert Ordering("pixel", "lower").rank(4).tolist() == [0, 1, 2, 3]


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="order must be 'channel' or 'pixel', got 'row'"):
        Ordering("row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="triangle must be 'lower' or 'upper', got 'A'"):
        Ordering("pixel", "A")  # type: ignore[arg-type]


def test_mixing_orderings_raises() -> None:
    one, other = Ordering("channel"), Ordering("pixel")
    assert common_ordering(None, one, one) == one
    assert common_ordering(None) is None
    with pytest.raises(OrderingError, match=r"channel.*pixel"):
        common_ordering(one, None, other)
