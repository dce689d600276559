"""A result as pictures: speed, roofline, growth of time and memory, and error of every solver."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.contest.cases import SWEEPS
from bench.measure.timing import spread
from bench.show.report import PASSES, points, speed

Result = dict[str, Any]

# Okabe and Ito's colours, told apart by the colour-blind; markers tell them apart in print.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#000000", "*"))


def figures(result: Result) -> dict[str, Figure]:
    """The pictures that a result has something for, by name."""
    results = result["results"]
    drawn = {name: draw(results) for name, draw in DRAWN.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save(result: Result, folder: Path) -> list[Path]:
    """Write every picture into a folder, as PNG."""
    paths = []
    for name, figure in figures(result).items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def speeds(results: Result) -> Figure | None:
    """How many times as fast as each rival a layer is: median and quartiles."""
    cases = {name: case for name, case in results.get("layer", {}).items() if "passes" in case}
    found = {
        (pass_, rival, row): value
        for row, case in enumerate(cases.values())
        for pass_ in ("forward", "training")
        for rival in ("naive", "torch", "compiled")
        if (value := speed(case["passes"].get(pass_, {}).get("rivals", {}), rival)) is not None
    }
    if not found:
        return None
    rivals = list(dict.fromkeys(rival for _, rival, _ in found))
    thickness = 0.8 / len(rivals)
    figure = Figure(figsize=(8, 1.2 + 0.55 * len(cases)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    for axis, pass_ in zip(axes, ("forward", "training"), strict=True):
        for index, (rival, (colour, _)) in enumerate(zip(rivals, STYLES, strict=False)):
            bars = {
                row: value for (of, by, row), value in found.items() if (of, by) == (pass_, rival)
            }
            offset = thickness * (index - (len(rivals) - 1) / 2)
            axis.barh(
                [row + offset for row in bars],
                [value.median - 1 for value in bars.values()],
                0.9 * thickness,
                left=1,  # as fast: what is slower goes to the left
                color=colour,
                xerr=[
                    [value.median - value.low for value in bars.values()],
                    [value.high - value.median for value in bars.values()],
                ],
                error_kw={"linewidth": 1, "ecolor": "#666666"},
                label=f"against {rival}",
            )
        axis.axvline(1, color="#666666", linewidth=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(PASSES[pass_], fontsize=9)
        axis.set_xlabel("times as fast as the rival")
    axes[0].set_yticks(
        range(len(cases)), [name.replace(", ", "\n", 1) for name in cases], fontsize=7
    )
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", frameon=False,
                  ncols=len(rivals), fontsize=8)  # fmt: skip
    return figure


def roofline(results: Result) -> Figure | None:
    """What is achieved in flops that the mask leaves, under the ceilings of the same run."""
    ceilings = {name: case for name, case in results.get("ceilings", {}).items() if "copy" in case}
    found: dict[str, list[tuple[float, float]]] = {}
    for section in ("layer", "convolution"):
        for case in results.get(section, {}).values():
            for pass_, race in case.get("passes", {}).items():
                ours = race["rivals"].get("ours", {})
                if "ms" not in ours or "flops" not in race or case["mode"] not in ceilings:
                    continue
                rate = race["flops"] / spread(ours["ms"]).median / 1e9
                label = f"{section}, {pass_}, {case['mode']}"
                found.setdefault(label, []).append((race["flops"] / race["bytes"], rate))
    if not found:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    every = [point for values in found.values() for point in values]
    span = np.geomspace(min(x for x, _ in every) / 4, max(x for x, _ in every) * 4, 100)
    for (name, case), (colour, _) in zip(ceilings.items(), STYLES, strict=False):
        # A copy of one byte reads and writes: two move.
        roof = np.minimum(case["convolution"], span * case["copy"] / 1e3)
        axis.plot(span, roof, color=colour, linewidth=1, label=f"ceiling, {name}")
    colours = dict(zip(ceilings, (colour for colour, _ in STYLES), strict=False))
    markers = {"forward": "o", "training": "s"}
    for label, values in found.items():
        section, pass_, mode = label.split(", ")
        filled = colours[mode] if section == "layer" else "none"
        x, y = zip(*values, strict=True)
        axis.scatter(x, y, marker=markers[pass_], s=28, label=label,
                     edgecolors=colours[mode], facecolors=filled)  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("flops that the mask leaves, per byte that has to move")
    axis.set_ylabel("TFLOP/s that the mask leaves")
    axis.legend(frameon=False, fontsize=7)
    return figure


def _growth(
    results: Result,
    value_of: Callable[[Result], list[float] | None],
    label: str,
    sections: list[str],
) -> Figure | None:
    """A row of axes for the passes, one column for each thing that grows."""
    present = [section for section in sections if results.get(section)]
    figure = Figure(figsize=(3.2 * len(present) + 1, 5.5), layout="constrained")
    if not present:
        return None
    axes = figure.subplots(2, len(present), squeeze=False)
    drawn = False
    for row, pass_ in zip(axes, ("forward", "training"), strict=True):
        for axis, section in zip(row, present, strict=True):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            for rival, (colour, marker) in zip(("ours", "naive"), STYLES, strict=False):
                known = [
                    (size, value)
                    for size, entry in points(results, section, pass_, rival)
                    if (value := value_of(entry)) is not None
                ]
                if not known:
                    continue
                drawn = True
                sizes = [size for size, _ in known]
                middle, low, high = zip(*(spread(values) for _, values in known), strict=True)
                axis.plot(sizes, middle, color=colour, marker=marker, markersize=4, label=rival)
                axis.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
        row[0].set_ylabel(f"{PASSES[pass_]}\n{label}")
    for axis, section in zip(axes[-1], present, strict=True):
        axis.set_xlabel(AXES[section])
    if not drawn:
        return None
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


AXES = {
    "growing batch": "samples in a batch",
    "growing K": "hidden units of a colour, K",
    "growing image": "side of the image, pixels",
}


def scaling(results: Result) -> Figure | None:
    """Time of a layer as batch, hidden units and image grow: median and quartiles."""
    return _growth(results, lambda entry: entry["ms"], "milliseconds", list(SWEEPS))


def memory(results: Result) -> Figure | None:
    """Peak memory of a layer as the batch grows."""

    def peak(entry: Result) -> list[float] | None:
        return [entry["MiB"]] if entry.get("MiB") else None

    return _growth(results, peak, "peak memory, MiB", ["growing batch"])


def curves(results: Result) -> Figure | None:
    """Reconstruction error against iterations (Figure 4a of the paper), and against time."""
    rows = {name: case for name, case in results.get("curves", {}).items() if "curves" in case}
    if not rows:
        return None
    figure = Figure(figsize=(8, 3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, sharey="row", squeeze=False)
    for pair, (name, case) in zip(axes, rows.items(), strict=True):
        solvers = case["curves"]
        for axis, unit in zip(pair, ("iterations", "seconds"), strict=True):
            _draw_errors(axis, solvers, unit)
        samples = len(next(iter(solvers.values()))[0]["errors"])
        pair[0].set_title(f"{name}, {samples} samples, median and range", fontsize=9)
        pair[0].set_ylabel("reconstruction error, max |x − x̂|")
        paper = case["paper seconds"]
        pair[1].axvline(paper, color="#999999", linestyle="--")
        pair[1].annotate("literal layer, T = 100", (paper, 0.5), rotation=90, fontsize=7,
                         xycoords=("data", "axes fraction"), ha="right", va="center")  # fmt: skip
    axes[-1][0].set_xlabel("iterations per layer")
    axes[-1][1].set_xlabel("seconds")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _draw_errors(axis: Axes, solvers: Result, unit: str) -> None:
    """Errors of every solver; the wavefront, which has no iterations, as a line across."""
    for (name, found), (colour, marker) in zip(solvers.items(), STYLES, strict=False):
        errors = np.array([point["errors"] for point in found], dtype=float).clip(1e-8)
        errors = np.where(np.isfinite(errors), errors, math.nan)
        low, middle, high = (f(errors, axis=1) for f in (np.nanmin, np.nanmedian, np.nanmax))
        where = [point[unit] for point in found]
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


DRAWN: dict[str, Callable[[Result], Figure | None]] = {
    "speed": speeds,
    "roofline": roofline,
    "scaling": scaling,
    "memory": memory,
    "sampling": curves,
}
