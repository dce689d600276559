"""Tile sizes of the kernels, per architecture: the one room of numbers that only a clock can judge.

A tile multiplies BLOCK_M places, BLOCK_N output channels and BLOCK_K input channels at a time. The
tables hold the largest ones; hidden layers take of their halves those that should take the fewest
clocks (:func:`_clocks`): large tiles read less, small ones leave fewer cores without work.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mintnet_triton.kernels.canvas import padded


class Tile(NamedTuple):
    """One configuration of a kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Blocks(NamedTuple):
    """What kernels are told of their tile, as one compile-time constant."""

    places: int
    outputs: int
    inputs: int
    #: units of the other hidden layer, whose product with the same tile gives the diagonal
    own: int = 16
    #: colours that the outputs of a tile can belong to, rounded up
    colours: int = 16
    #: whether rows are whole blocks
    even: bool = False


class Launch(NamedTuple):
    """One configuration, for channels of one number."""

    blocks: Blocks
    num_warps: int
    num_stages: int
    #: most registers of a thread; None leaves it to the compiler
    maxnreg: int | None = None

    def grid(self, places: int, outputs: int) -> tuple[int]:
        return (-(-places // self.blocks.places) * -(-outputs // self.blocks.outputs),)

    def launch(self) -> dict[str, Any]:
        """The keywords of a launch."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {
            "BLOCKS": tuple(self.blocks), "num_warps": self.num_warps,
            "num_stages": self.num_stages, **limit,
        }  # fmt: skip


#: inputs that are few: a convolution of them is bound by memory
FEW = 128
#: programs that fill a GPU, and the smallest tile side that is taken for it
PROGRAMS, SMALLEST = 132, 64

#: bytes of shared memory of a core of an H100
SHARED = 228 * 1024

#: the multiple of channels to which rows are padded: in every dtype, one then begins where 16 bytes
#: can be loaded
ALIGN = 16

#: kinds of operands: 16-bit floats; float32 in TensorFloat-32 or exactly; float64. Of each, the
#: pairs that a core of an H100 multiplies in a clock, and the bytes of one
OPERANDS = {"half": (2048, 2), "tf32": (1024, 4), "ieee": (128, 4), "float64": (64, 8)}

#: architecture -> operand -> (hidden layers, outputs, gradients by weights); BLOCK_N is the widest.
#: An architecture that is not listed takes "generic", which fits 64 KiB of shared memory.
TABLES: dict[str, dict[str, tuple[Tile, Tile, Tile]]] = {
    "sm_90": {
        "half": (Tile(256, 128, 64, 16, 3), Tile(128, 64, 64, 4, 3), Tile(64, 128, 128, 8, 2)),
        "tf32": (Tile(256, 128, 32, 16, 3), Tile(128, 64, 32, 4, 3), Tile(16, 128, 128, 8, 3)),
        "ieee": (Tile(128, 32, 16, 2, 2), Tile(64, 32, 16, 2, 2), Tile(16, 64, 64, 8, 2)),
        "float64": (Tile(64, 32, 16, 4, 2), Tile(64, 32, 16, 4, 2), Tile(16, 32, 32, 4, 2)),
    },
    "generic": {
        "half": (Tile(64, 64, 32, 4, 2), Tile(64, 32, 64, 4, 3), Tile(32, 64, 64, 4, 3)),
        "tf32": (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2), Tile(32, 64, 64, 4, 2)),
        "ieee": (Tile(64, 64, 16, 4, 2), Tile(64, 32, 16, 4, 2), Tile(16, 64, 64, 8, 2)),
        "float64": (Tile(32, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2), Tile(16, 32, 32, 4, 2)),
    },
}
TABLES["sm_100"] = dict(TABLES["sm_90"])
# Without Hopper's matrix instruction operands pass through registers, and larger tiles spill.
TABLES["sm_80"] = TABLES["sm_90"] | {name: TABLES["generic"][name] for name in ("half", "tf32")}
# AMD's warps are twice as wide: with fewer of them, each thread still reads 16 bytes.
TABLES["gfx942"] = dict(TABLES["generic"])
TABLES["gfx942"]["ieee"] = (*TABLES["generic"]["ieee"][:2], Tile(16, 64, 64, 4, 2))

#: the wavefront, on any architecture and of any operand: BLOCK_N, all units of a colour, -> its
#: tile. With the fewest pixels that a matrix unit takes, for a front has few; within 64 KiB.
WAVEFRONT = {
    16: Tile(16, 16, 64, 4, 2),
    32: Tile(16, 32, 32, 4, 2),
    64: Tile(16, 64, 16, 8, 2),
    128: Tile(16, 128, 16, 8, 2),
}


#: what is tried for hidden layers where tiles are chosen by the clock
CANDIDATES: dict[str, list[Tile]] = {
    "half": [
        Tile(128, 64, 32, 8, 4),
        Tile(128, 64, 32, 4, 4),
        Tile(128, 64, 64, 8, 3),
        Tile(64, 64, 32, 4, 4),
        Tile(128, 128, 32, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 32, 32, 4, 4),
        Tile(128, 32, 64, 4, 3),
    ],
    "tf32": [
        Tile(128, 64, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(128, 128, 32, 8, 3),
        Tile(128, 32, 32, 4, 3),
        Tile(128, 32, 16, 4, 4),
    ],
    "ieee": [Tile(64, 64, 16, 8, 2), Tile(128, 64, 16, 8, 2), Tile(64, 32, 16, 4, 2)],
    "float64": [Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2), Tile(64, 64, 16, 8, 2)],
}


def table(arch: str) -> dict[str, tuple[Tile, Tile, Tile]]:
    """Operand -> the tiles of an architecture."""
    return TABLES.get(arch, TABLES["generic"])


def architecture(device: torch.device) -> str:
    """The name under which a device's tables stand, if it has any of its own."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter runs what a GPU would
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName.split(":")[0])
    return f"sm_{properties.major}{properties.minor}"


def operand(dtype: torch.dtype, precision: str) -> str:
    """Which of :data:`OPERANDS` a dtype and a precision ("ieee" or "tf32") are."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "float64" if dtype == torch.float64 else precision


def hidden_tile(
    arch: str, operand: str, colours: int, units: int, units_in: int, places: int
) -> Launch:
    """For convolutions whose outputs are hidden layers (or any other channels by colour)."""
    tile = _tuned().get(_key(arch, operand, colours, units)) or table(arch)[operand][0]
    stride, stride_in = padded(units * colours, ALIGN), padded(units_in * colours, ALIGN)
    widest = _fit(tile.block_n, stride)
    block_m, block_n = min(
        product(_halves(tile.block_m), _halves(widest)),
        key=lambda sides: _clocks(sides[0], sides[1], places, stride, operand),
    )
    if units_in != units and stride_in <= FEW:  # few products: what is stored is the work
        block_m = min(block_m, SMALLEST)
    warps = tile.num_warps
    memory = tile.num_stages * (block_m + block_n) * tile.block_k * OPERANDS[operand][1]
    if memory < SHARED // 2:  # else a core holds one block, which needs all warps
        warps = warps * block_m * block_n // (tile.block_m * tile.block_n)
        warps = min(max(4, warps), tile.num_warps)  # as many outputs a thread, or fewer
    tile = Tile(block_m, block_n, tile.block_k, warps, tile.num_stages)
    return _launch(arch, tile, units, stride_in, stride)


def _halves(widest: int) -> list[int]:
    """What a side of a tile may be."""
    return [side for side in (widest, widest // 2, widest // 4) if side >= SMALLEST] or [widest]


def _clocks(block_m: int, block_n: int, places: int, outputs: int, operand: str) -> float:
    """Of an input, the clocks that an H100 takes at least, to multiply it or to read it from L2.

    A core is sent 23 bytes a clock; four fifths of what its taps read of the places are in L1.
    """
    pairs, size = OPERANDS[operand]
    tiles = -(-places // block_m) * -(-outputs // block_n)
    products = -(-tiles // PROGRAMS) * block_m * block_n / pairs
    return max(products, tiles / PROGRAMS * (block_m / 5 + block_n) * size / 23)


def _launch(arch: str, tile: Tile, units: int, stride_in: int, stride: int) -> Launch:
    inputs, own = _depth(tile.block_k, stride_in), _depth(tile.block_k, stride)
    even = stride_in % inputs == 0 and stride % own == 0
    colours = least((tile.block_n - 1) // units + 2)
    blocks = Blocks(tile.block_m, tile.block_n, inputs, own, colours, even)
    return Launch(blocks, tile.num_warps, tile.num_stages, _registers(arch, tile.num_warps))


def _registers(arch: str, num_warps: int) -> int | None:
    """So many that two blocks fit a core, or one of 16 warps; loops do not need what is spilled."""
    return 128 if num_warps >= 8 and arch.startswith("sm_") else None


def output_tile(arch: str, operand: str, colours: int, stride: int, places: int) -> Launch:
    """For convolutions whose outputs are the colours themselves."""
    tile = table(arch)[operand][1]
    block_m = tile.block_m
    while block_m > SMALLEST and -(-places // block_m) < PROGRAMS:
        block_m //= 2
    inputs = _depth(tile.block_k, stride)
    blocks = Blocks(block_m, _fit(tile.block_n, colours), inputs, even=stride % inputs == 0)
    warps = tile.num_warps * (2 if blocks.outputs > 32 else 1)  # an update holds much for each
    return Launch(blocks, warps, tile.num_stages, _registers(arch, warps))


class GradientPlan(NamedTuple):
    """How a gradient by weights is split."""

    tile: Launch
    taps: int  # that are written
    programs: int  # for a part
    splits: int  # parts of the positions
    per_split: int


def gradient_plan(
    arch: str, operand: str, inputs: int, outputs: int, kernel: int, positions: int,
    slopes: bool = False, pairs: int = 1,
) -> GradientPlan:  # fmt: skip
    """For gradients by the weights; channels are padded. Parts are to fill a GPU twice over."""
    tile = table(arch)[operand][2]
    block_k = _fit(tile.block_k // (2 if kernel == 3 else 1), inputs)
    block_n = _fit(tile.block_n, outputs)
    even = outputs % block_n == 0 and inputs % block_k == 0
    blocks = Blocks(tile.block_m, block_n, block_k, even=even)
    tiles = -(-outputs // blocks.outputs) * -(-inputs // block_k)
    groups = kernel if kernel == 3 else kernel**2
    programs = tiles * (groups + slopes)
    # A part is never so short that its sum costs more than its products.
    splits = max(1, min(2 * PROGRAMS // (programs * pairs), positions // (8 * blocks.places)))
    per_split = padded(-(-positions // splits), blocks.places)
    registers = _registers(arch, tile.num_warps)
    launch = Launch(blocks, tile.num_warps, tile.num_stages, registers)
    return GradientPlan(launch, kernel**2 + slopes, programs, splits, per_split)


def copy_blocks(stride: int, dtype: torch.dtype) -> tuple[int, int]:
    """Places and channels that a program copies at a time."""
    return 256 // max(4, dtype.itemsize), min(64, least(stride))


def wavefront_tile(arch: str, units: int, stride: int) -> Launch:
    """For the wavefront: a tile holds all units of a colour, and spills where they are many."""
    block_n = least(units)
    tile = WAVEFRONT.get(block_n, Tile(16, block_n, 16, 8, 1))
    own = min(tile.block_k, block_n)
    blocks = Blocks(tile.block_m, block_n, tile.block_k, own, even=stride % tile.block_k == 0)
    return Launch(blocks, tile.num_warps, tile.num_stages, _registers(arch, tile.num_warps))


def least(channels: int) -> int:
    """The least power of two that holds the channels, from 16 (the least a matrix unit takes)."""
    return max(16, 1 << (channels - 1).bit_length())


def _fit(widest: int, channels: int) -> int:
    """The same, but no more than the widest."""
    return min(widest, least(channels))


def _depth(widest: int, channels: int) -> int:
    """How many inputs to multiply at a time: wide blocks have less to do beside, but may be empty.

    Of all blocks of a row, those that multiply least, counting 16 inputs for what else each does.
    """
    depths = [1 << i for i in range(4, widest.bit_length())]
    return min(depths, key=lambda depth: -(-channels // depth) * (depth + 16))


def _key(arch: str, operand: str, colours: int, units: int) -> str:
    """What a tuned tile depends on: never the batch."""
    return f"{arch} {operand} {colours}x{units}"


def _file() -> Path:
    """Where tuned tiles are kept."""
    folder = os.environ.get("MINTNET_TRITON_CACHE", "~/.cache/mintnet_triton")
    return Path(folder).expanduser() / "tiles.json"


#: what may be wrong with the file: its folder, its contents
_UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, AttributeError)


@cache
def _tuned() -> dict[str, Tile]:
    """Tuned tiles by key, as the file has them at the first look; none if it is damaged."""
    try:
        return _read()
    except _UNREADABLE as error:
        _warn(f"tuned tiles cannot be read, so the tables hold: {type(error).__name__}: {error}")
        return {}


def _read() -> dict[str, Tile]:
    if not _file().is_file():
        return {}
    return {key: Tile(*map(int, tile)) for key, tile in json.loads(_file().read_text()).items()}


def _warn(text: str) -> None:
    warnings.warn(f"{text}. MINTNET_TRITON_CACHE chooses the folder", RuntimeWarning, stacklevel=3)


@contextmanager
def using(arch: str, operand: str, colours: int, units: int, tile: Tile) -> Iterator[None]:
    """Within the block, hidden layers of this shape use this tile."""
    tiles, key = _tuned(), _key(arch, operand, colours, units)
    previous = tiles.get(key)
    tiles[key] = tile
    try:
        yield
    finally:
        if previous is None:
            del tiles[key]
        else:
            tiles[key] = previous


def remember(arch: str, operand: str, colours: int, units: int, tile: Tile) -> str:
    """Use this tile from now on, in this process and in those to come; the key it has."""
    key = _key(arch, operand, colours, units)
    _tuned()[key] = tile
    try:
        found = _read()  # what other processes have found meanwhile is kept
    except _UNREADABLE:
        found = {}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        part = _file().with_suffix(f".{os.getpid()}")  # the file is never half written
        part.write_text(json.dumps(found | {key: tile}, indent=1))
        part.replace(_file())
    except (OSError, RuntimeError) as error:
        _warn(f"a tuned tile cannot be kept for other processes: {type(error).__name__}: {error}")
    return key
