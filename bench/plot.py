"""Curves of a result of :mod:`bench.sampling`: ``python -m bench.plot FILE [--out PICTURE]``.

Reconstruction error against iterations (Figure 4a of the paper) and against time, for every solver,
at one layer and through a whole network.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# Okabe and Ito's colours, told apart by the colour-blind; markers tell them apart in print.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#000000", "*"))


def curves(results: dict[str, Any]) -> Figure:
    """One row of axes for each map; against iterations, and against seconds."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    rows = results["curves"]
    axes = figure.subplots(len(rows), 2, sharey="row", squeeze=False)
    for pair, (name, solvers) in zip(axes, rows.items(), strict=True):
        for axis, unit in zip(pair, ("iterations", "seconds"), strict=True):
            draw(axis, solvers, unit)
        pair[0].set_title(f"{name}, {samples(solvers)} samples, median and range", fontsize=9)
        pair[0].set_ylabel("reconstruction error, max |x − x̂|")
    axes[-1][0].set_xlabel("iterations per layer")
    axes[-1][1].set_xlabel("seconds")
    naive = next(iter(results["solvers"].values()))["seconds"]
    axes[-1][1].axvline(naive, color="#999999", linestyle="--")
    axes[-1][1].annotate("literal layer, T = 100", (naive, 0.5), rotation=90, fontsize=7,
                         xycoords=("data", "axes fraction"), ha="right", va="center")  # fmt: skip
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def samples(solvers: dict[str, Any]) -> int:
    return len(next(iter(solvers.values()))[0]["errors"])


def draw(axis: Axes, solvers: dict[str, Any], unit: str) -> None:
    """Errors of every solver; the wavefront, which has no iterations, as a line across."""
    for (name, points), (colour, marker) in zip(solvers.items(), STYLES, strict=True):
        errors = np.array([point["errors"] for point in points])
        errors = np.where(np.isfinite(errors), errors, np.nan).clip(1e-8)
        low, middle, high = (f(errors, axis=1) for f in (np.nanmin, np.nanmedian, np.nanmax))
        where = [point[unit] for point in points]
        if where[0] is None:
            axis.axhline(middle[0], color=colour, linestyle=":", label=f"{name} (wavefront)")
            continue
        axis.plot(where, middle, color=colour, marker=marker, markersize=4, label=name)
        axis.fill_between(where, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(where) == 1:
            axis.vlines(where, low, high, color=colour)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="the picture; by default beside the file")
    options = parser.parse_args()
    path = options.out or options.file.with_name("sampling.png")
    results = json.loads(options.file.read_text(encoding="utf-8"))
    curves(results).savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    main()
