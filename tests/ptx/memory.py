"""Global memory: the tensors of a launch, and who of its blocks has touched what.

Each storage has a space of addresses of its own, far from the others, so that nothing is ever out
of bounds of one and within another.

Blocks of a launch run in any order, so none may read what another one writes, unless an atomic
operation is between. An *era* of a block is its time between two such operations; it knows which
eras of other blocks have ended before it began.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tests.ptx.arithmetic import UNSIGNED, Array
from tests.ptx.shared import MisuseError, others_now

#: addresses of a storage, as a power of two
SPACE = 40

Update = Callable[[int, Array], Array]

#: written by several blocks, or eras, the same value
MANY = -1


@dataclass
class Region:
    """A storage; 0 is no era."""

    tensor: str  # the name of an argument that lies in it
    bytes: Array
    wrote: Array | None = None  # era of the last plain write, by cell
    stamp: Array | None = None  # interval and warp of it
    atomic: Array | None = None  # era of the last atomic operation, by cell
    reads: list[tuple[Array, Array, Array]] = field(default_factory=list)  # cells, eras, stamps


class Eras:
    """Which era of which block is known to which."""

    def __init__(self, blocks: int) -> None:
        self.now = np.arange(1, blocks + 1)
        #: of each era: its block, its number there, and how many eras of each block it knows of
        self.block = [-1, *range(blocks)]
        self.number = [0] + [1] * blocks
        nothing = np.zeros(blocks, np.int64)
        self.known = [nothing] * (blocks + 1)
        #: what the last release at an address made known
        self.released: dict[int, Array] = {}

    def acquire_and_release(self, block: int, address: int) -> None:
        """An atomic operation of a block."""
        era = self.now[block]
        known = self.known[era]
        if address in self.released:
            known = np.maximum(known, self.released[address])
        ended = known.copy()
        ended[block] = self.number[era]
        self.released[address] = ended
        self.block.append(block)
        self.number.append(self.number[era] + 1)
        self.known.append(ended)
        self.now[block] = len(self.block) - 1

    def apart(self, one: Array, other: Array) -> Array:
        """Where neither of two eras is known to have ended before the other began."""
        result = np.zeros(one.shape, bool)
        met = (one != 0) & (other != 0) & (one != other)
        met |= (one == MANY) & (other == MANY)
        if not met.any():
            return result
        for first, second in np.unique(np.stack([one[met], other[met]], 1), axis=0):
            if MANY in (first, second) or not self._ordered(first, second):
                result |= (one == first) & (other == second)
        return result

    def _ordered(self, one: int, other: int) -> bool:
        return bool(
            self.block[one] == self.block[other]
            or self.known[other][self.block[one]] >= self.number[one]
            or self.known[one][self.block[other]] >= self.number[other]
        )


class Memory:
    """The storages of tensors.

    Args:
        cell: bytes that the kernel touches at least, a power of two, at most 16.
        blocks: of the launch.
    """

    def __init__(self, tensors: dict[str, Tensor], cell: int, blocks: int) -> None:
        self.cell = cell
        self.eras = Eras(blocks)
        self.regions: list[Region] = []
        self._bases: dict[int, int] = {}  # by where a storage is
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._bases:
                space = (len(self.regions) + 1) << SPACE
                # No more aligned than it is where that is less than torch aligns.
                self._bases[storage.data_ptr()] = space + storage.data_ptr() % 64
                view = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.regions.append(Region(name, view.detach().numpy()))
        self._starts = np.array([base & (1 << SPACE) - 1 for base in self._bases.values()])
        self._sizes = np.array([len(region.bytes) for region in self.regions])

    def address(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage().data_ptr()
        return self._bases[storage] + tensor.data_ptr() - storage

    def _split(self, address: Array, size: int) -> Iterator[tuple[Region, Array | slice, Array]]:
        """For each storage that is met: which accesses, and where in it.

        Raises:
            MisuseError: out of bounds, or not aligned.
        """
        if not len(address):
            return
        address = address.astype(np.int64)
        if (address % size).any():
            raise MisuseError(
                f"{size} bytes of global memory at an address that is no multiple of that"
            )
        spaces = (address >> SPACE) - 1
        known = (spaces >= 0) & (spaces < len(self.regions))
        if not known.all():
            raise MisuseError(f"global memory at {int(address[~known][0])}, which is nowhere")
        offset = (address & (1 << SPACE) - 1) - self._starts[spaces]
        outside = (offset < 0) | (offset + size > self._sizes[spaces])
        if outside.any():
            space, worst = spaces[outside][0], int(offset[outside][0])
            if worst > 1 << (SPACE - 1):
                worst -= 1 << SPACE
            name, has = self.regions[space].tensor, self._sizes[space]
            raise MisuseError(f"{size} bytes of global memory at {worst} in {name}, of {has} bytes")
        if (spaces == spaces[0]).all():
            yield self.regions[spaces[0]], slice(None), offset
        else:
            for space in np.unique(spaces):
                here = spaces == space
                yield self.regions[space], here, offset[here]

    def load(self, address: Array, size: int, elements: int, era: Array, stamp: Array) -> Array:
        """Numbers of ``size`` bytes, (accesses, elements), that lie side by side."""
        result = np.empty((len(address), elements), UNSIGNED[size])
        for region, which, offset in self._split(address, size * elements):
            self._note_read(region, offset, size * elements, era[which], stamp[which])
            result[which] = _numbers(region, size)[offset[:, None] // size + np.arange(elements)]
        return result

    def note_read(self, address: Array, size: int, era: Array, stamp: Array) -> None:
        """A copy that will read later."""
        for region, which, offset in self._split(address, size):
            self._note_read(region, offset, size, era[which], stamp[which])

    def fetch(self, address: Array, size: int) -> Array:
        """Bytes (accesses, size) of a read that has been noted."""
        result = np.empty((len(address), size), np.uint8)
        for region, which, offset in self._split(address, size):
            result[which] = region.bytes[offset[:, None] + np.arange(size)]
        return result

    def _note_read(
        self, region: Region, offset: Array, size: int, era: Array, stamp: Array
    ) -> None:
        cells = self._cells(offset, size)
        era, stamp = era[:, None], stamp[:, None]
        if region.wrote is not None:
            assert region.stamp is not None
            own = region.wrote[cells] == era
            if (own & others_now(region.stamp[cells], stamp)).any():
                raise MisuseError(
                    f"reads what another warp has written to {region.tensor} since the last barrier"
                )
        region.reads.append((cells, era, stamp))

    def store(self, address: Array, numbers: Array, era: Array, stamp: Array) -> None:
        """Write numbers (accesses, elements) side by side."""
        size, elements = numbers.dtype.itemsize, numbers.shape[1]
        for region, which, offset in self._split(address, size * elements):
            memory, new = _numbers(region, size), numbers[which]
            where = offset[:, None] // size + np.arange(elements)
            if region.wrote is None or region.stamp is None:
                region.wrote = np.zeros(-(-len(region.bytes) // self.cell), np.int32)
                region.stamp = np.zeros(region.wrote.shape, np.int64)
            cells = self._cells(offset, size * elements)
            now, moment = era[which][:, None], stamp[which][:, None]
            before = region.wrote[cells]
            changed = (memory[where] != new).any(1, keepdims=True)
            foreign = self.eras.apart(*np.broadcast_arrays(before, now))
            if (foreign & changed).any():
                raise MisuseError(f"writes to what another block has written to {region.tensor}")
            if ((before == now) & changed & others_now(region.stamp[cells], moment)).any():
                raise MisuseError(
                    f"writes to what another warp has written to {region.tensor} "
                    "since the last barrier"
                )
            memory[where] = new
            if (memory[where] != new).any():
                raise MisuseError(
                    f"threads write different values to the same place of {region.tensor}"
                )
            region.wrote[cells] = np.where(foreign, MANY, now)
            region.stamp[cells] = moment
            now = np.broadcast_to(now, cells.shape)
            mixed = region.wrote[cells] != now
            region.wrote[cells[mixed]] = MANY

    def atomic(
        self, address: Array, size: int, eras: Array, synchronises: bool, update: Update
    ) -> Array:
        """Change numbers one after the other, in the order of the threads; what they were.

        Args:
            eras: of the threads; those of their blocks end, if it ``synchronises``.
            update: gives the new number, of the number of the access and the old one.
        """
        old = np.empty(len(address), UNSIGNED[size])
        blocks = [self.eras.block[era] for era in eras]
        accesses = np.arange(len(address))
        for region, which, offset in self._split(address, size):
            if region.atomic is None:
                region.atomic = np.zeros(-(-len(region.bytes) // self.cell), np.int32)
            memory = _numbers(region, size)
            for i, place in zip(accesses[which], offset, strict=True):
                region.atomic[self._cells(place[None], size)] = self.eras.now[blocks[i]]
                old[i] = memory[place // size]
                memory[place // size] = update(i, old[i : i + 1])[0]
                if synchronises:
                    self.eras.acquire_and_release(blocks[i], int(address[i]))
        return old

    def _cells(self, offset: Array, size: int) -> Array:
        return np.asarray(offset[:, None] // self.cell + np.arange(size // self.cell))

    def check_blocks(self) -> None:
        """At the end of a launch.

        Raises:
            MisuseError: a block has read what another one has written or changed, or a warp what
                another one wrote later in the same interval.
        """
        for region in self.regions:
            if region.wrote is not None and region.atomic is not None:
                both = self.eras.apart(region.wrote, region.atomic)
                if both.any():
                    raise MisuseError(
                        f"one block writes what another one changes in {region.tensor}"
                    )
            for changed in (region.wrote, region.atomic):
                if changed is None:
                    continue
                for cells, eras, stamp in region.reads:
                    found = changed[cells]
                    if self.eras.apart(found, np.broadcast_to(eras, found.shape)).any():
                        raise MisuseError(
                            f"a block reads what another one writes to {region.tensor}"
                        )
                    if changed is region.wrote and region.stamp is not None:
                        later = others_now(region.stamp[cells], stamp) & (found == eras)
                        if later.any():
                            raise MisuseError(
                                f"a warp writes to what another one has read of {region.tensor} "
                                "since the last barrier"
                            )


def _numbers(region: Region, size: int) -> Array:
    """A storage as numbers of that many bytes."""
    return region.bytes[: len(region.bytes) // size * size].view(UNSIGNED[size])
