"""What other people bring along: their images and labels."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

import mintnet_triton as mint
from mintnet_triton.__main__ import main
from mintnet_triton.recipes.data import (
    NO_LABEL,
    DataName,
    ImageData,
    ImageSet,
    ImageStream,
    load_images,
)
from mintnet_triton.recipes.evaluation import evaluate
from mintnet_triton.recipes.objectives import Classification
from mintnet_triton.recipes.pixels import read_pixels
from mintnet_triton.recipes.recipe import Recipe
from mintnet_triton.recipes.training import train
from tests.hub import png, write_rows

pytestmark = pytest.mark.usefixtures("offline")

RGB = np.random.default_rng(0).integers(0, 255, (8, 6, 3), dtype=np.uint8)
GREY = RGB[..., 0]

# --- wide images ---------------------------------------------------------------------------------


def encoded(image: Any, form: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        buffer, form, **options
    )
    return buffer.getvalue()


def with_alpha(image: NDArray[np.uint8], alpha: int) -> NDArray[np.uint8]:
    whole = np.full(GREY.shape, 255, np.uint8)
    whole[0, 0] = alpha
    return np.dstack([image, whole])


def deep_png(colour_type: int, channels: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", 2, 1, 16, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"\0" + bytes(2 * 2 * channels))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (encoded(GREY.astype(np.uint16)), "I;16"),
        (encoded(GREY.astype(np.uint16), "tiff"), "I;16"),
        (encoded(GREY.astype(np.int32), "tiff"), "I"),
        (encoded(GREY.astype(np.float32), "tiff"), "F"),
        (deep_png(0, 1), "I"),  # and ;16 in newer releases of Pillow
        (deep_png(2, 3), "RGB"),  # cut to the upper 8 bits unasked
        (deep_png(4, 2), ""),
        (deep_png(6, 4), "RGBA"),
        (b"P6 2 1 65535\n" + bytes(12), "RGB"),
        (b"P5 2 1 65535\n" + bytes(4), "I"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_8_bits_are_refused(content: bytes, mode: str, channels: int) -> None:
    with pytest.raises(ValueError, match=rf"at most 8 bits a channel, got more \(mode {mode}"):
        read_pixels(content, channels)


@pytest.mark.parametrize(
    ("content", "truth"),
    [
        (encoded(RGB), RGB),
        (encoded(RGB, "bmp"), RGB),
        (encoded(RGB, "webp", lossless=True), RGB),
        (encoded(Image.fromarray(RGB).convert("CMYK"), "tiff"), RGB),
        (encoded(with_alpha(RGB, 255)), RGB),
        (encoded(RGB, transparency=(255, 255, 255)), RGB),
        (encoded(np.stack([GREY] * 3, -1)), GREY),
        (encoded(GREY), GREY),
        (encoded(GREY, "gif"), GREY),
        (encoded(GREY, transparency=255), GREY),
        (encoded(with_alpha(GREY, 255)), GREY),
        (encoded(GREY > 99), np.where(GREY > 99, 255, 0)),
        (encoded(Image.fromarray(GREY).convert("P")), GREY),
        (b"P5 2 1 15\n\x0f\x03", np.array([[255, 51]])),
    ],
)
def test_images_of_8_bits_are_read_faithfully(content: bytes, truth: NDArray[np.uint8]) -> None:
    if truth.ndim == 2:
        assert np.array_equal(read_pixels(content, 1), truth[None])
        truth = np.stack([truth] * 3, -1)
    else:
        with pytest.raises(ValueError, match="pixels must be grey, got colours"):
            read_pixels(content, 1)
    assert np.array_equal(read_pixels(content, 3), truth.transpose(2, 0, 1))


def test_a_palettes_colours_are_looked_up() -> None:
    few = Image.fromarray(RGB).quantize(5)
    truth = np.array(few.getpalette()).reshape(-1, 3)[np.asarray(few)]
    for content in (encoded(few), encoded(few, transparency=bytes([255] * 5))):
        assert np.array_equal(read_pixels(content, 3), truth.transpose(2, 0, 1))


def test_16_bits_of_all_channels_together_are_not_wide() -> None:
    """A BMP of 5, 6 and 5 bits."""
    header = struct.pack("<2sIHHI", b"BM", 70, 0, 0, 66)
    header += struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    header += struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    pixels = read_pixels(header + struct.pack("<HH", 0xF800, 0x1F), 3)
    assert pixels.tolist() == [[[255, 0]], [[0, 0]], [[0, 255]]]  # red, then blue


@pytest.mark.parametrize(
    "content",
    [
        encoded(with_alpha(RGB, 254)),
        encoded(with_alpha(GREY, 0)),
        encoded(RGB, transparency=tuple(int(value) for value in RGB[3, 3])),
        encoded(GREY, transparency=int(GREY[3, 3])),
        encoded(GREY > 99, transparency=0),
        encoded(Image.fromarray(RGB).quantize(5), transparency=2),
        encoded(Image.fromarray(RGB).quantize(5), transparency=bytes([255, 255, 7])),
        encoded(Image.fromarray(GREY), "gif", transparency=int(GREY[3, 3])),
    ],
)
def test_what_shows_through_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="pixels must be opaque, got an alpha of"):
        read_pixels(content, 3)


@pytest.mark.parametrize("form", ["gif", "png", "tiff", "webp"])
def test_several_frames_are_refused(form: str) -> None:
    frames = encoded(RGB, form, save_all=True, append_images=[Image.fromarray(255 - RGB)])
    with pytest.raises(ValueError, match="must hold one image, got 2 frames"):
        read_pixels(frames, 3)


def test_a_held_camera_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row of the file is the right side of the picture
    turned = read_pixels(encoded(RGB, exif=exif), 3)
    assert np.array_equal(turned, np.rot90(RGB, -1).transpose(2, 0, 1))


@pytest.mark.parametrize("form", ["png", "jpeg", "bmp", "gif", "tiff", "webp"])
@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.9])
def test_part_of_a_file_is_refused(form: str, keep: float) -> None:
    content = encoded(RGB, form)
    with pytest.raises(ValueError, match="not a whole image file"):
        read_pixels(content[: keep if isinstance(keep, int) else int(keep * len(content))], 3)


def test_a_png_that_lacks_its_end_is_refused() -> None:
    with pytest.raises(ValueError, match="not a whole image file"):
        read_pixels(encoded(RGB)[:-12], 3)


def test_a_flipped_bit_is_refused() -> None:
    content = bytearray(encoded(RGB))
    content[len(content) // 2] ^= 1
    with pytest.raises(ValueError, match="not a whole image file"):
        read_pixels(bytes(content), 3)


def image_folder(folder: Path, values: range = range(3), labelled: bool = False) -> Path:
    for split in ("train", "test"):
        for value in values:
            place = folder / split / f"{value % 10}" if labelled else folder / split
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{value}.png").write_bytes(png(np.full((28, 28), value, np.uint8)))
    return folder


@pytest.mark.parametrize("damage", ["wide", "cut", "colour", "size"])
def test_the_file_is_named(damage: str, tmp_path: Path) -> None:
    bad = {
        "wide": encoded(np.full((28, 28), 40_000, np.uint16)),
        "cut": png(np.zeros((28, 28), np.uint8))[:50],
        "colour": encoded(np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)),
        "size": png(np.zeros((28, 27), np.uint8)),
    }[damage]
    image_folder(tmp_path)
    (tmp_path / "train" / "1.png").write_bytes(bad)
    with pytest.raises(ValueError, match=r"row 1 of the split 'train'.*train/1\.png: "):
        load_images("mnist", tmp_path)


ROW = {"image": {"bytes": png(np.zeros((32, 32, 3), np.uint8)), "path": None}, "label": 3}
CUT = {"bytes": png(np.zeros((32, 32, 3), np.uint8))[:60], "path": None}


@pytest.mark.parametrize("image", [CUT, None, {"bytes": None, "path": "nowhere.png"}])
def test_the_row_is_named(image: Any, tmp_path: Path) -> None:
    rows = [ROW, ROW, {**ROW, "image": image}]
    write_rows(tmp_path, {"train": rows, "test": [ROW], "validation": [ROW]})
    with pytest.raises(ValueError, match="cifar10, row 2 of the split 'train'"):
        load_images("cifar10", tmp_path)
    stream = load_images("imagenet32", tmp_path).train
    assert isinstance(stream, ImageStream)
    handles = list(stream.order())
    assert stream.fetch(handles[1]).label == 3
    with pytest.raises(ValueError, match="imagenet32, row 2 of the split 'train'"):
        stream.fetch(handles[2])


@pytest.mark.parametrize("name", ["cifar10", "imagenet32"])
def test_a_damaged_parquet_file_is_named(name: DataName, tmp_path: Path) -> None:
    test = "test" if name == "cifar10" else "validation"
    write_rows(tmp_path, {"train": [ROW] * 9, test: [ROW]})
    (path,) = tmp_path.glob("train*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=f"{path} is not a whole parquet file"):
        load_images(name, tmp_path)
    path.write_bytes(whole[:8] + b"\xff" * 60 + whole[68:])  # the end still tells of its columns
    with pytest.raises(ValueError, match=f"{name}.* row 0 of the split 'train'"):
        list(load_images(name, tmp_path).train.order())


# --- labels --------------------------------------------------------------------------------------

SMALL = ["--set", "pairs=1", "--set", "hidden=4", "--set", "squeezes=0", "--set", "batch_size=2"]


def without(row: dict[str, Any]) -> dict[str, Any]:
    return {"image": row["image"]}


def test_a_density_needs_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = image_folder(tmp_path / "data"), str(tmp_path / "run")
    data = ["--data-dir", str(folder)]
    arguments = ["train", "density", "--preset", "mnist", "--out", out, *data, *SMALL]
    arguments += ["--set", "steps=2"]
    assert main([*arguments, "--max-minutes", "1e-9"]) == 0
    assert main([*arguments, "--resume"]) == 0
    assert main(["evaluate", out, *data, "--draws", "1", "--inversions", "1"]) == 0
    assert main(["sample", out, "--number", "1"]) == 0
    capsys.readouterr()
    assert main(["train", "classify", "--preset", "mnist", "--out", out + "c", *data]) == 1
    assert "0.png: label must be an integer from 0 to 9, got None" in capsys.readouterr().err
    assert not Path(out + "c").exists()


@pytest.mark.parametrize("label", ["cat", -1, 10, 0.5, None, True])
def test_a_label_of_no_class(label: Any, tmp_path: Path) -> None:
    rows = [{**ROW, "label": label}] * 2
    write_rows(tmp_path, {"train": rows, "test": rows})
    data = load_images("cifar10", tmp_path)
    assert isinstance(data.train, ImageSet)
    assert data.train.labels.tolist() == [NO_LABEL] * 2
    message = rf"row 0 .*: label must be an integer from 0 to 9, got {label!r}"
    with pytest.raises(ValueError, match=message):
        load_images("cifar10", tmp_path, labelled=True)


def test_a_stream_without_labels(tmp_path: Path) -> None:
    rows = [{**ROW, "label": 1000}]
    write_rows(tmp_path, {"train": rows, "validation": rows})
    free, strict = (load_images("imagenet32", tmp_path, labelled=on).train for on in (False, True))
    (handle,) = free.order()
    assert free.fetch(handle).label == NO_LABEL
    with pytest.raises(ValueError, match="label must be an integer from 0 to 999, got 1000"):
        strict.fetch(handle)
    write_rows(tmp_path, {"train": [without(ROW)], "validation": [without(ROW)]})
    split = load_images("imagenet32", tmp_path).train
    assert split.fetch(next(split.order())).label == NO_LABEL
    with pytest.raises(ValueError, match=r"columns image \(or img\) and label, got \['image'\]"):
        load_images("imagenet32", tmp_path, labelled=True)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.arange(24) % 3 - 1, ValueError, "from 0 to 2, got -1 for training image 0"),
        (torch.arange(24) % 4, ValueError, "from 0 to 2, got 3 for training image 3"),
        (torch.arange(24) / 24, TypeError, "must be integers, got torch.float32"),
        (torch.arange(24) % 2 == 0, TypeError, "must be integers, got torch.bool"),
    ],
)
def test_labels_in_memory_are_seen_before_training(
    labels: torch.Tensor, error: type[Exception], message: str, tmp_path: Path
) -> None:
    images = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    split = ImageSet(images, labels)
    data = ImageData("digits", split, split, 17, (1, 4, 4), classes=3)
    model = mint.MintClassifier(1, 4, classes=3, pairs=1, squeezes=0, width=4)
    with pytest.raises(error, match=message):
        train(model, data, Classification(17), Recipe(steps=1), tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
    if error is ValueError:
        with pytest.raises(ValueError, match=r"labels must be from 0 to 2, got (-1|3)"):
            evaluate(model, split, Classification(17))
