"""Where and how kernels are launched."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mintnet_triton.kernels import canvas
from mintnet_triton.kernels.gpu import configs


def padded(channels: int, multiple: int = configs.ALIGN) -> int:
    """Stride of a row of that many channels."""
    return canvas.padded(channels, multiple)


def default_precision() -> str:
    """How float32 operands are multiplied: "ieee" unless torch is told that less will do.

    ``torch.set_float32_matmul_precision("high")`` or ``"medium"`` asks for TensorFloat-32.
    """
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def precision_of(dtype: torch.dtype) -> str:
    """How operands of that dtype are multiplied: "tf32" or "ieee"."""
    return default_precision() if dtype == torch.float32 else "ieee"


def operand(dtype: torch.dtype) -> str:
    """Which of :data:`.configs.OPERANDS` they are."""
    return configs.operand(dtype, default_precision())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What products of that dtype are added in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among a launch's arguments, which may be grouped in tuples."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors_in(argument)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor; an empty grid is no launch."""
    if 0 in grid:
        return
    first, *others = tensors_in(arguments)
    device = first.device
    for other in others:
        if other.device != device:
            raise ValueError(
                f"{kernel.__name__} was given tensors on {device} and on {other.device}"
            )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Multiply-adds in one rounding: Triton's own default changes in 3.10.
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)
