"""Times that can be trusted: how work is timed, and what is said of many times.

Rivals are timed in rounds: each of them once a round, in an order drawn anew, so that whatever
slows the machine down for a while slows all of them. A ratio is therefore taken round by round,
and what is reported of it, as of any time, is the median with its quartiles.
"""

import gc
import importlib.util
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mintnet_triton.recipes.processes import resident_memory

Work = Callable[[], Any]

#: seconds that one reading of a CPU's clock has to span: shorter work is repeated
SHORTEST = 2e-3


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of some values, by linear interpolation."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratio of two rivals of the same rounds, taken round by round.

    Raises:
        ValueError: they have not as many rounds.
    """
    return spread([one / other for one, other in zip(over, under, strict=True)])


class Clock:
    """Times of calls, in milliseconds.

    Args:
        device: of the work.
        seconds: about as long as the rounds of one race take, if ``rounds`` allows it.
        rounds: the fewest and the most.
        once: call once and measure nothing, to compile.
        now: what is read before and after work on a CPU, in seconds.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        seconds: float = 1.0,
        rounds: tuple[int, int] = (7, 60),
        once: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.seconds, self.rounds, self.once, self.now = (
            device, seconds, rounds, once, now,
        )  # fmt: skip
        self._random = random.Random(0)
        self._flush: Tensor | None = None

    def __call__(self, work: Work, *, cold: bool = False) -> float:
        """Median time of one work alone."""
        return spread(self.race({"": work}, cold=cold)[""]).median

    def race(self, works: Mapping[str, Work], *, cold: bool = False) -> dict[str, list[float]]:
        """Time rivals against each other.

        Args:
            works: what to call, by name.
            cold: on a GPU, empty its cache before every call, which also keeps it busy until the
                launches are queued, so that a kernel is timed alone; by default a call follows
                another of the same work.

        Returns:
            Milliseconds of one call in every round, for each rival; an index is a round.
        """
        if self.once:
            return {name: [1e3 * self._seconds(work)] for name, work in works.items()}
        estimates = {}
        for name, work in works.items():
            work()
            estimates[name] = max(self._seconds(work), 1e-6)
        on_gpu = self.device.type == "cuda"
        calls = {
            name: 1 if on_gpu else math.ceil(SHORTEST / estimate)
            for name, estimate in estimates.items()
        }
        a_round = sum(estimates[name] * calls[name] for name in works)
        fewest, most = self.rounds
        rounds = min(most, max(fewest, int(self.seconds / max(a_round, 1e-6))))
        times: dict[str, list[float]] = {name: [] for name in works}
        order = list(works)
        with _no_garbage_collection():
            for _ in range(rounds):
                self._random.shuffle(order)
                for name in order:
                    if on_gpu:
                        times[name].append(self._by_events(works[name], cold))
                    else:
                        count = calls[name]
                        times[name].append(1e3 * self._seconds(works[name], count) / count)
        return times

    def _seconds(self, work: Work, calls: int = 1) -> float:
        self._synchronise()
        start = self.now()
        for _ in range(calls):
            work()
        self._synchronise()
        return self.now() - start

    def _by_events(self, work: Work, cold: bool) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self._empty_cache()
        else:
            work()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _empty_cache(self) -> None:
        if self._flush is None:
            self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        for _ in range(3):
            self._flush.zero_()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def capture(work: Work) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the work, and what the work returned: it changes when the graph is replayed.

    The work runs thrice before, so that all is compiled.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


def peak_memory(work: Work, device: torch.device) -> float | None:
    """MiB that a call takes at its peak on top of what is there before; None where nobody tells.

    On a GPU the allocator tells. On a CPU the kernel does, of resident pages: only a process that
    gives freed memory back at once (see :mod:`bench.measure.memory`) makes that the memory in use.
    """
    work()  # what stays afterwards is not of a call
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    except OSError:
        return None
    resident = resident_memory("VmRSS")
    work()
    peak = resident_memory("VmHWM")
    return None if peak is None or resident is None else peak - resident


def energy(work: Work, clock: Clock, seconds: float = 0.5) -> float | None:
    """Joules of a call, over about that many seconds of calls; None where no driver tells."""
    read = _gpu_joules(clock.device) if clock.device.type == "cuda" else _cpu_joules()
    if clock.once or read is None:
        return None
    calls = math.ceil(seconds / max(clock._seconds(work), 1e-6))
    before = read()
    clock._seconds(work, calls)
    used = read() - before
    return used / calls if used > 0 else None  # a counter may start again at zero


def _gpu_joules(device: torch.device) -> Callable[[], float] | None:
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        )
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def _cpu_joules() -> Callable[[], float] | None:
    counters = [path / "energy_uj" for path in Path("/sys/class/powercap").glob("intel-rapl:[0-9]")]
    try:
        for path in counters:
            path.read_text(encoding="ascii")
    except OSError:
        return None
    if not counters:
        return None
    return lambda: sum(int(path.read_text(encoding="ascii")) for path in counters) / 1e6
