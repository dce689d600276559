"""A result: a file of what was measured, and what may be read in it.

A result has the machine, and under "results" sections of cases. Of a race: its mode, batch and
scale, and "passes", each with the "rivals": a rival has its times in "ms", by round, with the
"error" that it was judged by; or a "status" and the "reason" why it has none.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure.race import Result


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace the file as a whole, so that it is never half written."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


class Entry(NamedTuple):
    """A rival in one pass of a case."""

    section: str
    case: str
    pass_: str
    rival: str
    found: Result

    def __str__(self) -> str:
        return f"{self.section}: {self.case}: {self.pass_}: {self.rival}"


def entries(results: dict[str, Any]) -> Iterator[Entry]:
    """Every rival of every race."""
    for section, cases in results.items():
        for name, case in cases.items():
            for pass_, race in case.get("passes", {}).items():
                for rival, found in race["rivals"].items():
                    yield Entry(section, name, pass_, rival, found)


def errors(results: dict[str, Any]) -> list[str]:
    """What went wrong; that a rival is not to be had here, or lacks memory, is no fault."""
    found = [
        f"{entry}: {entry.found['status']}: {entry.found['reason']}"
        for entry in entries(results)
        if is_fault(entry.found)
    ]
    for section, cases in results.items():
        found += [
            f"{section}: {name}: {case['status']}: {case['reason']}"
            for name, case in cases.items()
            if is_fault(case)
        ]
    return found


def is_fault(found: Result) -> bool:
    return found.get("status") in ("wrong", "failed", "not converged")
