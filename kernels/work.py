"""The work of a kernel: what the mask leaves, what the tiles do, and the bytes that must move.

Every kernel declares its own to Triton's profiler as launch metadata. One multiply-add is two
flops. A kernel is judged by the *exact* multiply-adds, those that the mask leaves; the *scheduled*
ones, counted with the very functions that give the kernel its ranges, say how much the tiles
waste.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mintnet_triton.kernels.canvas import padded
from mintnet_triton.kernels.ranges import first_block, seen_inputs

#: channels of a colour out and in, colours, kernel, order and triangle of a masked convolution
Structure = tuple[int, int, int, int, str, str]


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
    # Three taps side by side go together, and one of the outer two sees what any of them sees.
    together = 3 if kernel == 3 else 1
    edge = 0 if triangle == "lower" else together - 1
    tiles = 0
    for start in range(0, outputs, block_n):
        first = start // units_out
        last = min((start + block_n - 1) // units_out, colours - 1)
        for place in range(edge - kernel**2 // 2, kernel**2 // 2 + 1, together):
            low, high = seen_inputs(first, last, units_in, colours, place, order, triangle)
            starts = range(0, inputs, block_k)
            seen = sum(k < high and min(k + block_k, inputs) > low for k in starts)
            tiles += together * seen
    return tiles * block_n * block_k


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    from mintnet_triton.kernels.gpu.launching import tensors_in  # for Triton need not be there

    return list(tensors_in(arguments))


@dataclass(frozen=True)
class Declared:
    """The work of a kernel with a masked convolution; called, it is Triton's launch metadata.

    What goes by columns (:mod:`.gpu.canvas`) is counted as the product that it is: a kernel of 1,
    all of whose inputs of a colour are seen.

    Args:
        name: of the kernel.
        units_in, units_out: names of the arguments with the channels of a colour, or numbers.
        own: name of the argument that holds tensors if every colour is multiplied with itself,
            too, as a hidden layer's diagonal and its gradient are.
    """

    name: str
    units_in: str | int
    units_out: str | int
    own: str | None = None

    def _structures(self, arguments: Mapping[str, Any]) -> list[Structure]:
        """What the counts of this room begin with, for each product; the convolution comes first.

        A gradient by weights may be of two convolutions, with opposite triangles.
        """
        inputs, outputs = (
            arguments[units] if isinstance(units, str) else units
            for units in (self.units_in, self.units_out)
        )
        colours, order, triangle = (arguments[key] for key in ("colours", "ORDER", "TRIANGLE"))
        structures = [(outputs, inputs, colours, arguments["KERNEL"], order, triangle)]
        if arguments.get("pair") is not None:
            structures.append((*structures[0][:5], "upper" if triangle == "lower" else "lower"))
        if self.own and _tensors([arguments[self.own]]):
            structures.append((outputs, outputs, colours, 1, "own", "lower"))
        return structures

    def exact(self, arguments: Mapping[str, Any]) -> int:
        """Multiply-adds that the mask leaves of a launch."""
        canvas = arguments["canvas"]
        products = (
            exact_of_image(*structure, canvas.height, canvas.width)
            for structure in self._structures(arguments)
        )
        return sum(products) * int(arguments["samples"])

    def scheduled(self, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> int:
        """Multiply-adds of all tiles of a launch, whatever of them lies outside the images."""
        block_m, block_n, block_k, own, width, _ = arguments["BLOCKS"]
        conv, *others = self._structures(arguments)
        if "weight" not in arguments:
            canvas = arguments["canvas"]
            positions = int(arguments["samples"]) * canvas.rows * canvas.pitch
            return padded(positions, block_m) * sum(
                scheduled_of_gradient(*structure, block_n, block_k) for structure in (conv, *others)
            )
        of_place = scheduled(*conv, block_n, block_k)
        of_place += sum(scheduled(*structure, block_n, own) for structure in others)
        tiles = -(-conv[0] * conv[2] // block_n)
        if others and arguments["own"] is None:  # sums by colour
            of_place += tiles * block_n * width
        return int(grid[0] // tiles * block_m * of_place)

    def __call__(
        self, grid: Any, compiled: Any, arguments: Mapping[str, Any]
    ) -> dict[str, str | int]:
        outputs, inputs, colours, *_ = self._structures(arguments)[0]
        operand = arguments["weight" if "weight" in arguments else "gradient"]
        tensors = _tensors(arguments.values())
        return {
            "name": f"{self.name} {colours}x{inputs}->{colours}x{outputs}",
            f"flops{8 * operand.element_size()}": 2 * self.exact(arguments),
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        }
