"""The work of a kernel: what the mask leaves, what the tiles do, and the bytes that must move.

Every kernel declares its own to Triton's profiler as launch metadata. One multiply-add is two
flops. A kernel is judged by the *exact* multiply-adds, those that the mask leaves; the *scheduled*
ones, counted with the very functions that give the kernel its ranges, say how much the tiles
waste.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mintnet_triton.kernels.ranges import first_block, seen_inputs

Metadata = Callable[[Any, Any, Mapping[str, Any]], dict[str, Any]]


def _of_tap(
    place: int, units_out: int, units_in: int, colours: int, order: str, triangle: str
) -> int:
    """Multiply-adds that the mask leaves of one tap at one pixel; its place as in seen_inputs."""
    total = 0
    for colour in range(colours):
        low, high = seen_inputs(colour, colour, units_in, colours, place, order, triangle)
        total += (high - low) * units_out
    return total


def exact(
    units_out: int, units_in: int, colours: int, kernel: int, order: str, triangle: str
) -> int:
    """Multiply-adds of a masked convolution at one pixel away from the border."""
    places = range(-(kernel**2 // 2), kernel**2 // 2 + 1)
    return sum(_of_tap(place, units_out, units_in, colours, order, triangle) for place in places)


def exact_of_image(
    units_out: int,
    units_in: int,
    colours: int,
    kernel: int,
    order: str,
    triangle: str,
    height: int,
    width: int,
) -> int:
    """Multiply-adds of a masked convolution of an image; a tap beyond the border has none."""
    offsets = range(-(kernel // 2), kernel // 2 + 1)
    return sum(
        _of_tap(dy * kernel + dx, units_out, units_in, colours, order, triangle)
        * max(0, height - abs(dy))
        * max(0, width - abs(dx))
        for dy in offsets
        for dx in offsets
    )


def scheduled(
    units_out: int,
    units_in: int,
    colours: int,
    kernel: int,
    order: str,
    triangle: str,
    block_n: int,
    block_k: int,
) -> int:
    """Multiply-adds that the tiles of a masked convolution do for one pixel."""
    total = 0
    for start in range(0, units_out * colours, block_n):
        first = min(start // units_out, colours - 1)
        last = min((start + block_n - 1) // units_out, colours - 1)
        for place in range(-(kernel**2 // 2), kernel**2 // 2 + 1):
            low, high = seen_inputs(first, last, units_in, colours, place, order, triangle)
            blocks = len(range(first_block(low, high, block_k), high, block_k))
            total += blocks * block_k * block_n
    return total


def dense(units_out: int, units_in: int, colours: int, kernel: int) -> int:
    """Multiply-adds of the same convolution without a mask."""
    return units_out * units_in * (colours * kernel) ** 2


def metadata(name: str, *, units_in: str | int, units_out: str | int, own: bool) -> Metadata:
    """Launch metadata of a kernel with one masked convolution.

    Args:
        name: of the kernel.
        units_in, units_out: names of the arguments with the channels of a colour, or numbers.
        own: whether there is a product of every colour with itself, too.
    """

    def declare(grid: Any, compiled: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        inputs, outputs = (
            arguments[units] if isinstance(units, str) else units for units in (units_in, units_out)
        )
        colours, kernel = arguments["colours"], arguments["KERNEL"]
        structure = (arguments["ORDER"], arguments["TRIANGLE"])
        image = (arguments["height"], arguments["width"])
        products = exact_of_image(outputs, inputs, colours, kernel, *structure, *image)
        if own:
            products += exact_of_image(outputs, outputs, colours, 1, "own", "lower", *image)
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        if "weight" in arguments:
            bits = 8 * arguments["weight"].element_size()
        else:
            bits = arguments["OPERAND"].primitive_bitwidth
        return {
            "name": f"{name} {colours}x{inputs}->{colours}x{outputs}",
            f"flops{bits}": 2 * products * arguments["samples"],
            "bytes": sum(value.numel() * value.element_size() for value in tensors),
        }

    return declare
