"""How good a trained model is: over every image, and with the noise of the measurement."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mintnet_triton.checks import NonFiniteError, check_integer
from mintnet_triton.inverse import invert
from mintnet_triton.invertible import Invertible
from mintnet_triton.mint import frozen
from mintnet_triton.recipes.batches import evaluation_batches, generator
from mintnet_triton.recipes.data import ImageData, Sample, Split
from mintnet_triton.recipes.objectives import Density, Objective, Scores, dequantising
from mintnet_triton.scores import (
    entropy_estimate,
    likelihood_ratio,
    log_prob_per_dim,
    typicality,
)
from mintnet_triton.solvers import Solver, max_error

Score = Callable[[Tensor, Tensor], Scores]


@dataclass(frozen=True)
class Evaluation:
    """Scores of every image, for every draw of the noise."""

    loss: Tensor  #: (draws, N), float64
    metric: Tensor  #: (draws, N), float64
    objective: Objective
    dimensions: int  #: of an image
    #: (draws, N), float64: bits per dimension with the noise of a flow's dequantiser, if it has one
    bound: Tensor | None = None

    def summary(self) -> dict[str, Any]:
        """What to report; a value that is not finite makes the means so, and is counted.

        For a density: ``bits_per_dim``, the mean over images and draws; ``standard_error`` over the
        images; ``standard_error_of_draws``, of the noise alone (None where there is one alone); and
        ``importance_weighted_bits_per_dim``, the bound ``-log2 mean_k p(v_k) / D`` with all draws,
        which is never above ``bits_per_dim`` and nearer to the bits of the integers themselves. All
        these are with uniform noise. Where the flow has a dequantiser, ``bits_bound`` is the mean
        of the variational bound, with its ``bits_bound_standard_error`` over the images, and
        ``bits_importance`` the importance-weighted one of it, with all draws.
        For a classifier: ``accuracy`` with its standard error, and ``loss`` in nats.
        """
        draws, images = self.metric.shape
        finite = self.loss.isfinite()
        if self.bound is not None:
            finite &= self.bound.isfinite()
        name = self.objective.metric
        values: dict[str, Any] = {
            "images": images,
            "draws": draws,
            "not_finite": int((~finite).sum()),
            name: float(self.metric.mean()),
            "standard_error": _standard_error(self.metric.mean(0)),
        }
        if isinstance(self.objective, Density):
            values["standard_error_of_draws"] = _standard_error(self.metric.mean(1))
            values["importance_weighted_bits_per_dim"] = self._weighted(self.metric)
            if self.bound is not None:
                values["bits_bound"] = float(self.bound.mean())
                values["bits_bound_standard_error"] = _standard_error(self.bound.mean(0))
                values["bits_importance"] = self._weighted(self.bound)
        else:
            values["loss"] = float(self.loss.mean())
        return values

    def _weighted(self, bits: Tensor) -> float:
        """``-log2 mean_k 2^(-D bits_k) / D`` over the draws, of bits (draws, N); its mean."""
        nats = bits * (math.log(2) * self.dimensions)
        weighted = math.log(len(bits)) - torch.logsumexp(-nats, 0)
        return float(weighted.mean()) / (math.log(2) * self.dimensions)


def evaluate(
    model: nn.Module,
    split: Split,
    objective: Objective,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> Evaluation:
    """Score every image of a split, the last partial batch included.

    The noise depends on the seed, the draw and the image alone, not on the batch size.

    Args:
        model: as :mod:`.objectives` has it; it is judged in evaluation mode, and left as it was.
        split: what to judge it on.
        objective: what to score. A density is scored with uniform noise, and where the flow has a
            dequantiser, with its noise as well.
        draws: of the dequantisation noise, for each image.
        seed: of the noise.
        batch_size: images at once.

    Raises:
        ValueError: the split is empty, or draws is below 1.
    """
    draws = check_integer("draws", draws, least=1)
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    metrics: list[Tensor] = []
    bounds: list[Tensor] = []
    score: Score = partial(objective.scores, model)
    bounded: Score | None = None
    if isinstance(objective, Density) and dequantising(model) is not None:
        score, bounded = partial(objective.scores, model, uniform=True), score
    dimensions, training = 0, model.training
    model.eval()
    with frozen(model):
        for images, labels, indices in evaluation_batches(split, batch_size):
            dimensions = images[0].numel()
            scores, bound = [], []
            for draw in range(draws):
                rngs = [generator(seed, "evaluation", draw, index) for index in indices]
                inputs = objective.inputs(images, rngs).to(device)
                scores.append(_scores(score, inputs, labels.to(device)))
                if bounded is not None:
                    bound.append(_scores(bounded, inputs, labels.to(device)).loss.double().cpu())
            losses.append(torch.stack([one.loss.double().cpu() for one in scores]))
            metrics.append(torch.stack([one.metric.double().cpu() for one in scores]))
            if bound:
                bounds.append(torch.stack(bound))
    model.train(training)
    if not losses:
        raise ValueError("the split has no images")
    return Evaluation(
        torch.cat(losses, 1),
        torch.cat(metrics, 1),
        objective,
        dimensions,
        torch.cat(bounds, 1) if bounds else None,
    )


@dataclass(frozen=True)
class _Relabelled:
    """A split whose images all have the same label."""

    split: Split
    label: int

    def order(self, shuffle: tuple[int, int] | None = None, start: int = 0) -> Iterator[Any]:
        return self.split.order(shuffle, start)

    def fetch(self, handle: Any) -> Sample:
        return replace(self.split.fetch(handle), label=self.label)

    def count(self) -> int | None:
        return self.split.count()


def _scores(score: Score, inputs: Tensor, labels: Tensor) -> Scores:
    """Scores, NaN for an image that the model cannot take."""
    try:
        return score(inputs, labels)
    except NonFiniteError:
        if len(inputs) == 1:
            nan = torch.full((1,), math.nan)
            return Scores(nan, nan)
        alone = [
            _scores(score, *pair) for pair in zip(inputs.split(1), labels.split(1), strict=True)
        ]
        return Scores(*(torch.cat(values) for values in zip(*alone, strict=True)))


def classify_by_density(
    model: nn.Module,
    split: Split,
    objective: Density,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Classify every image of a split by Bayes' rule, with classes equally likely beforehand.

    The density of an image is the mean over draws of the noise, the same for all classes.

    Args:
        model: a density for each class, as :mod:`.objectives` has it.
        split, draws, seed, batch_size: as of :func:`evaluate`.
        objective: with classes.

    Returns:
        ``images``; ``accuracy``, the share whose label is the likeliest class; its
        ``standard_error``. A class whose density is not finite is not chosen, and an image without
        another one is not right.

    Raises:
        ValueError: the objective has no classes, the split is empty, or draws is below 1.
    """
    if objective.classes is None:
        raise ValueError("the density is one for all classes: train it with condition=true")
    as_if = [
        evaluate(model, _Relabelled(split, label), objective, draws, seed, batch_size)
        for label in range(objective.classes)
    ]
    labels = [batch for _, batch, _ in evaluation_batches(split, batch_size)]
    bits = torch.stack([evaluation.metric for evaluation in as_if])
    nats = bits * (math.log(2) * as_if[0].dimensions)
    log_density = torch.logsumexp(-nats, 1)
    finite = log_density.isfinite()
    likeliest = log_density.where(finite, -math.inf).argmax(0)
    right = ((likeliest == torch.cat(labels)) & finite.any(0)).double()
    return {
        "images": len(right),
        "accuracy": float(right.mean()),
        "standard_error": _standard_error(right),
    }


@torch.no_grad()
def evaluate_inversion(
    model: Invertible,
    images: Tensor,
    objective: Density,
    seed: int = 0,
    solver: Solver | None = None,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """Map images to latents and back.

    Args:
        model: a flow over logits.
        images: (B, C, H, W), uint8.
        objective: that it was trained for.
        seed: of the dequantisation noise.
        solver: of the inverse; ``Auto()`` if None.
        labels: (B,), int64, of the images, where the objective has classes.

    Returns:
        ``images``; ``converged`` of them; ``largest_residual``; ``largest_error`` and
        ``mean_error`` of ``max |x - reconstruction|``, in logits; ``recovered``, the number of
        images that come back to the last bit. An image without a finite latent has not converged,
        and counts in none of the others but ``not_finite``.
    """
    like = next(model.parameters())
    rngs = [generator(seed, "evaluation", 0, index) for index in range(len(images))]
    x, _ = objective.logits(objective.inputs(images, rngs).to(like.device), like)
    context = None if labels is None else objective.context(labels.to(like.device), like)
    with frozen(model):
        z, _ = model(x) if context is None else model(x, context)
        finite = z.flatten(1).isfinite().all(1)
        own = None if context is None else context[finite]
        result = invert(model, z[finite], solver, context=own)
    errors = max_error(result.x, x[finite]).double()
    preprocess = objective.preprocess()
    again = preprocess.to_images(result.x).cpu() == images[finite.cpu()]
    none = not bool(finite.any())
    return {
        "images": len(images),
        "not_finite": int((~finite).sum()),
        "converged": int(result.converged.sum()),
        "largest_residual": math.nan if none else float(result.residual.max()),
        "largest_error": math.nan if none else float(errors.max()),
        "mean_error": math.nan if none else float(errors.mean()),
        "recovered": int(again.flatten(1).all(1).sum()),
    }


class _ImageDensity:
    """A flow over logits as a density of values v (B, C, H, W) of images with noise.

    Of a density for each class, it is the mean, for outliers are of none.
    """

    def __init__(self, flow: nn.Module, objective: Density, batch_size: int) -> None:
        self.flow, self.objective, self.batch_size = flow, objective, batch_size

    @torch.no_grad()
    def log_prob(self, values: Tensor) -> Tensor:
        nats, classes = math.log(2) * values[0].numel(), self.objective.classes or 1
        parts = values.to(next(self.flow.parameters()).device).split(self.batch_size)
        bits = [torch.cat([self._bits(part, label) for part in parts]) for label in range(classes)]
        return torch.logsumexp(-nats * torch.stack(bits), 0).cpu() - math.log(classes)

    def _bits(self, values: Tensor, label: int) -> Tensor:
        labels = torch.full((len(values),), label, device=values.device)
        scores = self.objective.scores(self.flow, values, labels, uniform=True)
        return scores.loss.double()


def evaluate_outliers(
    flow: nn.Module,
    data: ImageData,
    outliers: Mapping[str, Tensor],
    objective: Density,
    background: nn.Module | None = None,
    seed: int = 0,
    most: int = 1000,
    batch_size: int = 256,
) -> dict[str, float]:
    """How well a flow tells images that it was not trained for from test images.

    Args:
        flow: over logits; it is judged as it is, in its present mode.
        data: that it was trained on; the entropy is estimated on the training split.
        outliers: name -> images (N, C, H, W), uint8, of the shape and levels of the data.
        objective: that it was trained for.
        background: a flow trained alike on images with values replaced at random, for the ratio.
        seed: of the noise, one draw an image.
        most: images of each split to look at.
        batch_size: images at once.

    Returns:
        ``<name>_<score>`` -> area under the ROC curve (1: every outlier is told from every test
        image; 0.5: chance) of ``log_prob`` (outliers are less likely), of ``typicality`` and, with
        a background, of ``likelihood_ratio``.

    Raises:
        NonFiniteError: a log-density is NaN.
        ValueError: images of another shape, or of other levels.
    """
    from sklearn.metrics import roc_auc_score

    def values(images: Tensor, draw: int) -> Tensor:
        rngs = [generator(seed, "evaluation", draw, index) for index in range(len(images))]
        return objective.inputs(images, rngs)

    test, known = (next(evaluation_batches(part, most))[0] for part in (data.test, data.train))
    ours = values(test, 0)
    density = _ImageDensity(flow, objective, batch_size)
    entropy = entropy_estimate(density, values(known, 1))
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        "log_prob": lambda x: -log_prob_per_dim(density, x),
        "typicality": lambda x: typicality(density, x, entropy),
    }
    if background is not None:
        other = _ImageDensity(background, objective, batch_size)
        scores["likelihood_ratio"] = lambda x: -likelihood_ratio(density, other, x)
    report = {}
    for number, (name, images) in enumerate(outliers.items(), start=2):
        if images.shape[1:] != test.shape[1:]:
            raise ValueError(
                f"outliers {name!r} must be of shape (N, {', '.join(map(str, test.shape[1:]))}), "
                f"got {tuple(images.shape)}"
            )
        both = torch.cat([ours, values(images, number)])
        strange = torch.arange(len(both)) >= len(ours)
        for score, function in scores.items():
            report[f"{name}_{score}"] = float(roc_auc_score(strange, function(both)))
    return report


def _standard_error(values: Tensor) -> float | None:
    """Of the mean of the values (n,)."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with None for what JSON has no number for."""
    return {
        name: as_json(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }


def as_table(values: Mapping[str, Any]) -> str:
    """Markdown, a row a value; those of a part under its name."""
    rows = ["| what | value |", "| --- | --- |"]
    for name, value in values.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for part, number in parts:
            shown = f"{number:.5g}" if isinstance(number, float) else str(number)
            rows.append(f"| {' '.join((name, part)).replace('_', ' ').strip()} | {shown} |")
    return "\n".join(rows) + "\n"
