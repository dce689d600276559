"""Canvases: images in one line, with zeros between them, so that a tap is a constant distance.

A convolution looks up to r rows and columns beyond an image, r the radius of its kernel, and sees
zeros there. In a canvas they are stored: r columns after each row of an image, r rows after its
last. Those of a row are also what lies left of the next one, and those of an image what lies above
the next; before the first image and after the last there is a *guard* of as many as a tap reaches.
So a pixel's neighbour is always ``dy * pitch + dx`` positions away, and no border has to be known.

What a position holds differs. On a GPU it is a pixel's channels, one after the other, and a canvas
holds a batch. On a CPU a line, one row of one channel, is a row of a canvas; its positions are
floats, the pixels of several samples side by side, and rows outside an image are skipped, not
stored.
"""

from typing import NamedTuple


class Canvas(NamedTuple):
    """The geometry of a canvas: all numbers are positions, or rows of them.

    Args:
        height, width: of an image.
        radius: ``k // 2`` of the largest kernel that looks at it.
    """

    height: int
    width: int
    radius: int

    @property
    def pitch(self) -> int:
        """How far rows are apart."""
        return self.width + self.radius

    @property
    def rows(self) -> int:
        """How many rows images are apart."""
        return self.height + self.radius

    @property
    def guard(self) -> int:
        """Zeros before the first image, and after the last: as far as a tap reaches."""
        return self.distance(self.radius, self.radius)

    def distance(self, dy: int, dx: int) -> int:
        """From a pixel to the one that is so many rows below and columns to the right."""
        return dy * self.pitch + dx

    def place(self, sample: int, row: int, column: int) -> int:
        """Where a pixel is."""
        return self.guard + self.distance(sample * self.rows + row, column)

    def positions(self, samples: int) -> int:
        """Of a canvas of so many images, both guards included."""
        return self.place(samples, 0, 0) + self.guard


def padded(count: int, multiple: int) -> int:
    """The least multiple that is no less: of channels, so that each position begins where several
    are loaded at once; of floats in a line, so that it is whole vectors."""
    return -(-count // multiple) * multiple
