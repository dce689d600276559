"""What is trained for: the protocol between a model and the training loop.

The loop and the evaluation take any ``nn.Module`` that keeps to this:

- for :class:`Density`, ``model(x)`` returns ``(z, log_det)``. x (B, C, H, W) are logits of images
  in the dtype of the parameters; z (B, ...), of C H W values a sample, is standard normal under
  the model; log_det (B,) is log|det dz/dx|. With classes, it is ``model(x, context)``, and
  the context (B, classes) of an image is 1 at its label and 0 elsewhere. A flow of this library
  with a dequantiser is trained by the bound that it gives.
- for :class:`Classification`, ``model(x)`` returns log-probabilities (B, classes). x (B, C, H, W)
  are images as numbers in [0, 1], less ``mean``, over ``std``.

A model has at least one parameter. Its training and evaluation modes, and its buffers, are its own
affair. A module with an attribute ``recompute`` can be told to trade time for memory.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mintnet_triton.checks import check_integer
from mintnet_triton.flow import MintNet, standard_normal_log_prob
from mintnet_triton.images import ImagePreprocess
from mintnet_triton.invertible import as_invertible
from mintnet_triton.noise import add_noise
from mintnet_triton.solvers import log_det_dtype


class Scores(NamedTuple):
    """How a model does on each image."""

    loss: Tensor  #: (B,), whose mean is minimised
    metric: Tensor  #: (B,), what people ask for


@dataclass(frozen=True)
class Density:
    """Bits per dimension of dequantised images: the loss, and the metric.

    Of a flow with a dequantiser they are those of the variational bound, and called
    ``bits_bound``; ``bits_per_dim`` are those under uniform noise, of any model.
    """

    levels: int = 256  #: values a pixel may take
    logit_lambda: float = 0.05  #: as in :class:`mintnet_triton.ImagePreprocess`
    classes: int | None = None  #: of a density for each class; None: of one for all images
    task: ClassVar[str] = "density"
    metric: ClassVar[str] = "bits_per_dim"

    def __post_init__(self) -> None:
        preprocess = self.preprocess()
        object.__setattr__(self, "levels", preprocess.levels)  # as JSON takes them
        object.__setattr__(self, "logit_lambda", preprocess.logit_lambda)
        if self.classes is not None:
            check_integer("classes", self.classes, least=1)

    def preprocess(self) -> ImagePreprocess:
        """The map from images to logits and back."""
        return ImagePreprocess(self.levels, self.logit_lambda)

    def inputs(self, images: Tensor, generators: list[np.random.Generator]) -> Tensor:
        """Values (B, C, H, W) in [0, levels): images with a draw of the noise.

        float32 up to 256 levels, else float64.

        Raises:
            ValueError: a value of the images, which are on the CPU, is of no level.
        """
        shape = images.shape[1:]
        single = self.preprocess().values_dtype == torch.float32
        dtype = np.float32 if single else np.float64
        noise = np.stack([rng.random(shape, dtype=dtype) for rng in generators])
        values = add_noise(images, torch.from_numpy(noise))
        least, most = (int(bound.floor()) for bound in values.aminmax())
        if least < 0 or most >= self.levels:
            raise ValueError(
                f"images must be within 0 and {self.levels - 1} for levels={self.levels}, got "
                f"values from {least} to {most}"
            )
        return values

    def logits(self, inputs: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """x for a model whose parameters are like that one, and the log-det (B,) of v -> x.

        It is what ``preprocess().transform`` does, without looking at values, for which a GPU
        would have to be waited for at every step: :meth:`inputs` has looked.
        """
        exact = log_det_dtype(like)
        values = inputs.to(torch.promote_types(inputs.dtype, exact))
        p = self.logit_lambda + (1 - 2 * self.logit_lambda) * (values / self.levels)
        x = p.log() - (-p).log1p()
        # dv -> dp is a constant; dp -> dx is 1 / (p (1 - p)).
        constant = math.log((1 - 2 * self.logit_lambda) / self.levels)
        log_det = (F.softplus(x) + F.softplus(-x) + constant).flatten(1).sum(1)
        return x.to(like.dtype), log_det.to(exact)

    def labels(self, number: int) -> Tensor | None:
        """Of so many samples, the classes in their order and as even as can be, (number,)."""
        return None if self.classes is None else torch.arange(number) * self.classes // number

    def context(self, labels: Tensor, like: Tensor) -> Tensor | None:
        """Of images of those labels, for a model whose parameters are like that one.

        Raises:
            ValueError: a label of no class (on a CPU; on a GPU it would wait for the device).
        """
        if self.classes is None:
            return None
        _check_labels(labels, self.classes)
        each = torch.arange(self.classes, device=labels.device)
        return (labels[:, None] == each).to(like)  # of its device, too

    def scores(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, *, uniform: bool = False
    ) -> Scores:
        """Bits per dimension, twice; without classes, labels are not looked at.

        Args:
            uniform: leave out a dequantiser, and take the noise of the inputs as it is.

        Raises:
            ValueError: as :meth:`context`.
        """
        like = next(model.parameters())
        context = self.context(labels, like)
        given = () if context is None else (context,)
        flow = None if uniform else dequantising(model)
        if flow is not None:
            inputs, noise_log_det = flow.dequantise(inputs, self.levels, *given)
        x, preprocess_log_det = self.logits(inputs, like)
        z, log_det = model(x, *given)
        log_prob = standard_normal_log_prob(z) + log_det + preprocess_log_det
        if flow is not None:
            log_prob = log_prob + noise_log_det
        bits = -log_prob / (math.log(2) * inputs.shape[1:].numel())
        return Scores(bits, bits.detach())


@dataclass(frozen=True)
class Classification:
    """Cross entropy in nats as the loss, accuracy as the metric."""

    levels: int = 256
    mean: tuple[float, ...] = (0.5,)  #: of each channel, or one for all
    std: tuple[float, ...] = (0.5,)
    task: ClassVar[str] = "classify"
    metric: ClassVar[str] = "accuracy"

    def inputs(self, images: Tensor, generators: list[np.random.Generator]) -> Tensor:
        """Normalised images (B, C, H, W), float32; nothing random is left to draw."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / (self.levels - 1) - mean) / std

    def scores(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Scores:
        """Cross entropy and accuracy.

        Raises:
            ValueError: a label of no class (on a CPU; on a GPU it would wait for the device).
        """
        log_probs = model(inputs.to(next(model.parameters()).dtype))
        _check_labels(labels, log_probs.shape[1])
        loss = F.nll_loss(log_probs, labels, reduction="none")
        return Scores(loss, (log_probs.argmax(1) == labels).float())


def _check_labels(labels: Tensor, classes: int) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if labels.device.type == "cpu" and bool(wrong.any()):
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {int(labels[wrong][0])}")


Objective = Density | Classification


def dequantising(model: nn.Module) -> MintNet | None:
    """The flow itself, if the model is one with a dequantiser, whatever torch has put around it."""
    try:
        flow = as_invertible("model", model)
    except TypeError:
        return None
    return flow if isinstance(flow, MintNet) and flow.dequantiser is not None else None


def metric_of(objective: Objective, model: nn.Module) -> str:
    """What the metric is called that ``objective.scores`` gives of a model."""
    bounded = isinstance(objective, Density) and dequantising(model) is not None
    return "bits_bound" if bounded else objective.metric


def make_objective(task: str, data: dict[str, Any]) -> Objective:
    """The objective of a task ("density" or "classify") on data as a preset describes them.

    Raises:
        ValueError: another task, or one that the data are not described for.
    """
    if task == "density":
        return Density(data["levels"], data["logit_lambda"], data.get("classes"))
    if task != "classify":
        raise ValueError(f"task must be 'density' or 'classify', got {task!r}")
    if "mean" not in data:
        raise ValueError("the preset gives no mean and std of its images, as classifiers need")
    return Classification(data["levels"], tuple(data["mean"]), tuple(data["std"]))
