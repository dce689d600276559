"""What each case takes of a CPU's memory, in MiB: ``python -m bench.measure.memory EXTENT``.

A process of its own, for the peak of resident pages is that of memory in use only where freed
memory goes back to the system at once, which has to be asked for before a process starts.
"""

import json
import os
import subprocess
import sys
from typing import Any

import torch

from bench.contest.cases import Extent, all_cases
from bench.measure.machine import ROOT
from bench.measure.race import memory_of

#: glibc's: every block of this size or more is the system's own, and returned when it is freed
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def in_fresh_process(extent: Extent) -> dict[str, Any]:
    """Peaks by section, case, pass and rival; None where the system does not tell.

    Raises:
        subprocess.CalledProcessError: the process ended with an error, which it has printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench.measure.memory", extent],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    device = torch.device("cpu")
    found: dict[str, Any] = {}
    for case in all_cases(device, sys.argv[1]):  # type: ignore[arg-type]  # an extent
        if case.resources:
            found.setdefault(case.section, {})[case.name] = memory_of(case, device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
