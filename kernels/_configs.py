"""Tile sizes of the kernels, per architecture: the one room of numbers that only a clock can judge.

A tile multiplies BLOCK_M pixels, BLOCK_N output channels and BLOCK_K input channels at a time.
BLOCK_N is not a matter of speed alone: a tile computes what *any* of its channels sees, so a wide
tile wastes what the mask saves. 64 fits wide colours (within 1.25 times the exact work at 85
units), 32 narrow ones (within 1.3 at 12 and 48 colours).
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One configuration of a kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: kinds of operands: 16-bit floats; float32 in TensorFloat-32 or exactly; float64
OPERANDS = ("half", "tf32", "ieee", "float64")

#: architecture -> operand -> (hidden layers, outputs, gradients by weights); BLOCK_N is the widest.
#: An architecture that is not listed takes "generic", which fits 64 KiB of shared memory.
TABLES: dict[str, dict[str, tuple[Tile, Tile, Tile]]] = {
    "sm_90": {
        "half": (Tile(128, 64, 32, 8, 4), Tile(64, 32, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
        "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 32, 64, 4, 3), Tile(32, 64, 64, 4, 3)),
        "ieee": (Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2), Tile(16, 64, 64, 8, 2)),
        "float64": (Tile(64, 32, 16, 4, 2), Tile(64, 32, 16, 4, 2), Tile(16, 32, 32, 4, 2)),
    },
    "generic": {
        "half": (Tile(64, 64, 32, 4, 3), Tile(64, 32, 64, 4, 3), Tile(32, 64, 64, 4, 3)),
        "tf32": (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2), Tile(32, 64, 64, 4, 2)),
        "ieee": (Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2), Tile(16, 64, 64, 8, 2)),
        "float64": (Tile(32, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2), Tile(16, 32, 32, 4, 2)),
    },
}
for _name in ("sm_80", "sm_100"):
    TABLES[_name] = dict(TABLES["sm_90"])
TABLES["gfx942"] = dict(TABLES["generic"])


def architecture(device: torch.device) -> str:
    """The name under which a device's tables stand."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter runs what a GPU would
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return name if name in TABLES else "generic"


def operand(dtype: torch.dtype, precision: str) -> str:
    """Which of :data:`OPERANDS` a dtype and a precision ("ieee" or "tf32") are."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "float64" if dtype == torch.float64 else precision


def hidden_tile(arch: str, operand: str, colours: int, units: int, inputs: int) -> Tile:
    """For convolutions whose outputs are hidden layers (or any other channels by colour)."""
    tile = TABLES[arch][operand][0]
    widest = tile.block_n if units >= 32 else min(tile.block_n, 32)
    return tile._replace(block_n=_fit(widest, colours * units), block_k=_fit(tile.block_k, inputs))


def output_tile(arch: str, operand: str, colours: int, area: int) -> Tile:
    """For convolutions whose outputs are the colours themselves; no tile spans two images."""
    tile = TABLES[arch][operand][1]
    return tile._replace(block_m=_fit(tile.block_m, area), block_n=_fit(tile.block_n, colours))


def gradient_tile(arch: str, operand: str, inputs: int, outputs: int) -> Tile:
    """For gradients by the weights."""
    tile = TABLES[arch][operand][2]
    return tile._replace(block_n=_fit(tile.block_n, outputs), block_k=_fit(tile.block_k, inputs))


def _fit(widest: int, channels: int) -> int:
    """The least power of two that holds the channels, from 16 (the least a matrix unit takes)."""
    return min(widest, max(16, 1 << (channels - 1).bit_length()))
