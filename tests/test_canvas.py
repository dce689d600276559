"""The geometry of canvases: a tap at a constant distance sees what a padded convolution sees."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mintnet_triton.kernels.canvas import Canvas, padded


def paint(images: Tensor, canvas: Canvas) -> Tensor:
    """Images (B, H, W) on a canvas of zeros."""
    painted = images.new_zeros(canvas.positions(len(images)))
    for sample, image in enumerate(images):
        for row, values in enumerate(image):
            start = canvas.place(sample, row, 0)
            painted[start : start + canvas.width] = values
    return painted


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("height", "width", "samples"), [(1, 1, 1), (4, 3, 2), (2, 5, 3), (1, 4, 2)]
)
def test_every_tap_is_a_constant_distance(
    height: int, width: int, samples: int, radius: int
) -> None:
    """All taps together, whatever their weights, and whatever else the images show."""
    images = torch.rand(samples, height, width, dtype=torch.float64) + 1
    weight = torch.rand(2 * radius + 1, 2 * radius + 1, dtype=torch.float64)
    canvas = Canvas(height, width, radius)
    painted = paint(images, canvas)
    assert painted.count_nonzero() == images.numel()  # no pixel is another's
    found = torch.zeros_like(images)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            # From every position between the guards, those of no pixel included, it stays inside.
            first, last = canvas.place(0, 0, 0), canvas.place(samples, 0, 0) - 1
            away = canvas.distance(dy, dx)
            assert first + away >= 0
            assert last + away < len(painted)
            for pixel in torch.cartesian_prod(*map(torch.arange, images.shape)).tolist():
                factor = weight[dy + radius, dx + radius]
                found[tuple(pixel)] += factor * painted[canvas.place(*pixel) + away]
    expected = F.conv2d(images.unsqueeze(1), weight[None, None], padding=radius).squeeze(1)
    torch.testing.assert_close(found, expected)


def test_images_fill_what_they_are_said_to() -> None:
    """No position is spent but for zeros that are needed: r columns a row, r rows an image."""
    canvas = Canvas(height=28, width=28, radius=1)
    assert (canvas.pitch, canvas.rows, canvas.guard) == (29, 29, 30)
    assert canvas.positions(0) == 60
    assert canvas.positions(3) - canvas.positions(2) == 29 * 29


def test_padding_is_to_the_next_multiple() -> None:
    assert [padded(count, 16) for count in (0, 1, 16, 17, 255)] == [0, 16, 16, 32, 256]
