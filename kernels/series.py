"""Series as images of one row, for kernels that know images alone.

A kernel of a series becomes the middle row of a square one, whose other rows see nothing but the
zeros around the image: the same variables in the same order, and more products. What belongs to an
image already is left as it is.
"""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from mintnet_triton.kernels.reference import Condition, MintWeights, Weights

AnyWeights = TypeVar("AnyWeights", MintWeights, Weights)


def as_image(x: Tensor) -> Tensor:
    """(B, n, L) -> (B, n, 1, L)."""
    return x.unsqueeze(-2) if x.ndim == 3 else x


def as_square(weight: Tensor) -> Tensor:
    """(n, m, k) -> (n, m, k, k)."""
    if weight.ndim == 4:
        return weight
    radius = weight.shape[-1] // 2
    return F.pad(weight.unsqueeze(-2), (0, 0, radius, radius))


def of_images(weights: AnyWeights) -> AnyWeights:
    """The weights of the layer that does the same to images of one row."""
    if weights.weight1.ndim == 4:
        return weights
    return weights._replace(
        weight1=as_square(weights.weight1),
        weight2=as_square(weights.weight2),
        weight3=as_square(weights.weight3),
        t=weights.t.unsqueeze(-2),
    )


def given_images(condition: Condition | None) -> Condition | None:
    """The same of what a context gives."""
    return condition and Condition(*map(as_image, condition))
