"""Shared memory, which notices what a GPU does not tell.

For every cell, the least that the kernel ever touches at once, it is known who wrote it last and
who read it since: a *stamp* is an interval between two barriers of the block, and a warp. So races
are found whatever order the warps have run in.
"""

import numpy as np

from tests.ptx.arithmetic import UNSIGNED, Array

#: in place of a warp: more than one of them. A block has at most 32.
SEVERAL = 63

NEVER = -1


class MisuseError(Exception):
    """What a kernel may not do."""


def stamps(interval: Array, warp: Array | int) -> Array:
    stamp: Array = interval << 6 | warp
    return stamp


def others_now(found: Array, stamp: Array) -> Array:
    """Where what is found is of the same interval, and not of that warp alone."""
    return np.asarray((found != stamp) & (found >> 6 == stamp >> 6))


class Shared:
    """The shared memory of some blocks; a *place* is an address in all of it.

    Args:
        size: bytes of a block.
        cell: bytes of a cell, a power of two, at most 16.
        copies_fenced: whether what ``cp.async`` writes needs a fence, too, before wgmma reads it.
    """

    def __init__(self, size: int, blocks: int, cell: int, copies_fenced: bool) -> None:
        self.size = size
        self.copies_fenced = copies_fenced
        self.cell = cell
        self.stride = (size // 1024 + 1) * 1024  # swizzles count from a multiple of 1024 bytes
        self.bytes = np.full(blocks * self.stride, 0xFF, np.uint8)
        cells = len(self.bytes) // cell
        self.wrote = np.full(cells, NEVER, np.int64)
        self.read = np.full(cells, NEVER, np.int64)
        #: whether a cp.async copy is on its way to a cell
        self.coming = np.zeros(cells, bool)
        #: wgmma instructions under way that read a cell
        self.wanted = np.zeros(cells, np.int16)
        #: written by threads, and no fence has shown it to the units that read memory themselves
        self.unfenced = np.zeros(cells, bool)

    def view(self, size: int) -> Array:
        """All memory as numbers of that many bytes."""
        return self.bytes.view(UNSIGNED[size])

    def places(self, address: Array, block: Array, size: int) -> Array:
        """Places of accesses of ``size`` bytes at addresses in a block.

        Raises:
            MisuseError: out of bounds, or not aligned.
        """
        address = address.astype(np.int64)
        outside = (address < 0) | (address + size > self.size)
        if outside.any():
            worst = int(address[outside][0])
            raise MisuseError(f"{size} bytes of shared memory at {worst}, beyond its {self.size}")
        if (address % size).any():
            raise MisuseError(
                f"{size} bytes of shared memory at an address that is no multiple of that"
            )
        return np.asarray(address + block * self.stride)

    def cells(self, places: Array, size: int) -> Array:
        """The cells of accesses, with an axis more."""
        return np.asarray(places[..., None] // self.cell + np.arange(size // self.cell))

    def check_read(self, cells: Array, stamp: Array) -> None:
        """Note a read.

        Raises:
            MisuseError: nobody has written there, or a copy is on its way, or another warp has
                written since the last barrier.
        """
        if self.coming[cells].any():
            raise MisuseError("reads shared memory that a copy is still on its way to")
        wrote = self.wrote[cells]
        if (wrote == NEVER).any():
            raise MisuseError("reads shared memory that nobody has written")
        if others_now(wrote, stamp).any():
            raise MisuseError("reads what another warp has written since the last barrier")
        several = stamp | SEVERAL
        self.read[cells] = np.where(others_now(self.read[cells], stamp), several, stamp)
        mixed = others_now(self.read[cells], stamp)  # of the same instruction, too
        if mixed.any():
            self.read[cells[mixed]] = np.broadcast_to(several, cells.shape)[mixed]

    def check_write(self, cells: Array, stamp: Array, new: Array | None = None) -> None:
        """Note a write by threads, or the start of a copy.

        Args:
            new: bytes of each access; those of a copy are not known, and taken to differ.

        Raises:
            MisuseError: a copy or a wgmma under way uses it, or another warp has read it since the
                last barrier, or written another value.
        """
        if self.coming[cells].any():
            raise MisuseError("writes to shared memory that a copy is still on its way to")
        if self.wanted[cells].any():
            raise MisuseError("writes to shared memory that a wgmma under way may yet read")
        if others_now(self.read[cells], stamp).any():
            raise MisuseError("writes to what another warp has read since the last barrier")
        others = others_now(self.wrote[cells], stamp)
        if others.any() and (new is None or (others & self._differs(cells, new)).any()):
            raise MisuseError("writes to what another warp has written since the last barrier")
        self.wrote[cells] = stamp
        self.unfenced[cells] = self.copies_fenced or new is not None

    def note_copied(self, cells: Array, stamp: Array) -> None:
        """A warp has waited for its copies to these cells."""
        self.coming[cells] = False
        self.wrote[cells] = stamp
        self.unfenced[cells] = self.copies_fenced

    def _differs(self, cells: Array, new: Array) -> Array:
        """Whether cells hold other bytes."""
        old = self.bytes.reshape(-1, self.cell)[cells]
        return np.asarray((old != new.reshape(old.shape)).any(-1))

    def store(self, places: Array, numbers: Array, stamp: Array) -> None:
        """Write numbers (accesses, elements) side by side.

        Raises:
            MisuseError: see :meth:`check_write`; or threads write other values to one place.
        """
        size = numbers.dtype.itemsize
        numbers = np.ascontiguousarray(numbers)
        new = numbers.view(np.uint8)
        cells = self.cells(places, new.shape[1])
        self.check_write(cells, stamp[:, None], new)
        memory = self.view(size)
        where = places[:, None] // size + np.arange(numbers.shape[1])
        memory[where] = numbers
        if (memory[where] != numbers).any():
            raise MisuseError("threads write different values to the same shared memory at once")

    def load(self, places: Array, size: int, elements: int, stamp: Array) -> Array:
        """Numbers (accesses, elements) that lie side by side.

        Raises:
            MisuseError: see :meth:`check_read`.
        """
        self.check_read(self.cells(places, size * elements), stamp[:, None])
        return np.asarray(self.view(size)[places[:, None] // size + np.arange(elements)])

    def fence(self, blocks: Array, stamp: Array) -> None:
        """Show the units that read by themselves what some threads know to be written."""
        for block in np.unique(blocks):
            own = slice(block * self.stride // self.cell, (block + 1) * self.stride // self.cell)
            now = stamp[blocks == block]
            wrote = self.wrote[own]
            self.unfenced[own] &= (wrote >> 6 == now[0] >> 6) & ~np.isin(wrote, now)
