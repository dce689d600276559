"""What got slower from one result to another of the same machine, beyond what chance explains."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.measure.machine import folder
from bench.measure.timing import Spread
from bench.show.result import Entry, entries

#: rivals that are not the library: a change of theirs is one of the machine
CONTROLS = ("naive", "dense", "dense, channels last")
#: a slow-down below this is none
MARGIN = 0.05


def is_ours(rival: str) -> bool:
    return rival in ("ours", "ours, graph")


class Change(NamedTuple):
    """A case in both results."""

    entry: Entry
    ratio: Spread  #: new time over old, of medians, with its interval of 95 %
    slower: bool  #: clearly, given how much slower the machine was


class Comparison(NamedTuple):
    drift: float  #: of the machine: the new time of the rivals that are not ours over the old
    changes: list[Change]  #: of the library, the worst first
    lost: list[str]  #: what was timed before and is not any more, with the reason


def interval(new: Sequence[float], old: Sequence[float], draws: int = 2000) -> Spread:
    """The ratio of two medians, and the middle 95 % of it when both sides are drawn anew."""
    random = np.random.default_rng(0)

    def medians(values: Sequence[float]) -> Any:
        return np.median(random.choice(values, (draws, len(values))), axis=1)

    low, high = np.percentile(medians(new) / medians(old), (2.5, 97.5))
    return Spread(float(np.median(new) / np.median(old)), float(low), float(high))


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Compare what both have of the library; rivals outside it tell how the machine has changed.

    Raises:
        ValueError: the results are of different machines.
    """
    machines = [folder(result["machine"]) for result in (old, new)]
    if machines[0] != machines[1]:
        raise ValueError(f"results of different machines: {machines[0]} and {machines[1]}")
    before = {entry[:4]: entry.found for entry in entries(old["results"])}
    after = {entry[:4]: entry for entry in entries(new["results"])}
    ratios: list[tuple[Entry, Spread]] = []
    lost: list[str] = []
    for key, found in before.items():
        if "ms" not in found:
            continue
        entry = after.get(key)
        if entry is not None and "ms" in entry.found:
            ratios.append((entry, interval(entry.found["ms"], found["ms"])))
        elif is_ours(key[3]):
            reason = "not measured" if entry is None else entry.found["reason"]
            lost.append(f"{': '.join(key)}: {reason}")
    controls = [ratio.median for entry, ratio in ratios if entry.rival in CONTROLS]
    drift = float(np.median(controls)) if controls else 1.0
    limit = (1 + MARGIN) * drift
    changes = [
        Change(entry, ratio, ratio.low > limit) for entry, ratio in ratios if is_ours(entry.rival)
    ]
    return Comparison(drift, sorted(changes, key=lambda one: -one.ratio.median), lost)


def render(comparison: Comparison) -> str:
    """The comparison in Markdown."""
    lines = [
        f"The machine, by the rivals that are not ours: {comparison.drift:.2f} times as slow.",
        "",
        "| case | new time / old | interval of 95 % | |",
        "| --- | --- | --- | --- |",
    ]
    for entry, ratio, slower in comparison.changes:
        verdict = "slower" if slower else ""
        lines.append(
            f"| {entry} | {ratio.median:.2f} | {ratio.low:.2f}-{ratio.high:.2f} | {verdict} |"
        )
    lines += ["", *(f"- no longer timed: {text}" for text in comparison.lost)]
    return "\n".join(lines).rstrip()
