"""How models on equal terms learn: loss on the held-out images against minutes of training."""

from typing import Any

from matplotlib.figure import Figure

from bench.show.plot import STYLES

#: of curves whose colour and marker are those of others
LINES = ("-", "--", ":", "-.")


def learning(runs: dict[str, dict[str, Any]], loss: str) -> Figure | None:
    """A curve for each of the runs, by what they are called; None where none has a curve.

    Args:
        runs: each with a "curve": pairs of seconds and loss.
        loss: what is on the vertical axis.
    """
    drawn = {name: made["curve"] for name, made in runs.items() if made.get("curve")}
    if not drawn:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for number, (name, curve) in enumerate(drawn.items()):
        colour, marker = STYLES[number % len(STYLES)]
        line = LINES[number // len(STYLES) % len(LINES)]
        seconds, losses = zip(*curve, strict=True)
        axis.plot([one / 60 for one in seconds], losses, color=colour, marker=marker, markersize=3,
                  linewidth=1, linestyle=line, label=name)  # fmt: skip
    # What is learnt in the first tenth would hide the rest.
    late = [value for curve in drawn.values() for value in _late(curve)]
    margin = 0.05 * (max(late) - min(late)) or 0.01
    axis.set_ylim(min(late) - margin, max(late) + margin)
    axis.set_xlabel("minutes of training, of one core")
    axis.set_ylabel(loss)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _late(curve: list[list[float]]) -> list[float]:
    """Losses after a tenth of the time."""
    end = curve[-1][0]
    return [value for seconds, value in curve if seconds >= end / 10]
