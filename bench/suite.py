"""Tests run by many processes side by side, in steps, until the time is up.

A process takes a few tests at a time. One that crashes, hangs, or is spoiled by an error of CUDA,
after which nothing works in it, has spoiled the outcome of its own tests alone; in the end those
that did not pass are run again, each in a process of its own. The first steps come first, but no
processor waits for the last test of a step. What is known of a step is in its file all the time.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

#: processes that the tests of a step are meant for, of each that runs at a time: more of them lose
#: less when one is spoiled, fewer import torch less often
TURNS = 3
#: seconds without a word after which a process is taken to hang: compiling is silent
STALLED = 270

# In the order in which they stand, so that it can be seen what has spoiled what.
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "--color=no"]


#: outcomes that are as they should be
FINE = ("PASSED", "SKIPPED", "XFAIL", "XPASS")


class Step(NamedTuple):
    """Tests that belong together."""

    name: str  # of its files
    arguments: Sequence[str]  # of pytest: which tests; those of an earlier step are left out


#: for processes of which there are as many as processors
ONE_OF_MANY = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


def spawn(
    command: Sequence[str],
    output: Path | None,
    root: Path = ROOT,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Start Python in a process group of its own."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output.open("w", encoding="utf-8")) if output else None
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=file,
            stderr=subprocess.STDOUT if file else None,
            start_new_session=True,
        )


def end(process: Any) -> None:
    """Kill a process with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(processes: Iterable[Any], until: float) -> None:
    """Wait for processes, and end those that take longer."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, until - time.time()))
        if process.poll() is None:
            end(process)


class _Share:
    """Some tests of a step, and the process that runs them."""

    def __init__(self, step: str, names: Sequence[str], log: Path, root: Path) -> None:
        self.step, self.names, self.log = step, names, log
        command = [*PYTEST, "-v", "--tb=short", *names]
        self.process = spawn(command, log, root, ONE_OF_MANY)
        #: the outcome of its only test, if that has none
        self.ending: str | None = "CRASHED"

    def is_over(self) -> bool:
        """Whether it has ended; it is made to where it hangs."""
        if self.process.poll() is None and time.time() - self.log.stat().st_mtime > STALLED:
            end(self.process)
            self.ending = "HUNG"
        return self.process.poll() is not None

    def outcomes(self, text: str) -> dict[str, str]:
        """Of its tests, from what it has printed."""
        found = outcomes_in(text)
        if not found and self.ending and len(self.names) == 1:
            found[self.names[0]] = self.ending
        return found


class _Run:
    """All that is known while tests run."""

    def __init__(self, steps: Sequence[Step], out: Path, root: Path) -> None:
        self.steps, self.out, self.root, self.start = steps, out, root, time.time()
        self.names: dict[str, list[str]] = {}
        self.found: dict[str, str] = {}  # outcomes, by test
        self.again: dict[str, str] = {}  # and those of the second time
        self.second = False

    def collect(self, folder: Path, until: float) -> None:
        """Find the tests of all steps, all at once."""
        listings = [folder / f"listing-{step.name}" for step in self.steps]
        processes = [
            spawn([*PYTEST, "--collect-only", "-q", *step.arguments], listing, self.root)
            for step, listing in zip(self.steps, listings, strict=True)
        ]
        wait(processes, until)
        seen: set[str] = set()
        for step, listing in zip(self.steps, listings, strict=True):
            text = read_text(listing)
            every = re.findall(r"^\S+\.py::.+$", text, re.MULTILINE)
            self.names[step.name] = [name for name in every if name not in seen]
            seen.update(every)
            (self.out / f"{step.name}.txt").write_text("" if every else text, encoding="utf-8")

    def work(
        self, shares: list[tuple[str, list[str]]], jobs: int, folder: Path, until: float
    ) -> None:
        """Run shares of steps, so many at a time."""
        running: list[_Share] = []
        try:
            while (shares or running) and time.time() < until:
                while shares and len(running) < jobs:
                    step, names = shares.pop(0)
                    log = folder / f"share-{time.monotonic_ns()}"
                    running.append(_Share(step, names, log, self.root))
                for share in [one for one in running if one.is_over()]:
                    running.remove(share)
                    self.note(share)
                time.sleep(0.1)
        finally:
            for share in running:
                end(share.process)
                share.ending = None
                self.note(share)

    def note(self, share: _Share) -> None:
        """Keep what a process has said, and write down what is known of its step."""
        text = read_text(share.log)
        (self.again if self.second else self.found).update(share.outcomes(text))
        with (self.out / f"{share.step}.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.write(share.step)

    def write(self, step: str) -> None:
        result = self.results()[step]
        (self.out / f"{step}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")

    def results(self) -> dict[str, Any]:
        seconds = round(time.time() - self.start, 1)
        return {
            step: count(names, self.found, self.again) | {"seconds": seconds}
            for step, names in self.names.items()
        }


def run(
    steps: Sequence[Step], jobs: int, out: Path, until: float, root: Path = ROOT
) -> dict[str, Any]:
    """Run the tests of some steps.

    Args:
        jobs: processes at a time.
        out: folder for a file of results, and one of what was printed, for each step.
        until: when to stop, in the seconds of :func:`time.time`.
        root: folder to run in.

    Returns:
        For each step what :func:`count` says, and the seconds since the start.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = _Run(steps, out, root)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state.collect(folder, until)
        shares = []
        for step, names in state.names.items():
            state.write(step)
            parts = max(1, min(len(names), TURNS * jobs))
            shares += [(step, names[part::parts]) for part in range(parts if names else 0)]
        state.work(shares, jobs, folder, until)
        bad = [
            (step, [name])
            for step, names in state.names.items()
            for name in names
            if state.found.get(name) not in FINE
        ]
        state.second = True
        state.work(bad, jobs, folder, until)
    results = state.results()
    for step in state.names:
        state.write(step)
    return results


def outcomes_in(text: str) -> dict[str, str]:
    """The outcome of each test in what ``pytest -v`` printed."""
    pattern = r"^(\S+\.py::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b"
    return dict(re.findall(pattern, text, re.MULTILINE))


def count(
    names: Sequence[str], found: Mapping[str, str], again: Mapping[str, str]
) -> dict[str, Any]:
    """Numbers of tests by outcome, "unfinished" without one, and which of them went wrong.

    Args:
        found: outcomes by name, and ``again`` those of a second time, alone, which are the last
            word.
    """
    last = {name: again.get(name, found.get(name, "UNFINISHED")) for name in names}
    alone = [name for name in names if name in again and last[name] in FINE]
    return {
        "collected": len(names),
        **Counter(outcome.lower() for outcome in last.values()),
        "wrong": [name for name in names if last[name] not in (*FINE, "UNFINISHED")],
        **({"passed alone": alone} if alone else {}),
    }


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
