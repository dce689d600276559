"""A result as tables in Markdown: who wins by how much, how near the ceiling, and what went wrong.

Speeds are ratios of times, taken round by round: the median with its quartiles in brackets.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bench.contest.cases import SWEEPS
from bench.measure.timing import Spread, ratio, spread
from bench.show.result import Entry, entries, errors

Result = dict[str, Any]

#: rivals of which the faster one counts
ALTERNATIVES = {"dense": "dense, channels last"}
PASSES = {
    "forward": "forward with log-det",
    "training": "training step",
    "inverse": "inversion",
}


def render(result: Result) -> str:
    """Everything that a result says."""
    machine = result["machine"]
    title = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in machine.items())]
    for heading, table in tables(result).items():
        lines += ["", f"## {heading}", "", table]
    return "\n".join(lines)


def tables(result: Result) -> dict[str, str]:
    """The tables by heading; those with nothing to tell are left out."""
    results = result["results"]
    found = {"Ceilings, measured in the same run": _ceilings(results.get("ceilings", {}))}
    absolute = "gpu" in result["machine"]
    for section in ("layer", "convolution", "model", "models"):
        for pass_, words in PASSES.items():
            heading = f"{section.capitalize()}, {words}: speed of ours against"
            found[heading] = _races(results, section, pass_, absolute)
    found["Peak memory, MiB"] = _memory(results)
    found["Cost as work grows: time ~ (what grows) ^ exponent"] = _growth(results)
    for name, case in results.get("solvers", {}).items():
        found[f"Solvers on a {name}"] = _solvers(case.get("solvers", {}))
    found["Where we lose"] = _list(_losses(results))
    found["What went wrong"] = _list(errors(results))
    found["Not to be had here"] = _list(_missing(results))
    return {heading: table for heading, table in found.items() if table}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = ["| " + " | ".join(row) + " |" for row in rows]
    if not body:
        return ""
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *body])


def _list(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _ceilings(cases: Result) -> str:
    return _table(
        ["numbers", "matrix product, TFLOP/s", "convolution, TFLOP/s", "copy, GB/s"],
        [
            [name, *(f"{case[kind]:.3g}" for kind in ("matrix product", "convolution", "copy"))]
            for name, case in cases.items()
            if "copy" in case
        ],
    )


def best(rivals: Result, name: str) -> Result:
    """What is known of a rival, or of its alternative if that is faster."""
    found: Result = rivals.get(name, {})
    other: Result = rivals.get(ALTERNATIVES.get(name, ""), {})
    if "ms" not in found or ("ms" in other and np.median(other["ms"]) < np.median(found["ms"])):
        return other or found
    return found


def times(value: Spread) -> str:
    """A ratio with its quartiles, to two digits."""

    def digits(number: float) -> str:
        return (
            f"{number:.0f}" if number >= 10 else f"{number:.1f}" if number >= 2 else f"{number:.2f}"
        )

    return f"{digits(value.median)}x ({digits(value.low)}-{digits(value.high)})"


def speed(rivals: Result, name: str) -> Spread | None:
    """How many times as fast as a rival we are; None if one of the two was not timed."""
    ours, other = rivals.get("ours", {}), best(rivals, name)
    return ratio(other["ms"], ours["ms"]) if "ms" in ours and "ms" in other else None


def _races(results: Result, section: str, pass_: str, absolute: bool) -> str:
    """One row a case: ours against each rival, and how near the ceiling ours is."""
    races = {
        name: case["passes"][pass_]
        for name, case in results.get(section, {}).items()
        if pass_ in case.get("passes", {})
    }
    names = dict.fromkeys(name for race in races.values() for name in race["rivals"])
    others = [name for name in names if name != "ours" and name not in ALTERNATIVES.values()]
    judged = any("flops" in race for race in races.values())
    rows = []
    for name, race in races.items():
        rivals = race["rivals"]
        ours = rivals.get("ours", {})
        row = [name]
        if absolute:
            own = f"{spread(ours['ms']).median:.3g}" if "ms" in ours else ours.get("status", "")
            row.append(own)
        for other in others:
            value = speed(rivals, other)
            row.append(times(value) if value else _why_not(ours, best(rivals, other)))
        if judged:
            share = share_of_ceiling(results, results[section][name], race)
            row.append("" if share is None else f"{share:.0%}")
            done = ours.get("executed")
            row.append(f"{done / race['flops']:.2f}" if done else "")
        rows.append(row)
    header = ["case", *(["ours, ms"] if absolute else []), *others]
    if judged:
        header += ["share of the convolution ceiling", "flops executed, of the exact"]
    return _table(header, rows)


def _why_not(ours: Result, other: Result) -> str:
    if "status" in ours:
        return f"ours {ours['status']}"
    status: str = other.get("status", "")
    return status


def share_of_ceiling(results: Result, case: Result, race: Result) -> float | None:
    """The flops that the mask leaves, in our time, over what the dense convolution reaches."""
    ceiling = results.get("ceilings", {}).get(case["mode"], {}).get("convolution")
    ours = race["rivals"].get("ours", {})
    if ceiling is None or "ms" not in ours or "flops" not in race:
        return None
    share: float = race["flops"] / spread(ours["ms"]).median / 1e9 / ceiling
    return share


def _memory(results: Result) -> str:
    """Peaks of forward passes and training steps."""
    found: dict[str, dict[str, float]] = {}
    for entry in entries(results):
        if entry.found.get("MiB") is not None:
            row = found.setdefault(f"{entry.section}: {entry.case}: {entry.pass_}", {})
            row[entry.rival] = entry.found["MiB"]
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = [
        [case, *(f"{row[name]:.0f}" if name in row else "" for name in names)]
        for case, row in found.items()
    ]
    return _table(["case", *names], rows)


def points(results: Result, section: str, pass_: str, rival: str) -> list[tuple[int, Result]]:
    """What grows in a section, and what is known of a rival there, if it was timed."""
    found = []
    for case in results.get(section, {}).values():
        entry = case.get("passes", {}).get(pass_, {}).get("rivals", {}).get(rival, {})
        if "ms" in entry:
            found.append((int(case[SWEEPS[section]]), entry))
    return sorted(found, key=lambda point: point[0])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size, fitted to the larger half, of three points at least.

    What small sizes cost is not the cost of their work.

    Raises:
        ValueError: there are fewer than three points.
    """
    if len(sizes) < 3:
        raise ValueError(f"an exponent needs three points, got {len(sizes)}")
    last = max(3, math.ceil(len(sizes) / 2))
    return float(np.polyfit(np.log(sizes[-last:]), np.log(values[-last:]), 1)[0])


def _growth(results: Result) -> str:
    rows = []
    for section, grows in SWEEPS.items():
        for pass_ in ("forward", "training"):
            names = dict.fromkeys(
                entry.rival
                for entry in entries({section: results.get(section, {})})
                if entry.pass_ == pass_
            )
            for rival in names:
                found = points(results, section, pass_, rival)
                if len(found) < 3:
                    continue
                sizes = [size for size, _ in found]
                slope = exponent(sizes, [spread(entry["ms"]).median for _, entry in found])
                rows.append(
                    [grows, f"{sizes[0]} to {sizes[-1]}", PASSES[pass_], rival, f"{slope:.2f}"]
                )
    return _table(["what grows", "measured", "pass", "rival", "exponent"], rows)


def _solvers(rows: Result) -> str:
    if not rows:
        return ""
    paper = next(iter(rows.values()))
    body = []
    for name, row in rows.items():
        worst = row["worst residual"]
        body.append([
            name,
            f"{spread(row['ms']).median / spread(paper['ms']).median:.3f}",
            "not finite" if worst is None else f"{worst:.0e}",
            f"{row['not converged']} of {row['samples']}",
        ])  # fmt: skip
    return _table(["solver", "time, of the paper's", "worst residual", "not converged"], body)


def _losses(results: Result) -> list[str]:
    """Rivals that are faster than ours, by quartiles and not by the median alone."""
    found = []
    for section, cases in results.items():
        for name, case in cases.items():
            for pass_, race in case.get("passes", {}).items():
                rivals = race["rivals"]
                for other in rivals:
                    value = None if other in ("ours", "ours, graph") else speed(rivals, other)
                    if (
                        value is not None
                        and value.high < 1
                        and best(rivals, other) is rivals[other]
                    ):
                        found.append(f"{section}: {name}: {pass_}: {times(value)} against {other}")
    return found


def _missing(results: Result) -> list[str]:
    """What could not run, had no memory, or no time left."""

    def line(entry: Entry) -> str:
        return f"{entry}: {entry.found['status']}: {entry.found['reason']}"

    found = [
        line(entry)
        for entry in entries(results)
        if entry.found.get("status") in ("unavailable", "out of memory")
    ]
    for section, cases in results.items():
        found += [
            f"{section}: {name}: {case['status']}: {case['reason']}"
            for name, case in cases.items()
            if case.get("status") in ("skipped", "unavailable", "out of memory")
        ]
    return found
