"""``python -m bench.ratios FILE``: speed against the naive layer, from a result of `make bench`."""

import json
import sys
from pathlib import Path
from typing import Any


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Median time of the naive layer over that of ours, for each scale and kind of work."""
    medians: dict[str, dict[str, float]] = {}
    for case in result["benchmarks"]:
        medians.setdefault(case["group"], {})[case["extra_info"]["rival"]] = case["stats"]["median"]
    return {group: times["naive"] / times["mintnet_triton"] for group, times in medians.items()}


def table(path: Path) -> str:
    """The ratios of a result file, in Markdown."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = (
        f"| {group.replace('_', ' ')} | {ratio:.1f}x |" for group, ratio in ratios(result).items()
    )
    return "\n".join(["| layer, work | speed against naive |", "| --- | --- |", *rows])


def main() -> None:
    print(table(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
