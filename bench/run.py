"""A run: everything of the table, measured one after the other, in one result file."""

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.contest.cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    TF32,
    Extent,
    Mode,
    all_cases,
    is_emulated,
)
from bench.contest.rivals import UnavailableError
from bench.measure import machine, memory
from bench.measure.ceilings import measure_ceilings
from bench.measure.models import measure_models
from bench.measure.race import Result, compile_kernels, measure, verdict
from bench.measure.sampling import measure_curves, measure_solvers
from bench.measure.timing import Clock
from bench.show.result import write
from mintnet_triton.kernels.backend import INTERPRETED


class Task(NamedTuple):
    """Something to measure, for one entry of a result."""

    section: str
    name: str
    run: Callable[[Clock], Result]
    #: what is worth running before, so that nothing is compiled while time is short
    compile: Callable[[Clock], Result] | None = None
    priority: int = 0


def tasks(device: torch.device, extent: Extent) -> list[Task]:
    """All that a run measures, the most important first."""
    gpu = device.type == "cuda"
    modes = [FLOAT32, TF32, BFLOAT16, FLOAT16] if gpu else [FLOAT32, BFLOAT16]
    if extent == "tiny":
        modes = modes[:1]

    def unless_emulated(mode: Mode, work: Callable[[Clock], Result]) -> Callable[[Clock], Result]:
        if extent != "tiny" and is_emulated(mode, device):
            return partial(leave_out, mode)
        return work

    found = [
        Task(
            "ceilings", mode.name, unless_emulated(mode, partial(measure_ceilings, mode, extent))
        )
        for mode in modes
    ]  # fmt: skip
    found += [
        Task(
            case.section, case.name, unless_emulated(case.mode, partial(measure, case)),
            partial(compile_kernels, case) if case.priority < 2 else None, case.priority,
        )
        for case in all_cases(device, extent)
    ]  # fmt: skip
    if extent != "tiny":
        samples = (16 if gpu else 8) if extent == "full" else 2
        curves = partial(measure_curves, True, samples)
        found.append(Task("curves", "one layer", curves, priority=2))
    if extent == "full":
        name = f"trained network of 24 layers, {samples} samples"
        found.append(Task("solvers", name, partial(measure_solvers, samples), priority=2))
        curves = partial(measure_curves, False, samples // 2)
        found.append(Task("curves", "whole network", curves, priority=2))
        models = partial(measure_models, "mnist", 8)
        found.append(Task("models", "size of the mnist model, batch 8", models, priority=2))
    return sorted(found, key=lambda task: task.priority)


def leave_out(mode: Mode, clock: Clock) -> Result:
    """Nothing is measured.

    Raises:
        UnavailableError: always.
    """
    raise UnavailableError(f"left out, for this processor has no instructions for {mode.name}")


def clock_for(device: torch.device, extent: Extent, *, once: bool = False) -> Clock:
    """How long a race is: on a CPU, whose rounds differ, longer."""
    if device.type == "cuda":
        return Clock(device, seconds=0.3, rounds=(10, 100), once=once)
    seconds, rounds = {"tiny": (0.0, (2, 2)), "quick": (0.3, (3, 30)), "full": (1.0, (5, 60))}[
        extent
    ]
    # In Triton's interpreter a call takes seconds, and its time says nothing.
    return Clock(device, seconds=seconds, rounds=rounds, once=once or INTERPRETED)


def measured(task: Task, clock: Clock) -> Result:
    """The result of a task with the seconds it took; a verdict if all of it went wrong."""
    start = time.perf_counter()
    try:
        result = task.run(clock)
    except Exception as error:  # whatever it is, the other results are wanted
        result = verdict(error)
    gc.collect()
    return result | {"seconds": round(time.perf_counter() - start, 2)}


def run(
    device: torch.device, extent: Extent, path: Path, sections: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure, with a bar of progress; the file is renewed after every case.

    Args:
        sections: to measure these alone, and no memory.
    """
    from tqdm import tqdm  # here, for bench.gpu has to do without

    result: dict[str, Any] = {
        "machine": machine.describe(device) | {"extent": extent},
        "results": {},
    }
    clock = clock_for(device, extent)
    everything = tasks(device, extent)
    chosen = [task for task in everything if not sections or task.section in sections]
    with tqdm(chosen, unit="case") as bar:
        for task in bar:
            bar.set_postfix_str(f"{task.section}: {task.name}")
            section = result["results"].setdefault(task.section, {})
            section[task.name] = measured(task, clock)
            write(path, result)
    if device.type == "cpu" and not sections:
        add_memory(result["results"], memory.in_fresh_process(extent))
        write(path, result)
    return result


def add_memory(results: dict[str, Any], peaks: dict[str, Any]) -> None:
    """Put peaks of memory beside times; what was not timed has no peak either."""
    for section, cases in peaks.items():
        for name, passes in cases.items():
            for pass_, rivals in passes.items():
                timed = results[section][name].get("passes", {}).get(pass_, {}).get("rivals", {})
                for rival, peak in rivals.items():
                    if "ms" in timed.get(rival, {}):
                        timed[rival]["MiB"] = peak
