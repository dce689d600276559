"""Tile sizes of the kernels, per architecture: the one room of numbers that only a clock can judge.

A tile multiplies BLOCK_M pixels, BLOCK_N output channels and BLOCK_K input channels at a time.
The tables hold the largest ones. A tile computes what *any* of its channels sees, so large blocks
of channels waste what the mask saves: hidden layers take the largest that waste little enough.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from mintnet_triton.kernels.work import exact, scheduled


class Tile(NamedTuple):
    """One configuration of a kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: most multiply-adds of a tile's schedule, as a multiple of those that the mask leaves
WASTE = 1.35

#: kinds of operands: 16-bit floats; float32 in TensorFloat-32 or exactly; float64
OPERANDS = ("half", "tf32", "ieee", "float64")

#: architecture -> operand -> (hidden layers, outputs, gradients by weights); BLOCK_N is the widest.
#: An architecture that is not listed takes "generic", which fits 64 KiB of shared memory.
TABLES: dict[str, dict[str, tuple[Tile, Tile, Tile]]] = {
    "sm_90": {
        "half": (Tile(128, 64, 32, 8, 3), Tile(64, 32, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
        "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 32, 64, 4, 3), Tile(32, 64, 64, 4, 3)),
        "ieee": (Tile(64, 64, 16, 4, 2), Tile(64, 32, 16, 4, 2), Tile(16, 64, 64, 8, 2)),
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


def _table(arch: str) -> dict[str, tuple[Tile, Tile, Tile]]:
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


def hidden_tile(arch: str, operand: str, colours: int, units: int, inputs: int) -> Tile:
    """For convolutions whose outputs are hidden layers (or any other channels by colour)."""
    tuned = _tuned().get(_key(arch, operand, colours, units))
    if tuned is not None:
        return tuned._replace(block_k=_fit(tuned.block_k, inputs))
    tile = _table(arch)[operand][0]
    block_n, block_k = _hidden_blocks(tile.block_n, tile.block_k, colours, units)
    return tile._replace(block_n=block_n, block_k=_fit(block_k, inputs))


@cache
def _hidden_blocks(widest_n: int, widest_k: int, colours: int, units: int) -> tuple[int, int]:
    """The largest blocks within WASTE of what the mask leaves of a 3 x 3 kernel, or the nearest."""
    structure = (units, units, colours, 3, "channel", "lower")
    widest_n, widest_k = _fit(widest_n, colours * units), _fit(widest_k, colours * units)
    candidates = [
        (n, k)
        for n in (widest_n, widest_n // 2)
        for k in (widest_k, widest_k // 2)
        if min(n, k) >= 16
    ]
    limit = WASTE * exact(*structure)
    work = [scheduled(*structure, n, k) for n, k in candidates]
    within = [blocks for blocks, count in zip(candidates, work, strict=True) if count <= limit]
    return within[0] if within else candidates[work.index(min(work))]


def output_tile(arch: str, operand: str, colours: int, area: int) -> Tile:
    """For convolutions whose outputs are the colours themselves; no tile spans two images."""
    tile = _table(arch)[operand][1]
    return tile._replace(block_m=_fit(tile.block_m, area), block_n=_fit(tile.block_n, colours))


def gradient_tile(arch: str, operand: str, inputs: int, outputs: int) -> Tile:
    """For gradients by the weights."""
    tile = _table(arch)[operand][2]
    return tile._replace(block_n=_fit(tile.block_n, outputs), block_k=_fit(tile.block_k, inputs))


def wavefront_tile(units: int) -> Tile:
    """For the wavefront: a tile holds all units of a colour, and spills where they are many."""
    block_n = _least(units)
    return WAVEFRONT.get(block_n, Tile(16, block_n, 16, 8, 1))


def _least(channels: int) -> int:
    """The least power of two that holds the channels, from 16 (the least a matrix unit takes)."""
    return max(16, 1 << (channels - 1).bit_length())


def _fit(widest: int, channels: int) -> int:
    """The same, but no more than the widest."""
    return min(widest, _least(channels))


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
