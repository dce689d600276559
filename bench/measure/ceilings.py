"""How fast the machine is at all, measured in the same run; and the least work that a case takes.

What a case achieves is told as a share of a measured ceiling, in multiply-adds that the mask leaves
(two flops each), never in those that happen to be executed.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contest.cases import Extent, Mode, layers_of
from bench.measure.timing import Clock, Work
from mintnet_triton import MaskedConv2d, MintLayer
from mintnet_triton.conv import MaskedConv
from mintnet_triton.kernels import work


def measure_ceilings(mode: Mode, extent: Extent, clock: Clock) -> dict[str, Any]:
    """The fastest of some matrix products and dense convolutions, and of a copy.

    Returns:
        TFLOP/s of "matrix product" and "convolution", with what was fastest as "... of"; GB/s of
        "copy", read and written.
    """
    gpu = clock.device.type == "cuda"
    if extent == "tiny":
        side, mib, images = 16, 1, [1]
    else:
        side, mib, images = (8192, 1024, [32, 128]) if gpu else (2048, 256, [8])

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(clock.device, mode.dtype)

    a, b = randn(side, side), randn(side, side)
    products: dict[str, tuple[Work, float]] = {
        f"{side} x {side} x {side}": (lambda: a @ b, 2.0 * side**3)
    }
    convolutions: dict[str, tuple[Work, float]] = {}
    for channels, pixels in ((256, 32), (256, 16), (256, 8)) if extent != "tiny" else ((4, 4),):
        for batch in images:
            for layout in (torch.contiguous_format, torch.channels_last):
                x = randn(batch, channels, pixels, pixels).contiguous(memory_format=layout)
                weight = randn(channels, channels, 3, 3).contiguous(memory_format=layout)
                # A tap beyond the border multiplies nothing, and does not count here either.
                flops = 2.0 * batch * channels**2 * (3 * pixels - 2) ** 2
                order = "channels last" if layout is torch.channels_last else "channels first"
                name = f"{batch} x {channels} x {pixels} x {pixels}, {order}"
                convolutions[name] = (_convolution(x, weight), flops)
    source = torch.empty(mib << 20, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for kind, works in (("matrix product", products), ("convolution", convolutions)):
            rates = {
                name: flops / min(times) / 1e9
                for name, (run, flops) in works.items()
                for times in clock.race({"": run}).values()
            }
            best = max(rates, key=lambda name: rates[name])
            found |= {kind: rates[best], f"{kind} of": best}
        times = clock.race({"": lambda: target.copy_(source)})[""]
    found["copy"] = 2 * source.numel() / min(times) / 1e6
    return found


def _convolution(x: Tensor, weight: Tensor) -> Work:
    return lambda: F.conv2d(x, weight, padding=1)


def flops_of(module: nn.Module, shape: Sequence[int]) -> int:
    """Flops that the mask leaves of a forward pass: convolutions, and the products of the diagonal.

    Args:
        module: a masked convolution, or one with Mint layers inside.
        shape: (B, C, H, W) of its input.
    """
    if isinstance(module, MaskedConv2d):
        products = _products(module, shape[2], shape[3])
    else:
        products = sum(_products_of_layer(layer) for layer in layers_of(module))
    return 2 * shape[0] * products


def _products_of_layer(layer: MintLayer) -> int:
    convolutions = (layer.conv1, layer.conv2, layer.conv3)
    height, width = layer.size
    diagonal = (layer.hidden, layer.hidden, layer.channels, 1, "own", "lower", height, width)
    return sum(_products(conv, height, width) for conv in convolutions) + work.exact_of_image(
        *diagonal
    )


def _products(conv: MaskedConv, height: int, width: int) -> int:
    outputs, inputs, kernel, _ = conv.weight.shape
    colours, ordering = conv.colours, conv.ordering
    return work.exact_of_image(
        outputs // colours, inputs // colours, colours, kernel, ordering.order, ordering.triangle,
        height, width,
    )  # fmt: skip


def bytes_of(tensors: Iterable[Tensor], operand: torch.dtype) -> int:
    """The least that has to move: everything that comes in or goes out once, in that dtype."""
    return sum(math.prod(one.shape) for one in tensors) * operand.itemsize
