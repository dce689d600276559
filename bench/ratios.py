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


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("| layer, work | speed against naive |\n| --- | --- |")
    for group, ratio in ratios(result).items():
        print(f"| {group.replace('_', ' ')} | {ratio:.1f}x |")


if __name__ == "__main__":
    main()
