"""Weights as the kernels read them: by tap, one row of inputs for each output."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mintnet_triton.kernels._launch import padded


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(outputs, inputs, k, k) -> (k * k, outputs, padded inputs), contiguous, with zero padding."""
    outputs, inputs, kernel, _ = weight.shape
    rows = weight.permute(2, 3, 0, 1).reshape(kernel * kernel, outputs, inputs).to(dtype)
    return F.pad(rows, (0, padded(inputs) - inputs)).contiguous()


def pack_transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The packed weights of the transposed convolution, which has the opposite triangle."""
    return pack(weight.flip(2, 3).transpose(0, 1), dtype)


def unpack(packed: Tensor) -> Tensor:
    """(k * k, outputs, inputs) -> (outputs, inputs, k, k)."""
    _, outputs, inputs = packed.shape
    kernel = kernel_size(packed)
    return packed.view(kernel, kernel, outputs, inputs).permute(2, 3, 0, 1)


def pack_centres(centres: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, K, K) -> (C * K, padded C * K): one matrix with a block for each colour."""
    colours, units, _ = centres.shape
    rows = centres.new_zeros(colours, units, colours, units, dtype=dtype)
    torch.diagonal(rows, dim1=0, dim2=2).copy_(centres.permute(1, 2, 0))
    rows = rows.view(colours * units, colours * units)
    return F.pad(rows, (0, padded(colours * units) - colours * units)).contiguous()


def kernel_size(packed: Tensor) -> int:
    """k of packed weights (k * k, ...)."""
    return int(len(packed) ** 0.5 + 0.5)
