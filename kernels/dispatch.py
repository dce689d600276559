"""The operations that the layers call: each goes to the backend chosen for its input."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mintnet_triton.kernels import reference
from mintnet_triton.kernels.activation import Activation
from mintnet_triton.kernels.backend import TRITON_INSTALLED, use_triton
from mintnet_triton.kernels.reference import MintWeights

if TRITON_INSTALLED:
    from mintnet_triton.kernels import inversion as triton_inversion
    from mintnet_triton.kernels import masked_conv as triton_conv
    from mintnet_triton.kernels import mint_layer as triton_layer


def masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, order: str, triangle: str
) -> Tensor:
    """Convolution with masked weights; see :func:`.reference.masked_conv2d`."""
    if use_triton(x):
        return triton_conv.masked_conv2d(x, weight, bias, colours, order, triangle)
    return reference.masked_conv2d(x, weight, bias, colours, order, triangle)


def mint_map(
    x: Tensor, weights: MintWeights, activation: Activation, order: str, triangle: str
) -> Tensor:
    """y of a Mint layer, (B, C, H, W) in the dtype of x."""
    if use_triton(x, activation.name):
        return triton_layer.mint_forward(x, weights, activation.name, order, triangle)[0]
    return reference.mint_map(x, weights, activation, order, triangle)[0]


def mint_forward(
    x: Tensor,
    weights: MintWeights,
    activation: Activation,
    order: str,
    triangle: str,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Mint layer, the diagonal of its Jacobian, and its log-determinant.

    Args:
        recompute: keep x alone for the backward pass, and compute the hidden layers again there.

    Returns:
        y in the dtype of x, the diagonal, both (B, C, H, W), and log_det (B,), both in that of t.
    """
    if use_triton(x, activation.name):
        return triton_layer.mint_forward(x, weights, activation.name, order, triangle, recompute)
    arguments = (x, weights, activation, order, triangle)
    if recompute and torch.is_grad_enabled():
        y, diagonal = checkpoint(reference.mint_forward, *arguments, use_reentrant=False)
    else:
        y, diagonal = reference.mint_forward(*arguments)
    return y, diagonal, diagonal.log().flatten(1).sum(1)


def fixed_point(
    z: Tensor,
    start: Tensor,
    weights: MintWeights,
    activation: Activation,
    order: str,
    triangle: str,
    alpha: float,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Algorithm 1 on a Mint layer, where :func:`use_triton` says yes.

    See :class:`.inversion.Iterated` for what is returned.
    """
    packed = triton_layer.pack_layer(weights, z.dtype)
    structure = triton_layer.Structure(order, triangle, activation.name)
    return triton_inversion.fixed_point(z, start, packed, structure, alpha, iterations, tolerance)
