"""Weights as the kernels read them: by tap, one row of inputs for each output."""

import torch
from torch import Tensor

from mintnet_triton.kernels.gpu.launching import padded


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(outputs, inputs, k, k) -> (k * k, outputs, padded inputs), contiguous, with zero padding."""
    outputs, inputs, kernel, _ = weight.shape
    packed = weight.new_zeros(kernel, kernel, outputs, padded(inputs), dtype=dtype)
    packed[..., :inputs] = weight.permute(2, 3, 0, 1)
    return packed.flatten(0, 1)


def pack_transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The packed weights of the transposed convolution, which has the opposite triangle."""
    return pack(weight.flip(2, 3).transpose(0, 1), dtype)


def unpack(packed: Tensor) -> Tensor:
    """(k * k, outputs, inputs) -> (outputs, inputs, k, k)."""
    _, outputs, inputs = packed.shape
    kernel = kernel_size(packed)
    return packed.view(kernel, kernel, outputs, inputs).permute(2, 3, 0, 1)


def centres_unit(centres: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The unit (), float32, in which centres are packed for products of that dtype; None is 1.

    A product of three weights may be too small for float16. In this unit the largest is nearly
    the largest float16; it is a power of two, so that nothing is rounded by it.
    """
    if dtype != torch.float16:
        return None
    largest: Tensor = torch.linalg.vector_norm(centres, float("inf"), dtype=torch.float32)
    largest = largest.clamp(min=2e-30)  # of zeros, too
    return largest / (2**15 * torch.frexp(largest).mantissa)


def pack_centres(centres: Tensor, dtype: torch.dtype, unit: Tensor | None) -> Tensor:
    """(C, K, K) -> (C * K, padded C * K): one matrix with a block for each colour, in that unit."""
    colours, units, _ = centres.shape
    channels = colours * units
    packed = centres.new_zeros(channels, padded(channels), dtype=dtype)
    blocks = packed[:, :channels].unflatten(1, (colours, units)).unflatten(0, (colours, units))
    centres = centres if unit is None else centres / unit
    torch.diagonal(blocks, dim1=0, dim2=2).copy_(centres.permute(1, 2, 0))
    return packed


def kernel_size(packed: Tensor) -> int:
    """k of packed weights (k * k, ...)."""
    return int(len(packed) ** 0.5 + 0.5)
