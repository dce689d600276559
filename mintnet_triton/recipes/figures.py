"""Pictures: of images, of reconstruction (Figure 4 of the paper), of latents, and of learning."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mintnet_triton.flow import MintNet
from mintnet_triton.images import ImagePreprocess
from mintnet_triton.invertible import Invertible
from mintnet_triton.recipes.batches import evaluation_batches, generator
from mintnet_triton.recipes.data import Split
from mintnet_triton.recipes.objectives import Density
from mintnet_triton.scores import interpolate, reconstruct
from mintnet_triton.solvers import FixedPoint, max_error


def image_sheet(rows: Mapping[str, Tensor], levels: int) -> Figure:
    """Rows of images, each under its title.

    Args:
        rows: title -> images (N, C, H, W) with C 1 or 3 and values 0 to levels - 1.
        levels: values a pixel may take.
    """
    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(0.6 * columns, 0.85 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (title, images) in zip(parts, rows.items(), strict=True):
        part.suptitle(title, fontsize=8, x=0.01, ha="left")
        axes = part.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.set_axis_off()
        for axis, image in zip(axes, images, strict=False):
            pixels = image.cpu().permute(1, 2, 0).numpy() / (levels - 1)
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return figure


def image_grid(images: Tensor, levels: int, columns: int = 8) -> Figure:
    """Images side by side, row by row.

    Args:
        images: (N, C, H, W) with C 1 or 3 and values 0 to levels - 1; N may be 0.
        levels: values a pixel may take.
        columns: images a row.
    """
    rows = max(1, math.ceil(len(images) / columns))
    framed = F.pad(images.cpu(), (1, 1, 1, 1), value=levels - 1)
    channels, height, width = framed.shape[1:]
    empty = framed.new_full((rows * columns - len(images), channels, height, width), levels - 1)
    cells = torch.cat([framed, empty]).view(rows, columns, channels, height, width)
    pixels = cells.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    figure = Figure(figsize=(0.7 * columns, 0.7 * rows * height / width), layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    axis.imshow(pixels.numpy() / (levels - 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return figure


def reconstruction_errors(
    model: Invertible,
    x: Tensor,
    alphas: list[float],
    iterations: list[int],
    context: Tensor | None = None,
) -> dict[float, Tensor]:
    """Error of x after so many fixed-point iterations in each layer (Figure 4a of the paper).

    Args:
        model: a layer or a network.
        x: (B, ...), inputs of the model.
        alphas: steps to try.
        iterations: numbers of iterations per layer.
        context: as the model takes it, one row a sample.

    Returns:
        alpha -> ``max |x - reconstruction|`` (len(iterations), B).
    """

    def again(alpha: float, count: int) -> Tensor:
        return reconstruct(model, x, FixedPoint(alpha, count, tolerance=0), context).x

    return {
        alpha: torch.stack([max_error(again(alpha, count), x) for count in iterations])
        for alpha in alphas
    }


def error_curves(errors: Mapping[float, Tensor], iterations: list[int]) -> Figure:
    """Reconstruction error against iterations per layer, one curve an alpha.

    Args:
        errors: as :func:`reconstruction_errors` returns them.
        iterations: the numbers of iterations.
    """
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    # Okabe and Ito's colours, told apart by the colour-blind; markers tell them apart in print.
    styles = zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"), "os^Dv", strict=True)
    for (alpha, error), (colour, marker) in zip(errors.items(), styles, strict=False):
        values = error.cpu().numpy()
        diverged = int((~np.isfinite(values)).any(0).sum())
        finite = np.where(np.isfinite(values), values, np.nan)
        low, median, high = np.nanquantile(finite, [0.1, 0.5, 0.9], axis=1)
        label = f"α = {alpha:.3g}" + (f" ({diverged} samples diverged)" if diverged else "")
        axis.plot(iterations, median, color=colour, marker=marker, markersize=3, label=label)
        axis.fill_between(iterations, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(iterations, labels=[str(count) for count in iterations])
    axis.minorticks_off()
    axis.set_xlabel("fixed-point iterations per layer")
    axis.set_ylabel("reconstruction error, max |x − x̂| (logits)")
    samples = next(iter(errors.values())).shape[1]
    axis.set_title(f"median and 10–90% range over {samples} samples", fontsize=9)
    axis.legend(frameon=False)
    return figure


def first_images(split: Split, count: int) -> Tensor:
    """The first images of a split, (count, C, H, W), uint8; fewer if it has no more."""
    return next(evaluation_batches(split, count))[0]


def reconstructions(
    flow: MintNet,
    x: Tensor,
    preprocess: ImagePreprocess,
    alpha: float,
    iterations: Sequence[int],
    context: Tensor | None = None,
) -> dict[str, Tensor]:
    """Images after so many fixed-point iterations in each layer (Figure 4b of the paper).

    Args:
        flow: over logits.
        x: (B, C, H, W), logits of images.
        preprocess: that made them.
        alpha: step of the iteration.
        iterations: numbers of iterations per layer.
        context: as the flow takes it, one row an image.

    Returns:
        title -> images (B, C, H, W), for :func:`image_sheet`; a sample that is not finite is black.
    """
    rows = {"images": preprocess.to_images(x)}
    for count in iterations:
        again = reconstruct(flow, x, FixedPoint(alpha, count, tolerance=0), context).x
        finite = again.flatten(1).isfinite().all(1)[:, None, None, None]
        title = f"after {count} iteration{'s' if count > 1 else ''}, α = {alpha:.3g}"
        shown = torch.where(finite, again, 0.0)
        rows[title] = torch.where(finite, preprocess.to_images(shown), 0)
    return rows


def interpolation(
    flow: MintNet, corners: Tensor, steps: int = 8, context: Tensor | None = None
) -> Tensor:
    """Images in latent space between four (Figure 5 of the paper), as logits.

    They are what :func:`mintnet_triton.interpolate` returns, with its contexts.

    Args:
        flow: over logits.
        corners: (4, C, H, W), logits.
        steps: images a side.
        context: (4, context), of the corners, if the flow takes one.

    Returns:
        (steps * steps, C, H, W), row by row; a from top to bottom.

    Raises:
        NotConvergedError: the inverse of some image did not converge.
        ValueError: not four corners.
    """
    if len(corners) != 4:
        raise ValueError(f"corners must be 4 images, got {len(corners)}")
    return interpolate(flow, corners, steps, context=context)


def sample_sheet(images: Tensor, labels: Tensor | None, objective: Density) -> Figure:
    """Samples: row by row, or those of a class in a row.

    Args:
        images: (N, C, H, W) with C 1 or 3 and values 0 to levels - 1.
        labels: (N,), where the objective has classes.
        objective: that the flow was trained for.
    """
    if labels is None or objective.classes is None:
        return image_grid(images, objective.levels)
    rows = {f"class {label}": images[labels == label] for label in range(objective.classes)}
    return image_sheet(rows, objective.levels)


def learning_curve(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """The metric against steps, in training and on held-out images.

    Args:
        rows: of a run's log.
        metric: "bits_per_dim", "bits_bound" or "accuracy".
    """
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, label, style in (
        (metric, "training", {"color": "#0072B2"}),
        (f"validation_{metric}", "held out", {"color": "#D55E00", "marker": "o", "markersize": 3}),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)
    axis.set_xlabel("steps")
    names = {"bits_per_dim": "bits per dimension", "bits_bound": "bits per dimension, bound"}
    axis.set_ylabel(names.get(metric, metric))
    axis.legend(frameon=False)
    return figure


def paper_figures(
    flow: MintNet,
    objective: Density,
    images: Tensor,
    alphas: list[float],
    iterations: list[int],
    labels: Tensor | None = None,
) -> dict[str, Figure]:
    """Samples, reconstructions and an interpolation of a trained flow.

    Args:
        flow: over logits.
        objective: that it was trained for.
        images: at least 4 test images (N, C, H, W), uint8, to reconstruct and interpolate between.
        alphas: steps of the fixed-point iteration.
        iterations: numbers of iterations per layer.
        labels: (N,), of the images, where the objective has classes.

    Returns:
        name -> figure.

    Raises:
        NotConvergedError: the inverse of some sample did not converge.
    """
    like = next(flow.parameters())
    device = like.device
    preprocess = objective.preprocess()
    rngs = [generator(0, "evaluation", 0, index) for index in range(len(images))]
    inputs = objective.inputs(images, rngs).to(device)
    x, _ = objective.logits(inputs, like)
    context = None if labels is None else objective.context(labels, like)
    drawn = objective.labels(64)
    of_samples = None if drawn is None else objective.context(drawn, like)
    samples = flow.sample(64, torch.Generator(device).manual_seed(0), context=of_samples)
    errors = reconstruction_errors(flow, x, alphas, iterations, context)
    rows = reconstructions(flow, x, preprocess, alphas[-1], iterations[::3], context)
    corners = None if context is None else context[:4]
    between = preprocess.to_images(interpolation(flow, x[:4], context=corners))
    levels = objective.levels
    return {
        "samples": sample_sheet(preprocess.to_images(samples).cpu(), drawn, objective),
        "reconstruction_error": error_curves(errors, iterations),
        "reconstructions": image_sheet(rows, levels),
        "interpolation": image_grid(between, levels),
    }
