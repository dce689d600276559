"""Batches of a split, with all randomness keyed by what it is for.

The noise and the augmentation of an image depend on the seed, the epoch and the image's index
alone: not on the batch size, on the number of processes, or on where a run was interrupted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mintnet_triton.recipes.data import Sample, Split

Purpose = Literal["training", "evaluation"]
_PURPOSES: tuple[Purpose, ...] = ("training", "evaluation")


def generator(seed: int, purpose: Purpose, epoch: int, index: int) -> np.random.Generator:
    """The source of all that is random about one image.

    Args:
        seed: at least 0.
        purpose: training or evaluation, which share nothing.
        epoch: in an evaluation, the number of the draw.
        index: of the image in its split.
    """
    return np.random.default_rng((seed, _PURPOSES.index(purpose), epoch, index))


@dataclass(frozen=True)
class Batch:
    """Images of one step, as far as this process has them to work on."""

    images: Tensor  #: (B, C, H, W), uint8, augmented
    labels: Tensor  #: (B,), int64
    generators: list[np.random.Generator]  #: one an image, from which augmentation has drawn
    next_epoch: int  #: where training goes on after this batch: the epoch,
    next_image: int  #: and the number of images of it that have been used up
    ends_epoch: bool  #: whether it is the last of its epoch


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int = 0,
    image: int = 0,
    *,
    flip: bool = False,
    crop: int = 0,
    replaced: float = 0.0,
    levels: int = 256,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Batches without end, each epoch in a random order of its own; what is left over is dropped.

    Args:
        split: what to train on.
        batch_size: of all processes together.
        seed: of the order and the augmentation.
        epoch: to start with.
        image: number of images of that epoch to leave out.
        flip: mirror every other image, at random.
        crop: pad by that many zeros on each side, and cut out at random.
        replaced: share of the values that random ones take the place of.
        levels: values a pixel may take, from 0.
        rank: of this process, which gets every ``processes``-th image of a batch.
        processes: how many there are.

    Raises:
        ValueError: the split has fewer images than a batch, or a batch does not divide.
    """
    if batch_size % processes:
        raise ValueError(f"batch_size must divide by the {processes} processes, got {batch_size}")
    while True:
        handles = split.order((seed, epoch), image)
        following = list(islice(handles, batch_size))
        if image == 0 and len(following) < batch_size:
            raise ValueError(
                f"batch_size must be at most the number of training images, {len(following)}, "
                f"got {batch_size}"
            )
        while len(following) == batch_size:
            current, following = following, list(islice(handles, batch_size))
            image += batch_size
            ends = len(following) < batch_size
            samples = [split.fetch(handle) for handle in current[rank::processes]]
            rngs = [generator(seed, "training", epoch, sample.index) for sample in samples]
            yield Batch(
                torch.stack(
                    [
                        augment(sample.image, rng, flip, crop, replaced, levels)
                        for sample, rng in zip(samples, rngs, strict=True)
                    ]
                ),
                _labels(samples),
                rngs,
                next_epoch=epoch + 1 if ends else epoch,
                next_image=0 if ends else image,
                ends_epoch=ends,
            )
        epoch, image = epoch + 1, 0


def evaluation_batches(
    split: Split, batch_size: int, *, rank: int = 0, processes: int = 1
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Every image of a split once, in order: images, labels, and their indices.

    Args:
        split: what to read.
        batch_size: of this process; the last batch may be smaller.
        rank: of this process, which gets every ``processes``-th image.
        processes: how many there are.
    """
    handles = islice(split.order(), rank, None, processes)
    while samples := [split.fetch(handle) for handle in islice(handles, batch_size)]:
        images = torch.stack([sample.image for sample in samples])
        yield images, _labels(samples), [sample.index for sample in samples]


def augment(
    image: Tensor,
    rng: np.random.Generator,
    flip: bool,
    crop: int,
    replaced: float = 0.0,
    levels: int = 256,
) -> Tensor:
    """Mirror an image (C, H, W), cut it out of its zero-padded self, and replace values, at random.

    A value is replaced with that probability, by any of the levels alike.
    """
    if flip and rng.random() < 0.5:
        image = image.flip(-1)
    if crop:
        height, width = image.shape[1:]
        top, left = rng.integers(0, 2 * crop + 1, size=2)
        image = F.pad(image, (crop, crop, crop, crop))[:, top : top + height, left : left + width]
    if replaced:
        chosen = torch.from_numpy(rng.random(image.shape) < replaced)
        values = torch.from_numpy(rng.integers(0, levels, size=image.shape)).to(image.dtype)
        image = torch.where(chosen, values, image)
    return image


def _labels(samples: list[Sample]) -> Tensor:
    return torch.tensor([sample.label for sample in samples])
