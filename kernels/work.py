"""The work of a kernel: what the mask leaves, what the tiles do, and the bytes that must move.

Every kernel declares its own to Triton's profiler as launch metadata. One multiply-add is two
flops. A kernel is judged by the *exact* multiply-adds, those that the mask leaves; the *scheduled*
ones, counted with the very functions that give the kernel its ranges, say how much the tiles
waste.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mintnet_triton.kernels.ranges import first_block, seen_inputs


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


def scheduled_of_gradient(
    units_out: int,
    units_in: int,
    colours: int,
    kernel: int,
    order: str,
    triangle: str,
    block_n: int,
    block_k: int,
) -> int:
    """Multiply-adds that the tiles of the gradient by its weights do for one pixel."""
    outputs, inputs = units_out * colours, units_in * colours
    tiles = 0
    for start in range(0, outputs, block_n):
        first = start // units_out
        last = min((start + block_n - 1) // units_out, colours - 1)
        for place in range(-(kernel**2 // 2), kernel**2 // 2 + 1):
            low, high = seen_inputs(first, last, units_in, colours, place, order, triangle)
            starts = range(0, inputs, block_k)
            tiles += sum(k < high and min(k + block_k, inputs) > low for k in starts)
    return tiles * block_n * block_k


@dataclass(frozen=True)
class Declared:
    """The work of a kernel with one masked convolution; called, it is Triton's launch metadata.

    Args:
        name: of the kernel.
        units_in, units_out: names of the arguments with the channels of a colour, or numbers.
        own: whether there is a product of every colour with itself, too.
    """

    name: str
    units_in: str | int
    units_out: str | int
    own: bool

    def _structure(self, arguments: Mapping[str, Any]) -> tuple[int, int, int, int, str, str]:
        """What the counts of this room begin with."""
        inputs, outputs = (
            arguments[units] if isinstance(units, str) else units
            for units in (self.units_in, self.units_out)
        )
        constants = (arguments["KERNEL"], arguments["ORDER"], arguments["TRIANGLE"])
        return outputs, inputs, arguments["colours"], *constants

    def exact(self, arguments: Mapping[str, Any]) -> int:
        """Multiply-adds that the mask leaves of a launch."""
        structure = self._structure(arguments)
        outputs, _, colours, *_ = structure
        image = (arguments["height"], arguments["width"])
        products = exact_of_image(*structure, *image)
        if self.own:
            products += exact_of_image(outputs, outputs, colours, 1, "own", "lower", *image)
        return products * int(arguments["samples"])

    def scheduled(self, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> int:
        """Multiply-adds of all tiles of a launch, whatever of them lies outside the images."""
        structure = self._structure(arguments)
        outputs, _, colours, *_ = structure
        block_m, block_n, block_k = (int(arguments[f"BLOCK_{axis}"]) for axis in "MNK")
        if "weight" not in arguments:
            pixels = int(arguments["samples"] * arguments["height"] * arguments["width"])
            of_pixel = scheduled_of_gradient(*structure, block_n, block_k)
            return -(-pixels // block_m) * block_m * of_pixel
        of_pixel = scheduled(*structure, block_n, block_k)
        if self.own:
            own = int(arguments.get("BLOCK_OWN", block_k))
            of_pixel += scheduled(outputs, outputs, colours, 1, "own", "lower", block_n, own)
        return grid[0] // -(-outputs * colours // block_n) * block_m * of_pixel

    def __call__(
        self, grid: Any, compiled: Any, arguments: Mapping[str, Any]
    ) -> dict[str, str | int]:
        outputs, inputs, colours, *_ = self._structure(arguments)
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        if "weight" in arguments:
            bits = 8 * arguments["weight"].element_size()
        else:
            bits = arguments["OPERAND"].primitive_bitwidth
        return {
            "name": f"{self.name} {colours}x{inputs}->{colours}x{outputs}",
            f"flops{bits}": 2 * self.exact(arguments),
            "bytes": sum(value.numel() * value.element_size() for value in tensors),
        }
