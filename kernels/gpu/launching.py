"""Where and how kernels are launched."""

from contextlib import nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mintnet_triton.kernels.gpu import configs

#: the multiple of channels to which rows of hidden layers and weights are padded: in every dtype,
#: a row then begins where 16 bytes can be loaded
ALIGN = 16


def padded(channels: int) -> int:
    """Stride of a row of that many channels."""
    return -(-channels // ALIGN) * ALIGN


def default_precision() -> str:
    """How float32 operands are multiplied: "ieee" unless torch is told that less will do.

    ``torch.set_float32_matmul_precision("high")`` or ``"medium"`` asks for TensorFloat-32.
    """
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What products of that dtype are added in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def numerics(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Constants of a kernel whose products have operands of that dtype."""
    return {
        "PRECISION": precision if dtype == torch.float32 else "ieee",
        "ACCUMULATOR": TL_DTYPES[accumulator(dtype)],
    }


def blocks(tile: configs.Tile) -> dict[str, int]:
    """The keywords of a launch that a tile stands for."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument; an empty grid is no launch."""
    if 0 in grid:
        return
    device = arguments[0].device
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.device != device:
            raise ValueError(
                f"{kernel.__name__} was given tensors on {device} and on {argument.device}"
            )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Multiply-adds in one rounding: Triton's own default changes in 3.10.
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)
