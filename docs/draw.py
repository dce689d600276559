"""The pages' diagrams, drawn by the code that they are about: ``python -m docs.draw``.

Cells and letters are few, so that an SVG is written by hand; its grey is read on white and on
black. The tests see that the files are those that this makes.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import mintnet_triton as mint
from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.fronts import front_numbers
from mintnet_triton.kernels.ranges import first_block, seen_inputs
from mintnet_triton.ordering import Order

PICTURES = Path(__file__).parent / "pictures"
GREY, FAINT = "#767676", "#76767640"
# Okabe and Ito's, told apart by the colour-blind.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
CELL = 16
ORDERS: tuple[Order, Order] = ("channel", "pixel")


def picture(width: float, height: float, title: str, shapes: Iterable[str]) -> str:
    """An SVG of so many cells."""
    size = f"{width * CELL:g} {height * CELL:g}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
            f'width="{width * CELL:g}" role="img" font-family="sans-serif">',
            f"<title>{title}</title>",
            *shapes,
            "</svg>\n",
        ]
    )


def cell(x: float, y: float, fill: str, width: float = 1, height: float = 1) -> str:
    place = [f"{value * CELL:g}" for value in (x, y, width, height)]
    x0, y0, w, h = place
    return (
        f'<rect x="{x0}" y="{y0}" width="{w}" height="{h}" fill="{fill}" '
        f'stroke="{GREY}" stroke-width="0.5"/>'
    )


def word(x: float, y: float, text: str, size: int = 10, anchor: str = "start") -> str:
    return (
        f'<text x="{x * CELL:g}" y="{y * CELL:g}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{GREY}">{text}</text>'
    )


def matrix(x: float, y: float, fills: list[list[str]], scale: float = 1) -> Iterator[str]:
    for row, line in enumerate(fills):
        for column, fill in enumerate(line):
            yield cell(x + scale * column, y + scale * row, fill, scale, scale)


def orders() -> str:
    """What the middle one of three colours sees through one convolution of 5 x 5."""
    shapes, side = [], 5
    for number, order in enumerate(ORDERS):
        top = 7.5 * number
        mask = mint.Ordering(order).conv_mask(3, side)[1]
        shapes.append(word(0, top + 1, f'order="{order}"', 12))
        for colour, name in enumerate(("first colour", "its own colour", "last colour")):
            left = 7 * colour
            fills = [[BLUE if seen else FAINT for seen in row] for row in mask[colour].tolist()]
            if colour == 1:
                fills[side // 2][side // 2] = ORANGE
            shapes += matrix(left, top + 2.2, fills)
            shapes.append(word(left, top + 2, name))
    title = "What an output (orange) sees of each colour (blue), in both orders"
    return picture(19.5, 15, title, shapes)


def pair() -> str:
    """Where the Jacobians of two layers and of their pair are not zero, at a random point."""
    torch.manual_seed(0)
    layers = [mint.MintLayer(1, 3, 4, triangle=one).double() for one in ("lower", "upper")]
    for parameter in torch.nn.ModuleList(layers).parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64)

    def jacobian(layer: mint.MintLayer, at: Tensor) -> Tensor:
        found: Tensor = torch.func.jacrev(lambda v: layer(v)[0])(at)
        return found.detach().reshape(9, 9)

    lower, upper = jacobian(layers[0], x), jacobian(layers[1], layers[0](x)[0].detach())
    shapes: list[str] = []
    names = ("a lower layer", "an upper layer", "the pair")
    for number, (name, found) in enumerate(zip(names, (lower, upper, upper @ lower), strict=True)):
        fills = [[BLUE if value else FAINT for value in row] for row in found.tolist()]
        shapes += matrix(9 * number, 1.5, fills, scale=0.8)
        shapes.append(word(9 * number, 1, name, 12))
    return picture(26, 9, "Jacobians: what each output depends on", shapes)


def fronts() -> str:
    """The fronts of 2 colours of 6 x 6 pixels, kernels of 3."""
    shapes = []
    for number, order in enumerate(ORDERS):
        top, numbers = 8.5 * number, front_numbers(2, 6, 6, 1, order)
        last = int(numbers.max())
        shapes.append(word(0, top + 1, f'order="{order}", {last + 1} fronts', 12))
        for colour in range(2):
            left = 8 * colour
            for row in range(6):
                for column in range(6):
                    front = int(numbers[colour, row, column])
                    shade = f"{BLUE}{round(16 + 80 * front / last):02x}"
                    shapes.append(cell(left + column, top + 1.7 + row, shade))
                    centre = left + column + 0.5, top + 2.4 + row
                    shapes.append(word(*centre, str(front), 8, "middle"))
    return picture(14.5, 16.5, "Which front each variable of two colours belongs to", shapes)


def canvas() -> str:
    """Two images of 3 x 4 pixels, taps that reach one pixel."""
    place = Canvas(height=3, width=4, radius=1)
    fills = [FAINT] * place.positions(2)
    for sample, colour in enumerate((BLUE, GREEN)):
        for row in range(place.height):
            for column in range(place.width):
                fills[place.place(sample, row, column)] = colour
    centre = place.place(0, 1, 1)
    fills[centre] = ORANGE
    scale = 0.55
    shapes = [cell(scale * i, 1.6, fill, scale, scale) for i, fill in enumerate(fills)]
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            at = scale * (centre + place.distance(dy, dx)) + scale / 2
            shapes.append(cell(at - 0.1, 2.3, PURPLE, 0.2, 0.2))
    shapes += [
        word(
            0, 1, "two images, row by row; grey: zeros, purple: the 9 taps of the orange pixel", 11
        ),
        word(0, 3.3, f"the row below is always {place.pitch} positions away", 11),
    ]
    return picture(scale * len(fills) + 0.2, 3.7, "A canvas: images in one line", shapes)


def tiles() -> str:
    """Blocks of 4 inputs that tiles of 4 outputs read: 3 colours of 8 units, channel order."""
    units, colours, block = 8, 3, 4
    shapes = []
    for number, (name, tap) in enumerate(
        (("a tap before the centre", -1), ("the centre", 0), ("a tap after it", 1))
    ):
        left = 9 * number
        shapes.append(word(left, 1, name, 11))
        for tile in range(units * colours // block):
            colour = tile * block // units
            low, high = seen_inputs(colour, colour, units, colours, tap, "channel", "lower")
            read = set(range(first_block(low, high, block) // block, -(-high // block)))
            for column in range(units * colours // block):
                own = column * block // units == colour
                fill = (ORANGE if own else BLUE) if column in read else FAINT
                shapes.append(cell(left + column, 1.5 + tile, fill))
    shapes += [
        word(0, 8.4, "rows: tiles of outputs, two a colour; columns: blocks of inputs", 11),
        word(0, 9.3, "orange: the own colour, blue: lower colours, grey: never loaded", 11),
    ]
    return picture(25, 9.8, "Blocks of inputs that each tile of outputs reads", shapes)


def pictures() -> dict[str, str]:
    """Every diagram, by the name of its file."""
    drawn = (orders, pair, fronts, canvas, tiles)
    return {f"{one.__name__}.svg": one() for one in drawn}


if __name__ == "__main__":
    for name, svg in pictures().items():
        (PICTURES / name).write_text(svg, encoding="utf-8")
