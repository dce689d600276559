"""MNIST, Fashion-MNIST and CIFAR-10 in the files that their authors published.

None of these formats says what is damaged, so all that can be checked is, and names the file.
"""

import gzip
import io
import math
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CLASSES = 10  # of each of these sets

_CIFAR10_PLACES = (
    "cifar-10-batches-py",
    "cifar-10-batches-bin",
    "cifar-10-python.tar.gz",
    "cifar-10-binary.tar.gz",
)
_CIFAR10_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_CIFAR10_FILES = {f"{batch}{end}" for batch in _CIFAR10_BATCHES for end in ("", ".bin")}


class Part(NamedTuple):
    """What is trained on or tested on."""

    images: NDArray[np.uint8]  #: (N, C, H, W)
    labels: NDArray[np.int64]  #: (N,), 0 to 9


def read_mnist(folder: Path) -> tuple[Part, Part] | None:
    """The idx files of MNIST or of Fashion-MNIST, which have the same names.

    Args:
        folder: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of
            ``t10k``, also spelled ``train-images.idx3-ubyte``; each as it is or gzipped.

    Returns:
        Training and test images, (N, 1, 28, 28); None if the folder holds none of these files.

    Raises:
        FileNotFoundError: only some of the files are there; says which are missing.
        ValueError: names a file that is damaged, or holds other images or labels.
    """
    names = [
        f"{part}-{kind}-ubyte"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    paths = [_spelled(folder, name) for name in names]
    found = [path for path in paths if path is not None]
    if not found:
        return None
    if len(found) < len(names):
        missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    train, test = (_mnist_part(*pair) for pair in (found[:2], found[2:]))
    return train, test


def _spelled(folder: Path, name: str) -> Path | None:
    for spelling in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path
    return None


def _mnist_part(images_path: Path, labels_path: Path) -> Part:
    images, labels = _read_idx(images_path, axes=3), _read_idx(labels_path, axes=1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path}: images must be of (28, 28), got {images.shape[1:]}")
    return _checked(images[:, None], labels.tolist(), labels_path)


def _read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    content = path.read_bytes()
    # By what it holds, since browsers unpack files and leave them their names.
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    kind, start = bytes([0, 0, 8, axes]), 4 + 4 * axes
    if content[:4] != kind:
        raise ValueError(
            f"{path} must begin with {kind.hex()}, as idx files of bytes in {axes} axes do, got "
            f"{content[:4].hex() or 'nothing'}"
        )
    if len(content) < start:
        raise ValueError(f"{path} must have a header of {start} bytes, got {len(content)} bytes")
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} must hold {math.prod(shape)} bytes after its header, which says {shape}, got "
            f"{len(content) - start}"
        )
    return np.frombuffer(content, np.uint8)[start:].reshape(shape)


def read_cifar10(path: Path) -> tuple[Part, Part] | None:
    """CIFAR-10's batches, pickled for Python or binary, in their archive or unpacked.

    Args:
        path: an archive, the folder of the batches, or a folder that holds
            ``cifar-10-batches-py``, ``cifar-10-batches-bin``, ``cifar-10-python.tar.gz`` or
            ``cifar-10-binary.tar.gz``; the first of these that is there is read.

    Returns:
        Training and test images, (N, 3, 32, 32); None if nothing of this is there.

    Raises:
        FileNotFoundError: only some of the batches are there; says which are missing.
        ValueError: names a file that is damaged, or holds other images or labels.
    """
    for place in (path, *(path / name for name in _CIFAR10_PLACES)):
        if place.is_file():
            return _cifar10_parts(place, _archived(place))
        unpacked = {name: place / name for name in _CIFAR10_FILES if (place / name).is_file()}
        if unpacked:
            contents = {name: file.read_bytes() for name, file in unpacked.items()}
            return _cifar10_parts(place, contents)
    return None


def _archived(path: Path) -> dict[str, bytes]:
    """The batches in an archive, by the last part of their names; nothing is unpacked to disk."""
    contents = {}
    try:
        with gzip.open(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = Path(member.name).name
                    if name in _CIFAR10_FILES and (file := archive.extractfile(member)):
                        contents[name] = file.read()
            while stream.read(1 << 20):  # the checksum comes after the archive's end
                pass
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole .tar.gz archive: {error}") from error
    return contents


def _cifar10_parts(place: Path, contents: dict[str, bytes]) -> tuple[Part, Part]:
    binary = any(name.endswith(".bin") for name in contents)
    end, read = (".bin", _binary_batch) if binary else ("", _pickled_batch)
    names = [f"{batch}{end}" for batch in _CIFAR10_BATCHES]
    missing = [name for name in names if name not in contents]
    if missing:
        raise FileNotFoundError(f"{place} lacks {', '.join(missing)}")
    *parts, test = (read(contents[name], place / name) for name in names)
    # Binary batches have no header: this tells of one that ends after a whole image.
    sizes = [len(part.labels) for part in (*parts, test)]
    if len(set(sizes)) > 1:
        raise ValueError(f"{place}: batches must have equally many images, got {sizes}")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Part(images, labels), test


def _binary_batch(content: bytes, path: Path) -> Part:
    if len(content) % 3073:
        raise ValueError(f"{path} must hold images of 3073 bytes each, got {len(content)} bytes")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return _checked(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].tolist(), path)


def _pickled_batch(content: bytes, path: Path) -> Part:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        data, labels = batch[b"data"], batch[b"labels"]
    except Exception as error:  # what damaged bytes make pickle raise has no common type
        raise ValueError(f"{path} is not a whole batch of CIFAR-10: {error!r}") from error
    if not isinstance(data, np.ndarray):
        raise ValueError(f"{path}: data must be an array, got {type(data)}")
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(
            f"{path}: data must be (N, 3072) of uint8, got {data.shape} of {data.dtype}"
        )
    if not isinstance(labels, list):
        raise ValueError(f"{path}: labels must be a list, got {type(labels)}")
    return _checked(data.reshape(-1, 3, 32, 32), labels, path)


def _bytes_type(code: object, *_: object) -> "np.dtype[np.uint8]":
    """The type that a pickled array is of: numpy's own takes others, and warns of old pickles."""
    if code not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"arrays must be of uint8 (u1), got {code!r}")
    return np.dtype(np.uint8)


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _bytes_type,
}


class _Unpickler(pickle.Unpickler):
    """Makes plain containers and arrays of bytes, and looks up nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"arrays and lists are admitted, and not {module}.{name}")
        return _ADMITTED[module, name]


def _checked(images: NDArray[np.uint8], labels: list[Any], path: Path) -> Part:
    if len(images) != len(labels):
        raise ValueError(f"{path} must have labels of {len(images)} images, got {len(labels)}")
    if not labels:
        raise ValueError(f"{path} has no images")
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < CLASSES:
            raise ValueError(
                f"{path}: label must be an integer from 0 to {CLASSES - 1}, got {label!r} for "
                f"image {index}"
            )
    return Part(images.copy(), np.array(labels, np.int64))  # those of a file cannot be written to
