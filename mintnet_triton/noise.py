"""Noise on integers, which makes a density of them; and how much of it a dtype has room for."""

import torch
from torch import Tensor

#: bits of the noise that are left beside the largest value of a pixel
NOISE_BITS = 16


def holds_noise(dtype: torch.dtype, levels: int) -> bool:
    """Whether values below ``levels`` leave room for the noise in that dtype."""
    return dtype in (torch.float32, torch.float64) and (
        levels * 2**NOISE_BITS <= 2 / torch.finfo(dtype).eps
    )


def add_noise(images: Tensor, noise: Tensor) -> Tensor:
    """``images + noise`` in the dtype of the noise, never rounded up to ``images + 1``.

    Args:
        images: whole numbers, of an integer dtype or a floating one.
        noise: of the same shape, in [0, 1], float32 or float64.
    """
    pixels = images.to(noise.dtype)
    return torch.minimum(pixels + noise, torch.nextafter(pixels + 1, pixels))
