"""What other people bring along: their images, labels, integers, and changed networks."""

import copy
import io
import json
import os
import pickle
import re
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrizations, prune

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

import mintnet_triton as mint
from mintnet_triton.__main__ import main
from mintnet_triton.checks import check_number
from mintnet_triton.recipes import commands
from mintnet_triton.recipes.data import (
    NO_LABEL,
    DataName,
    ImageData,
    ImageSet,
    ImageStream,
    load_images,
)
from mintnet_triton.recipes.evaluation import evaluate
from mintnet_triton.recipes.objectives import Classification, Density
from mintnet_triton.recipes.pixels import read_pixels
from mintnet_triton.recipes.recipe import Recipe
from mintnet_triton.recipes.runs import RunError, RunFolder
from mintnet_triton.recipes.training import train
from tests import golden
from tests.hub import png, write_rows
from tests.tiny_run import random_data

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
    split = ImageSet(random_data().train.images, labels)  # type: ignore[attr-defined]
    data = ImageData("digits", split, split, 17, (1, 4, 4), classes=3)
    model = mint.MintClassifier(1, 4, classes=3, pairs=1, squeezes=0, width=4)
    with pytest.raises(error, match=message):
        train(model, data, Classification(17), Recipe(steps=1), tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
    if error is ValueError:
        with pytest.raises(ValueError, match=r"labels must be from 0 to 2, got (-1|3)"):
            evaluate(model, split, Classification(17))


# --- integers and numbers ------------------------------------------------------------------------

INTEGERS = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)


@pytest.mark.parametrize("levels", [2, 17, 256, 1000, 2**16, 2**20])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_images_of_every_integer_dtype(dtype: torch.dtype, levels: int) -> None:
    most = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    exact = torch.randint(0, min(levels, most + 1), (20, 2, 4, 4))
    exact[0, 0, 0, 0] = top = min(levels - 1, most)
    images, preprocess = exact.to(dtype), mint.ImagePreprocess(levels)
    x, _ = preprocess(images, dtype=torch.float64)
    assert torch.equal(preprocess.to_images(x), exact)
    values = preprocess.dequantise(images)
    assert torch.equal(values.floor().long(), exact)
    noise = preprocess.dequantise(torch.full((1, 1, 40, 40), top).to(dtype)) - top
    # Rounded to 8 bits it would leave 256.
    assert len(noise.unique()) > 1500
    x, log_det = preprocess(images)
    assert x.dtype == log_det.dtype == torch.float32
    if most >= levels:
        with pytest.raises(ValueError, match=rf"within 0 and {levels - 1}.* to {levels}"):
            preprocess(torch.full((1, 1, 1, 1), levels).to(dtype))
    if dtype.is_signed:
        with pytest.raises(ValueError, match="values from -1 to -1"):
            preprocess(torch.full((1, 1, 1, 1), -1).to(dtype))


def test_values_beyond_64_bits_with_a_sign_do_not_wrap() -> None:
    images = torch.full((1, 1, 1, 1), 2**64 - 1, dtype=torch.uint64)
    with pytest.raises(ValueError, match="values from 1844674407"):
        mint.ImagePreprocess(17)(images)


def test_bits_per_dim_of_16_bits_are_those_of_int64() -> None:
    flow = mint.MintNet(1, 4, pairs=1, hidden=2, squeezes=0)
    images = torch.randint(0, 2**16, (3, 1, 4, 4))
    bits = [
        mint.bits_per_dim(flow, images.to(dtype), 2**16, generator=torch.Generator().manual_seed(1))
        for dtype in (torch.int64, torch.uint16)
    ]
    assert torch.equal(*bits)
    objective = Density(2**16)
    rngs = [np.random.default_rng(i) for i in range(3)]
    inputs = objective.inputs(images.to(torch.uint16), rngs)
    assert torch.equal(inputs.floor().long(), images)
    scores = objective.scores(flow, inputs, torch.zeros(3))
    torch.testing.assert_close(scores.loss, bits[0], rtol=0, atol=0.5)  # another draw of the noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [256, 2**16, 2**30])
def test_logits_of_any_dtype_become_images_by_the_formula(dtype: torch.dtype, levels: int) -> None:
    x = torch.linspace(-2.9, 2.9, 999).to(dtype).view(1, 1, 27, 37)
    p = 1 / (1 + np.exp(-x.double().numpy()))
    truth = np.floor((p - 0.05) / 0.9 * levels)
    # Where float64 itself is in doubt, by rounding at the edge of a level.
    error = np.abs(mint.ImagePreprocess(levels).to_images(x).numpy() - truth)
    assert error.max() <= 1
    assert (error > 0).mean() < 0.01


def test_where_there_is_no_room_for_noise() -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch.float64 for levels=257.*float32"):
        mint.ImagePreprocess(257).dequantise(torch.zeros(1, 1, 1, 1).int(), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 .*got torch.bfloat16"):
        mint.ImagePreprocess(256).dequantise(torch.zeros(1, 1, 1, 1).int(), dtype=torch.bfloat16)
    mint.ImagePreprocess(2**37)
    with pytest.raises(ValueError, match=r"levels must be at most 2\*\*37"):
        mint.ImagePreprocess(2**37 + 1)


class Three:
    def __index__(self) -> int:
        return 3


THREES = [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), Three()]


@pytest.mark.parametrize("three", THREES)
def test_whatever_is_an_integer_is_stored_as_one(three: Any, tmp_path: Path) -> None:
    layer = mint.MintLayer(three, three, three, kernel_size=three)
    assert [type(value) for value in (layer.channels, *layer.size, layer.hidden)] == [int] * 4
    conv = mint.MaskedConv2d(three, three, three, colours=three)
    assert conv.weight.shape == (3, 3, 3, 3)
    none: Any = np.int64(0)
    flow = mint.MintNet(three, three, three, three, squeezes=none, zero_init_start=three)
    network = mint.MintClassifier(three, 6, three, pairs=three, hidden=three, squeezes=none)
    for model in (flow, network):
        assert json.loads(json.dumps(model.arguments))["pairs"] == 3
        mint.save(model, tmp_path / "model.safetensors")
        assert mint.load(tmp_path / "model.safetensors").arguments == model.arguments
    assert flow._latents(three, None, 1.0).shape == (3, 3, 3, 3)
    assert type(mint.ImagePreprocess(three).levels) is int
    assert type(mint.FixedPoint(iterations=three).iterations) is int
    recipe = Recipe(steps=three, batch_size=three, milestones=(three,), seed=three)
    assert json.loads(json.dumps(recipe.__dict__))["milestones"] == [3]


@pytest.mark.parametrize(
    "size",
    [[4, 8], (np.int64(4), 8), torch.Size([4, 8]), np.array([4, 8]), torch.tensor([4, 8])],
)
def test_sizes_of_every_sequence(size: Any) -> None:
    layer = mint.MintLayer(1, size, 2)
    assert layer.size == (4, 8)
    assert [type(side) for side in layer.size] == [int, int]
    assert mint.MintNet(1, size, 1, 2, 0).arguments["image_size"] == (4, 8)
    odd: Any = np.array([3, 1, 5])
    sides = mint.MintNet(1, 4, 1, 2, 0, kernel_size=odd).arguments["kernel_size"]
    assert sides == (3, 1, 5)
    assert {type(side) for side in sides} == {int}


NO_INTEGERS = [True, np.True_, torch.tensor(True), 2.0, np.float64(2), torch.tensor(2.0), 2j]
NO_SCALARS = ["2", None, [2], np.array([2]), torch.tensor([2])]


@pytest.mark.parametrize("value", NO_INTEGERS + NO_SCALARS)
def test_what_is_no_integer(value: Any) -> None:
    for make in (
        lambda: mint.MintLayer(value, 4, 4),
        lambda: mint.MintNet(2, 4, value, 4),
        lambda: mint.MintClassifier(2, 4, classes=value),
        lambda: mint.ImagePreprocess(value),
        lambda: mint.FixedPoint(iterations=value),
        lambda: Recipe(steps=3, batch_size=value),
    ):
        with pytest.raises(TypeError, match="must be an integer, got"):
            make()


@pytest.mark.parametrize(
    "half",
    [np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2), 0.5],
)
def test_whatever_is_a_number_is_stored_as_one(half: Any) -> None:
    solver = mint.FixedPoint(alpha=half, tolerance=half)
    density = Density(logit_lambda=half / 2)
    recipe = Recipe(steps=1, learning_rate=half, betas=(half, half), clip=half)
    values = [solver.alpha, solver.tolerance, density.logit_lambda, recipe.learning_rate]
    assert values == [0.5, 0.5, 0.25, 0.5]
    assert {type(value) for value in (*values, *recipe.betas, recipe.clip)} == {float}
    flow = mint.MintNet(1, 2, 1, 2, 0)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(flow._latents(2, seeds[0], half), flow._latents(2, seeds[1], 0.5))


@pytest.mark.parametrize(
    "value", [True, np.True_, 1j, *NO_SCALARS, torch.tensor(1.0, requires_grad=True)]
)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="alpha must be a number, got"):
        check_number("alpha", value)
    with pytest.raises(TypeError, match="alpha must be a number, got"):
        mint.FixedPoint(alpha=value)
    with pytest.raises(TypeError, match="logit_lambda must be a number, got"):
        mint.ImagePreprocess(17, value)


# --- saving and loading --------------------------------------------------------------------------


def flow() -> mint.MintNet:
    return mint.MintNet(2, 4, 2, 4, squeezes=1)


def classifier() -> mint.MintClassifier:
    return mint.MintClassifier(3, 8, 10, pairs=2, squeezes=1, width=4)


def child(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def untrained_head(model: Any) -> None:
    model.fc = nn.Linear(4 * 4, 5)


def other_eps(model: Any) -> None:
    model.layers[0][0].eps = 1e-3


def other_momentum(model: Any) -> None:
    model.layers[0][0] = nn.BatchNorm2d(4, momentum=0.5)


def no_statistics(model: Any) -> None:
    model.layers[0][0] = nn.BatchNorm2d(4, track_running_stats=False)


def tied_norms(model: Any) -> None:
    model.layers[0][2] = model.layers[0][0]


def no_head(model: Any) -> None:
    model.fc = nn.Identity()


def quantised_head(model: Any) -> None:
    scaled = torch.quantize_per_tensor(model.fc.weight.detach(), 0.1, 0, torch.qint8)
    model.fc.weight = nn.Parameter(scaled, requires_grad=False)


def sparse_head(model: Any) -> None:
    model.fc.weight = nn.Parameter(model.fc.weight.detach().to_sparse())


class Tagged(torch.Tensor):
    """A tensor that means something by itself."""


def tagged_head(model: Any) -> None:
    model.fc.weight = nn.Parameter(model.fc.weight.detach().as_subclass(Tagged))


def pruned(model: Any) -> None:
    prune.l1_unstructured(child(model, "layers.0.1").conv1, "weight", amount=0.5)


def parametrised(model: Any) -> None:
    parametrizations.weight_norm(child(model, "layers.0.1").conv2)


def another_activation(model: Any) -> None:
    layer = child(model, "layers.0.1")
    layer.activation = mint.MintLayer(1, 1, 1, activation="tanh").activation


def activation_of_the_same_name(model: Any) -> None:
    layer = child(model, "layers.0.1")
    name = layer.activation.name
    layer.activation = mint.Activation(
        name, torch.tanh, lambda a: torch.cosh(a) ** -2, slope=lambda h: 1 - h**2
    )


def another_order(model: Any) -> None:
    child(model, "layers.0.1").ordering = mint.Ordering("pixel", "upper")


def tied(model: Any) -> None:
    layers = [module for module in model.modules() if isinstance(module, mint.MintLayer)]
    layers[1].conv1.weight = layers[0].conv1.weight


def half_tied(model: Any) -> None:
    layer = child(model, "layers.0.1")
    both = torch.zeros(layer.t.numel() + 1)
    layer.t = nn.Parameter(both[1:].view_as(layer.t))
    layer.conv3.bias = nn.Parameter(both[: layer.channels])


class Doubled(mint.MintLayer):
    """All that is stored of it is as in a Mint layer."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(2 * x)


def another_kind(model: Any) -> None:
    layer = child(model, "layers.0.1")
    twin = Doubled(
        layer.channels,
        layer.size,
        layer.hidden,
        layer.ordering.triangle,
        activation=layer.activation,
    )
    model.layers[0][1] = twin


def of_another_shape(model: Any) -> None:
    layer = child(model, "layers.0.1")
    layer.t = nn.Parameter(torch.ones(layer.channels, 1, 1))  # broadcasts


def another_buffer(model: Any) -> None:
    model.register_buffer("scale", torch.ones(1), persistent=False)


def another_parameter(model: Any) -> None:
    child(model, "layers.0.1").scale = nn.Parameter(torch.ones(1))


def another_module(model: Any) -> None:
    model.extra = nn.Identity()


def a_method_of_its_own(model: Any) -> None:
    model.forward = lambda x: x


def on_no_device(model: Any) -> None:
    model.to("meta")


def of_complex_numbers(model: Any) -> None:
    layer = child(model, "layers.0.1")
    layer.t = nn.Parameter(layer.t.detach().to(torch.complex64))


def of_other_arguments(model: Any) -> None:
    model.arguments["kernel_size"] = (3, 5, 3)


ANY = [pruned, parametrised, another_activation, activation_of_the_same_name]
ANY += [
    another_kind,
    of_another_shape,
    another_order,
    tied,
    half_tied,
    another_buffer,
    another_parameter,
    another_module,
]
ANY += [a_method_of_its_own, on_no_device, of_complex_numbers, of_other_arguments]
OF_CLASSIFIERS = [untrained_head, other_eps, other_momentum, no_statistics, tied_norms, no_head]
OF_CLASSIFIERS += [quantised_head, sparse_head, tagged_head]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    ("make", "change"),
    [(make, change) for make in (flow, classifier) for change in ANY]
    + [(classifier, change) for change in OF_CLASSIFIERS],
)
def test_what_would_not_come_back_is_refused(make: Any, change: Any, tmp_path: Path) -> None:
    model = make()
    path = tmp_path / "model.safetensors"
    mint.save(model, path)
    before = path.read_bytes()
    change(model)
    state = torch.get_rng_state()
    with pytest.raises(mint.CheckpointError, match=r"would not be read back: .*'.*'") as refused:
        mint.save(model, path)
    named = re.findall(r"'([\w.]+)'", str(refused.value))
    assert any(name.split(".")[0] in (*NAMES, "the model") for name in named), refused.value
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(torch.get_rng_state(), state)


NAMES = ("layers", "fc", "scale", "extra", "forward")


def eager_halves(model: Any) -> None:
    model.half()
    child(model, "layers.1").double()


def channels_last(model: Any) -> None:
    model.to(memory_format=torch.channels_last)


def strided(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = torch.stack([parameter.data, parameter.data], -1)[..., 1]


def of_one_vector(model: Any) -> None:
    parameters = list(model.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters), parameters)


def watched(model: Any) -> None:
    model.register_forward_hook(lambda *_: None)
    model.layers[0].register_full_backward_hook(lambda *_: None)


def compiled(model: Any) -> None:
    model.compile(backend="eager")
    model.forward = torch.compile(model.forward, backend="eager")


def not_finite(model: Any) -> None:
    child(model, "layers.0.1").t.data[0, 0, 0] = torch.nan


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def from_nowhere(model: Any) -> Any:
    with torch.device("meta"):
        again = type(model)(**model.arguments)
    again.load_state_dict(model.state_dict(), assign=True)
    return again


FINE = [eager_halves, channels_last, strided, of_one_vector, watched, compiled, not_finite, copied]
FINE += [pickled, from_nowhere]
FINE += [lambda model: model.eval(), lambda model: model.requires_grad_(False)]
FINE += [lambda model: model.bfloat16(), lambda model: setattr(model, "note", "mine")]


@pytest.mark.parametrize("make", [flow, classifier])
@pytest.mark.parametrize("change", FINE)
def test_what_is_the_same_function_is_saved(make: Any, change: Any, tmp_path: Path) -> None:
    model = make()
    model = change(model) or model
    path = tmp_path / "model.safetensors"
    mint.save(model, path)
    state = torch.get_rng_state()
    again = mint.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    theirs, ours = model.state_dict(), again.state_dict()
    assert list(theirs) == list(ours)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in again.parameters())


def test_a_network_without_values_is_refused(tmp_path: Path) -> None:
    message = r"'layers\.0\.0\.t' has no values, for it is on the meta device"
    with pytest.raises(mint.CheckpointError, match=message):
        mint.save(flow().to("meta"), tmp_path / "model")


def test_what_was_read_computes_the_same(tmp_path: Path) -> None:
    for model, shape in ((flow(), (2, 2, 4, 4)), (classifier().eval(), (2, 3, 8, 8))):
        with mint.frozen(model):
            mint.save(model, tmp_path / "model")
        again = mint.load(tmp_path / "model").train(model.training)
        x = torch.randn(shape)
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
        (again.double()(x.double())[0]).sum().backward()
        assert all(parameter.grad is not None for parameter in again.parameters())


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    own = type("MintNet", (mint.MintNet,), {})
    model: Any
    for model in (
        own(2, 4, 1, 4, 0),
        torch.compile(flow(), backend="eager"),
        nn.DataParallel(flow()),
    ):
        with pytest.raises(TypeError, match="model must be one of"):
            mint.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_parts_of_weights_are_refused(tmp_path: Path) -> None:
    """Sharded by FSDP, in a process of its own."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh, model = init_device_mesh("cpu", (1,)), classifier()
        weight = distribute_tensor(model.fc.weight.detach(), mesh, [Replicate()])
        model.fc.weight = nn.Parameter(weight)
        with pytest.raises(mint.CheckpointError, match=r"'fc\.weight' is a DTensor"):
            mint.save(model, tmp_path / "model")
    finally:
        distributed.destroy_process_group()


def test_paths(tmp_path: Path) -> None:
    class Somewhere:
        def __fspath__(self) -> str:
            return str(tmp_path / "some.where")

    path: Any
    functions: list[Any] = [lambda path: mint.save(flow(), path), mint.load]
    for path in (Somewhere(), os.fsencode(tmp_path / "bytes"), str(tmp_path / "text")):
        mint.save(flow(), path)
        assert isinstance(mint.load(path), mint.MintNet)
        with pytest.raises(mint.CheckpointError, match="not a whole PyTorch checkpoint"):
            mint.load_authors_checkpoint(path)
    assert len(list(tmp_path.iterdir())) == 3
    for function in functions:
        with pytest.raises(IsADirectoryError, match="path must be that of a file, got the folder"):
            function(tmp_path)
        with pytest.raises(TypeError, match="expected str, bytes"):
            function(3)
    with pytest.raises(OSError, match="cannot write"):
        mint.save(flow(), tmp_path / "none" / "model")
    with pytest.raises(OSError, match=r"cannot write|Not a directory"):
        mint.save(flow(), tmp_path / "text" / "model")
    with pytest.raises(FileNotFoundError):
        mint.load(tmp_path / "none")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    mint.save(flow(), path)
    before = path.read_bytes()

    def fill(state: object, partial: Path, metadata: object) -> None:
        partial.write_bytes(b"some")
        raise safetensors.SafetensorError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fill)
    with pytest.raises(OSError, match="no space left"):
        mint.save(flow(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_other_networks(tmp_path: Path) -> None:
    model, path = flow(), tmp_path / "model"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}

    def written(**changes: Any) -> None:
        description = {"class": "MintNet", "arguments": {**model.arguments, **changes}}
        metadata = {"mintnet_triton": json.dumps(description)}
        safetensors.torch.save_file(state, path, metadata=metadata)

    for changes in ({"later": 1}, {"activation": "gelu"}, {"pairs": "2"}, {"hidden": 0}):
        written(**changes)
        with pytest.raises(mint.CheckpointError, match=f"{path}: does not describe a network"):
            mint.load(path)
    for changes in ({"pairs": 3}, {"kernel_size": 5}, {"hidden": 10**7}):  # 10**15 weights
        written(**changes)
        with pytest.raises(mint.CheckpointError, match=f"{path}: Error.* in loading state_dict"):
            mint.load(path)
    state["layers.0.0.t"] = state["layers.0.0.t"].long()
    written()
    with pytest.raises(mint.CheckpointError, match=r"layers\.0\.0\.t"):
        mint.load(path)


def test_authors_files_of_several_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "mixed.pth"
    content = torch.load(golden.DATA / "authors_checkpoint_c3_s8.pth", weights_only=True)
    whole = content[0]
    for dtype in (torch.float64, torch.int64):
        name = "module.layers.0.0.bias1"
        content[0] = {**whole, name: whole[name].to(dtype)}
        torch.save(content, path)
        with pytest.raises(mint.CheckpointError, match=f"bias must be torch.float32.*got {dtype}"):
            mint.load_authors_checkpoint(path)


@pytest.mark.parametrize("content", [{}, [], {"model": {}, "step": 1}, {"model": 3, "step": 1}])
def test_checkpoints_of_other_runs(content: Any, tmp_path: Path) -> None:
    def run(resume: bool) -> None:
        model = mint.MintNet(1, 4, pairs=1, hidden=2, squeezes=0)
        recipe = Recipe(steps=1, batch_size=4)
        description = {"model": model.arguments}
        train(model, random_data(), Density(17), recipe, tmp_path, description, resume=resume)

    run(resume=False)
    last = RunFolder(tmp_path).checkpoints()[-1]
    torch.save(content, last)
    with pytest.raises(mint.CheckpointError, match=f"{last}: "):
        run(resume=True)
    with pytest.raises(mint.CheckpointError, match=f"{last}: "):
        commands.load_run(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(RunError, match="run"):
            commands.load_run(tmp_path)
