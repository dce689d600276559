"""MNIST's, Fashion-MNIST's and CIFAR-10's original files, whole and damaged, as small ones."""

import gzip
import io
import json
import math
import pickle
import pickletools
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from mintnet_triton.__main__ import main
from mintnet_triton.recipes.data import DataNotFoundError, ImageData, ImageSet, load_images
from mintnet_triton.recipes.runs import RunFolder
from tests.hub import write_parquet

pytestmark = pytest.mark.usefixtures("offline")

RNG = np.random.default_rng(0)


def in_memory(data: ImageData) -> tuple[ImageSet, ImageSet]:
    assert isinstance(data.train, ImageSet)
    assert isinstance(data.test, ImageSet)
    return data.train, data.test


# --- idx -----------------------------------------------------------------------------------------

GREY = {
    part: (RNG.integers(0, 256, (count, 28, 28), np.uint8), RNG.integers(0, 10, count))
    for part, count in (("train", 12), ("t10k", 5))
}
DASHED = ("{}-images-idx3-ubyte", "{}-labels-idx1-ubyte")
DOTTED = ("{}-images.idx3-ubyte", "{}-labels.idx1-ubyte")


def idx(values: NDArray[Any]) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(
    folder: Path,
    names: tuple[str, str] = DASHED,
    end: str = "",
    packed: Callable[[bytes], bytes] = bytes,
) -> Path:
    for part, arrays in GREY.items():
        for name, values in zip(names, arrays, strict=True):
            (folder / (name.format(part) + end)).write_bytes(packed(idx(values)))
    return folder


@pytest.mark.parametrize("names", [DASHED, DOTTED])
@pytest.mark.parametrize(
    ("end", "packed"),
    [("", bytes), (".gz", gzip.compress), (".gz", bytes), ("", gzip.compress)],
)
@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_idx_files(
    name: Any, end: str, packed: Callable[[bytes], bytes], names: tuple[str, str], tmp_path: Path
) -> None:
    data = load_images(name, write_idx(tmp_path, names, end, packed), labelled=True)
    assert (data.name, data.shape, data.levels, data.classes) == (name, (1, 28, 28), 256, 10)
    for split, (images, labels) in zip(in_memory(data), GREY.values(), strict=True):
        assert split.images.dtype == torch.uint8
        assert torch.equal(split.images, torch.from_numpy(images)[:, None])
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.labels, torch.from_numpy(labels))
        split.images.add_(1)  # it is memory of its own
    rest, held = data.hold_out(4)
    assert (rest.train.count(), held.count()) == (8, 4)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
WHOLE = idx(GREY["train"][0])


DAMAGED_IDX = {
    "empty": (IMAGES, b"", "must begin with 00000803.* got nothing"),
    "a page": (IMAGES, b"<html>", "must begin with 00000803.* got 3c68746d"),
    "labels": (IMAGES, idx(GREY["train"][1]), "must begin with 00000803.* got 00000801"),
    "images": (LABELS, idx(GREY["t10k"][0]), "must begin with 00000801.* got 00000803"),
    "float": (IMAGES, b"\0\0\x0d\x03" + WHOLE[4:], "must begin with 00000803.* got 00000d03"),
    "header": (IMAGES, WHOLE[:11], "must have a header of 16 bytes, got 11 bytes"),
    "short": (IMAGES, WHOLE[:-1], r"must hold 9408 bytes .*\[12, 28, 28\], got 9407"),
    "long": (IMAGES, WHOLE + b"\0", r"must hold 9408 bytes .*\[12, 28, 28\], got 9409"),
    "shape": (IMAGES, idx(GREY["train"][0][:, 1:]), r"must be of \(28, 28\), got \(27, 28\)"),
    "gzip short": (IMAGES, gzip.compress(WHOLE)[:-9], "is not a whole gzip file: .*ended"),
    "gzip header": (IMAGES, gzip.compress(WHOLE)[:15], "is not a whole gzip file: .*ended"),
    "number": (LABELS, idx(GREY["t10k"][1][:4]), "must have labels of 5 images, got 4"),
    "class": (LABELS, idx(np.array([1, 2, 3, 10, 4])), "from 0 to 9, got 10 for image 3"),
}


@pytest.mark.parametrize("damage", DAMAGED_IDX)
def test_a_damaged_idx_file_is_named(damage: str, tmp_path: Path) -> None:
    name, content, message = DAMAGED_IDX[damage]
    path = write_idx(tmp_path) / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}:? .*{message}"):
        load_images("fashion", tmp_path)


def damaged(content: bytes, place: int) -> bytes:
    """Compressed content, with two bits of a byte changed."""
    whole = bytearray(content)
    whole[place] ^= 6
    return bytes(whole)


@pytest.mark.parametrize("place", [-5, -1, 2000, 10])
def test_a_checksum_is_minded(place: int, tmp_path: Path) -> None:
    """That of the values, their number, what was compressed itself, and how it was."""
    path = write_idx(tmp_path, end=".gz", packed=gzip.compress) / f"{IMAGES}.gz"
    path.write_bytes(damaged(path.read_bytes(), place))
    with pytest.raises(ValueError, match=f"^{path} is not a whole gzip file: "):
        load_images("mnist", tmp_path)


def test_no_images_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(GREY["t10k"][0][:0]))
    (tmp_path / LABELS).write_bytes(idx(GREY["t10k"][1][:0]))
    with pytest.raises(ValueError, match=f"^{tmp_path / LABELS} has no images"):
        load_images("mnist", tmp_path)


@pytest.mark.parametrize("missing", [IMAGES, LABELS])
def test_a_missing_idx_file_is_named(missing: str, tmp_path: Path) -> None:
    (write_idx(tmp_path) / missing).unlink()
    command = "hf download zalando-datasets/fashion_mnist --repo-type dataset"
    with pytest.raises(DataNotFoundError, match=rf"^{tmp_path} lacks {missing};[^$]*{command}"):
        load_images("fashion", tmp_path)


def test_fashion_as_the_hub_has_it(tmp_path: Path) -> None:
    write_parquet(tmp_path, "image", (28, 28), {"train": 12, "test": 5})
    train, test = in_memory(load_images("fashion", tmp_path))
    assert torch.equal(train.images[:, 0, 3, 4], torch.arange(12).byte())
    assert torch.equal(test.labels, torch.arange(5))


# --- CIFAR-10 ------------------------------------------------------------------------------------

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
COLOUR = {
    name: (RNG.integers(0, 256, (4, 3, 32, 32), np.uint8), RNG.integers(0, 10, 4).tolist())
    for name in BATCHES
}


def python2_pickle(images: NDArray[Any], labels: Any, kind: bytes = b"u1") -> bytes:
    """A batch as Python 2 and its numpy pickled it: their strings are bytes."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    rows = images.reshape(len(images), math.prod(images.shape[1:]))
    shape = b"".join(b"J" + struct.pack("<i", length) for length in rows.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + shape + b"cnumpy\ndtype\n" + text(kind) + b"K\x00K\x01\x87R(K\x03"
    array += text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb\x89"
    array += text(rows.tobytes()) + b"tb"
    listed = pickle.dumps(labels, protocol=2)[2:-1]
    batch = b"\x80\x02}(" + text(b"batch_label") + text(b"training batch 1 of 5")
    batch += text(b"labels") + listed + text(b"data") + array + b"u."
    pickletools.dis(batch, io.StringIO())  # raises where it is no pickle
    return batch


def python3_pickle(images: NDArray[Any], labels: Any, protocol: int = 4) -> bytes:
    batch = {b"data": images.reshape(len(images), math.prod(images.shape[1:])), b"labels": labels}
    return pickle.dumps(batch, protocol)


def binary(images: NDArray[np.uint8], labels: list[int]) -> bytes:
    rows = zip(images, labels, strict=True)
    return b"".join(bytes([label]) + image.tobytes() for image, label in rows)


def batches(encode: Callable[..., bytes]) -> dict[str, bytes]:
    end = ".bin" if encode is binary else ""
    return {f"{name}{end}": encode(*content) for name, content in COLOUR.items()}


def unpacked(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def archived(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {**contents, "readme.html": b"<html>"}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def check_cifar10(path: Path) -> None:
    train, test = in_memory(load_images("cifar10", path, labelled=True))
    for split, names in ((train, BATCHES[:5]), (test, BATCHES[5:])):
        images = np.concatenate([COLOUR[name][0] for name in names])
        assert split.images.dtype == torch.uint8
        assert torch.equal(split.images, torch.from_numpy(images))
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == [label for name in names for label in COLOUR[name][1]]
        split.images.add_(1)  # it is memory of its own


@pytest.mark.parametrize("encode", [python2_pickle, python3_pickle, binary])
def test_cifar10s_batches(encode: Callable[..., bytes], tmp_path: Path) -> None:
    kind = ("bin", "binary") if encode is binary else ("py", "python")
    folder = unpacked(tmp_path / f"cifar-10-batches-{kind[0]}", batches(encode))
    check_cifar10(folder)
    check_cifar10(tmp_path)
    for file in folder.iterdir():
        file.unlink()
    archive = archived(tmp_path / f"cifar-10-{kind[1]}.tar.gz", batches(encode))
    check_cifar10(archive)
    check_cifar10(tmp_path)


def evil(_: Any, __: Any) -> bytes:
    return b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."


def made() -> bytes:
    """A batch whose array is none that was pickled, but a new one."""
    array = b"cnumpy\nndarray\nK\x04M\x00\x0c\x86U\x02f4\x86R"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x01K\x01K\x01K\x01eu."


IMAGES_4, LABELS_4 = COLOUR["data_batch_2"]


DAMAGED_PICKLES = {
    "call": (evil(None, None), "arrays and lists are admitted, and not os.system"),
    "path": (pickle.dumps(Path("x")), "arrays and lists are admitted, and not pathlib"),
    "cut": (python2_pickle(IMAGES_4, LABELS_4)[:-9], "is not a whole batch"),
    "half": (python2_pickle(IMAGES_4, LABELS_4)[:200], "is not a whole batch"),
    "empty": (b"", "is not a whole batch"),
    "list": (pickle.dumps([1, 2]), "is not a whole batch"),
    "no labels": (pickle.dumps({b"data": 1}), "is not a whole batch.*labels"),
    "no array": (
        pickle.dumps({b"data": 1, b"labels": [1]}),
        "data must be an array, got <class 'int'>",
    ),
    "float": (python3_pickle(IMAGES_4.astype(np.float32), LABELS_4), r"of uint8 \(u1\), got 'f4'"),
    "made": (made(), r"of uint8, got \(4, 3072\) of float32"),
    "objects": (python2_pickle(IMAGES_4, LABELS_4, b"O8"), r"of uint8 \(u1\), got b'O8'"),
    "shape": (python2_pickle(IMAGES_4[:, 1:], LABELS_4), r"\(N, 3072\) of uint8, got \(4, 2048\)"),
    "no list": (python2_pickle(IMAGES_4, 3), "labels must be a list, got <class 'int'>"),
    "class": (python2_pickle(IMAGES_4, [1, 2, 10, 3]), "from 0 to 9, got 10 for image 2"),
    "negative": (python2_pickle(IMAGES_4, [1, 2, 3, -1]), "from 0 to 9, got -1 for image 3"),
    "bool": (python2_pickle(IMAGES_4, [True, 2, 3, 4]), "from 0 to 9, got True for image 0"),
    "fraction": (python2_pickle(IMAGES_4, [1.0, 2, 3, 4]), "from 0 to 9, got 1.0 for image 0"),
    "number": (python2_pickle(IMAGES_4, LABELS_4[:3]), "must have labels of 4 images, got 3"),
    "no images": (python2_pickle(IMAGES_4[:0], []), "has no images"),
}


@pytest.mark.parametrize("damage", DAMAGED_PICKLES)
def test_a_damaged_pickle_is_named(damage: str, tmp_path: Path) -> None:
    content, message = DAMAGED_PICKLES[damage]
    contents = {**batches(python2_pickle), "data_batch_2": content}
    folder = unpacked(tmp_path / "cifar-10-batches-py", contents)
    with pytest.raises(ValueError, match=f"^{folder / 'data_batch_2'}:? .*{message}"):
        load_images("cifar10", tmp_path)


DAMAGED_BINARY = {
    "cut": (binary(IMAGES_4, LABELS_4)[:-1], "must hold images of 3073 bytes .*got 12291 bytes"),
    "empty": (b"", "has no images"),
    "class": (binary(IMAGES_4, [1, 2, 200, 3]), "from 0 to 9, got 200 for image 2"),
}


@pytest.mark.parametrize("damage", DAMAGED_BINARY)
def test_a_damaged_binary_batch_is_named(damage: str, tmp_path: Path) -> None:
    content, message = DAMAGED_BINARY[damage]
    contents = {**batches(binary), "data_batch_2.bin": content}
    archive = archived(tmp_path / "cifar-10-binary.tar.gz", contents)
    with pytest.raises(ValueError, match=f"^{archive / 'data_batch_2.bin'}:? .*{message}"):
        load_images("cifar10", tmp_path)


@pytest.mark.parametrize("encode", [python2_pickle, binary])
def test_batches_are_of_one_size(encode: Callable[..., bytes], tmp_path: Path) -> None:
    contents = batches(encode)
    last = list(contents)[-1]
    contents[last] = encode(IMAGES_4[:3], LABELS_4[:3])
    folder = unpacked(tmp_path / "cifar-10-batches-py", contents)
    message = rf"^{folder}: batches must have equally many images, got \[4, 4, 4, 4, 4, 3\]"
    with pytest.raises(ValueError, match=message):
        load_images("cifar10", folder)


@pytest.mark.parametrize("pack", [archived, unpacked])
def test_a_missing_batch_is_named(pack: Callable[..., Path], tmp_path: Path) -> None:
    contents = batches(binary)
    del contents["data_batch_3.bin"], contents["test_batch.bin"]
    place = pack(tmp_path / "some", contents)
    message = f"^{place} lacks data_batch_3.bin, test_batch.bin; .*\nhf download uoft-cs/cifar10"
    with pytest.raises(DataNotFoundError, match=message):
        load_images("cifar10", place)


@pytest.mark.parametrize(
    "damage", ["cut", "half", "values", "how", "checksum", "empty", "not gzip"]
)
def test_a_damaged_archive_is_named(damage: str, tmp_path: Path) -> None:
    path = archived(tmp_path / "cifar-10-python.tar.gz", batches(python2_pickle))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-4],
            "half": whole[: len(whole) // 2],
            "values": damaged(whole, len(whole) // 2),
            "how": half_compressed(gzip.decompress(whole)),
            "checksum": damaged(whole, -7),  # it comes after all that a tar file holds
            "empty": b"",
            "not gzip": gzip.decompress(whole),
        }[damage]
    )
    with pytest.raises(ValueError, match=f"^{path} is not a whole .tar.gz archive: "):
        load_images("cifar10", tmp_path)


def half_compressed(content: bytes) -> bytes:
    """The first bytes, compressed, and then what no compressor writes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="w") as file:
        file.write(content[:30_000])
        file.flush()
        return buffer.getvalue() + b"\xff"


def test_nothing_of_an_archive_is_written(tmp_path: Path) -> None:
    path = archived(tmp_path / "cifar-10-python.tar.gz", batches(python2_pickle))
    check_cifar10(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


# --- on the command line -------------------------------------------------------------------------

SMALL = ["--set", "pairs=1", "--set", "squeezes=0", "--set", "batch_size=4"]


def test_fashion_is_trained_on_and_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "data", str(tmp_path / "run")
    folder.mkdir()
    data = ["--data-dir", str(write_idx(folder, end=".gz", packed=gzip.compress))]
    arguments = ["train", "density", "--preset", "fashion", "--data", "fashion", "--out", out]
    arguments += [*data, *SMALL, "--set", "hidden=2", "--set", "steps=4", "--set", "validation=4"]
    assert main(arguments) == 0
    straight = RunFolder(tmp_path / "run").load()["model"]
    assert main(["evaluate", out, *data, "--draws", "1", "--inversions", "2"]) == 0
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (report["data"], report["test"]["images"]) == ("fashion", 5)
    assert RunFolder(tmp_path / "run").description()["data"]["training_images"] == 8

    # Interrupted, it ends in the same bits; MNIST's run is another one.
    arguments[arguments.index(out)] = out + "2"
    assert main([*arguments, "--max-minutes", "1e-9"]) == 0
    assert main([*arguments, "--resume"]) == 0
    resumed = RunFolder(tmp_path / "run2").load()["model"]
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    arguments[arguments.index("--data") + 1] = "mnist"
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 1
    assert "fashion" in capsys.readouterr().err

    arguments = ["train", "classify", "--preset", "fashion", "--out", out + "c", *data, *SMALL]
    assert main([*arguments, "--set", "steps=2", "--set", "width=1"]) == 0
    assert main(["evaluate", out + "c", *data]) == 0
    (folder / f"{LABELS}.gz").write_bytes(b"")
    assert main(["evaluate", out + "c", *data]) == 1
    assert f"{LABELS}.gz must begin with" in capsys.readouterr().err
