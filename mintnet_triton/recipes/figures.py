"""Pictures: a sheet of images, and reconstruction error against iteration."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mintnet_triton.inverse import Invertible, invert
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


def reconstruction_errors(
    model: Invertible, x: Tensor, alphas: list[float], iterations: list[int]
) -> dict[float, Tensor]:
    """Error of x after so many fixed-point iterations in each layer (Figure 4a of the paper).

    Args:
        model: a layer or a network.
        x: (B, ...), inputs of the model.
        alphas: steps to try.
        iterations: numbers of iterations per layer.

    Returns:
        alpha -> ``max |x - reconstruction|`` (len(iterations), B).
    """
    with torch.no_grad():
        z, _ = model(x)
    return {
        alpha: torch.stack(
            [
                max_error(invert(model, z, FixedPoint(alpha, count, tolerance=0)).x, x)
                for count in iterations
            ]
        )
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
