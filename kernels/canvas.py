"""Canvases: images in one line, with zeros between them, so that a tap is a constant distance.

A convolution looks up to r rows and columns beyond an image, r the radius of its kernel, and sees
zeros there. In a canvas they are stored: r columns after each row of an image, r rows after its
last. Those of a row are also what lies left of the next one, and those of an image what lies above
the next; before the first image and after the last there is a *guard* of as many as a tap reaches.
So a pixel's neighbour is always ``dy * pitch + dx`` positions away, and no border has to be known.
Along three axes r planes follow the last, too, and along one axis no rows follow: :class:`Space`.

What a position holds differs. On a GPU it is a pixel's channels, one after the other, and a canvas
holds a batch. On a CPU a line, one row of one channel, is a row of a canvas; its positions are
floats, the pixels of several samples side by side, and rows outside an image are skipped, not
stored.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple, TypeVar

Each = TypeVar("Each")


def offsets(kernel: int, axes: int) -> list[tuple[int, ...]]:
    """How far the taps of a kernel look along each axis, in reading order: the middle one is 0."""
    radius = kernel // 2
    return list(product(range(-radius, radius + 1), repeat=axes))


def in_space(along: Sequence[Each], missing: Each) -> tuple[Each, Each, Each]:
    """What is given along the last axes, along depth, height and width."""
    depth, height, width = (missing, missing, *along)[-3:]
    return depth, height, width


class Space(NamedTuple):
    """The geometry of a canvas along any axes; all numbers are positions.

    Args:
        size: of an image, (L,), (H, W) or (D, H, W).
        radius: ``k // 2`` of the largest kernel that looks at it.
    """

    size: tuple[int, ...]
    radius: int

    @property
    def steps(self) -> tuple[int, ...]:
        """How far images are apart, and pixels along each axis."""
        steps = [1]
        for side in reversed(self.size):
            steps.insert(0, steps[0] * (side + self.radius))
        return tuple(steps)

    @property
    def guard(self) -> int:
        """Zeros before the first image, and after the last: as far as a tap reaches."""
        return self.distance([self.radius] * len(self.size))

    def distance(self, away: Sequence[int]) -> int:
        """From a pixel to the one that is so far away along each axis."""
        return sum(by * step for by, step in zip(away, self.steps[1:], strict=True))

    def positions(self, samples: int) -> int:
        """Of a canvas of so many images, both guards included."""
        return 2 * self.guard + samples * self.steps[0]


class Canvas(NamedTuple):
    """That along two axes, in numbers that Triton's kernels take: positions, or rows of them.

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
