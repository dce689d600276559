"""Two revisions of the code, measured in turns: ``python -m bench compare OLD NEW``.

Both are checked out as worktrees of git, in a temporary folder. In every turn each of them runs its
own ``pytest bench`` in a process of its own, one after the other, so that whatever slows the
machine down for a while slows both. A ratio is taken turn by turn, of the fastest rounds: with
seconds or minutes between the two, others on the machine slow the one or the other, never speed it
up.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import trange

from bench.measure.machine import ROOT
from bench.measure.timing import Spread, ratio
from bench.show.compare import MARGIN

#: exit codes of pytest: all passed, some failed, nothing was chosen
PASSED, FAILED, NOTHING = 0, 1, 5


class RevisionError(ValueError):
    """What was named cannot be measured."""


class Side(NamedTuple):
    """What is known of one revision."""

    name: str  #: as it was given
    commit: str
    times: list[dict[str, float]]  #: for every turn, the least seconds of each case
    failures: dict[str, None]  #: what went wrong in any turn, in pytest's words, each once

    @property
    def cases(self) -> list[str]:
        """Those that were timed in every turn."""
        return [case for case in self.times[0] if all(case in turn for turn in self.times)]


def git(root: Path, *arguments: str) -> str:
    """What git prints.

    Raises:
        RevisionError: it fails, for the reason that it printed.
    """
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RevisionError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def commit_of(root: Path, name: str) -> str:
    """The commit that a revision is.

    Raises:
        RevisionError: it is none.
    """
    try:
        return git(root, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except RevisionError as error:
        raise RevisionError(
            f"{name!r} is neither a result file nor a revision of git here ({error})"
        ) from error


@contextlib.contextmanager
def checkouts(root: Path, commits: Sequence[str]) -> Iterator[list[Path]]:
    """A worktree for each commit, for as long as this lasts: its end by SIGTERM, too."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}-{commit}" for index, commit in enumerate(commits)]
        try:
            for path, commit in zip(paths, commits, strict=True):
                git(root, "worktree", "add", "--quiet", "--detach", str(path), commit)
            yield paths
        finally:
            for path in paths:
                # It may not be there yet, or be locked, for git was stopped while making it.
                with contextlib.suppress(RevisionError):
                    git(root, "worktree", "remove", "--force", "--force", str(path))
            signal.signal(signal.SIGTERM, before)


def take_turn(side: Side, checkout: Path, cases: str, device: str) -> None:
    """Measure a revision once more.

    Raises:
        RevisionError: it has no such cases, or no benchmarks.
    """
    report = checkout.with_suffix(".json")
    environment = {**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "300"}  # reasons in full
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:randomly", "-k", cases,
         "--device", device, f"--benchmark-json={report}"],
        cwd=checkout, env=environment, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode == NOTHING:
        raise RevisionError(f"{side.name} has no case that {cases!r} chooses")
    if done.returncode not in (PASSED, FAILED):
        last = "\n".join(done.stdout.splitlines()[-20:])
        raise RevisionError(f"pytest bench did not run in {side.name}:\n{last}")
    lines = done.stdout.splitlines()
    side.failures.update(dict.fromkeys(line for line in lines if line.startswith("FAILED")))
    text = report.read_text(encoding="utf-8") if report.exists() else ""
    found = json.loads(text)["benchmarks"] if text else []  # empty where nothing was timed
    report.unlink(missing_ok=True)
    side.times.append({one["param"]: one["stats"]["min"] for one in found})


def measure(
    names: tuple[str, str], cases: str, turns: int, device: str, root: Path = ROOT
) -> tuple[Side, Side]:
    """Measure two revisions, turn by turn.

    Args:
        names: of the old one and the new one, as git knows them.
        cases: an expression, as of pytest's ``-k``.
        turns: how often each is measured.
        device: "cpu" or "cuda".
        root: a folder of the repository.

    Raises:
        RevisionError: a revision is none, or does not have the cases.
    """
    old, new = (Side(name, commit_of(root, name), [], {}) for name in names)
    with checkouts(root, (old.commit, new.commit)) as paths:
        for _ in trange(turns, unit="turn"):
            for side, path in zip((old, new), paths, strict=True):
                take_turn(side, path, cases, device)
    return old, new


class Change(NamedTuple):
    """A case of both revisions."""

    case: str
    ratio: Spread  #: new time over old, turn by turn
    slower: bool  #: in every turn: by chance, that happens once in 2^turns at most


def changes(old: Side, new: Side) -> list[Change]:
    """What became of the cases that both have, the worst first."""
    found = []
    for case in set(old.cases) & set(new.cases):
        before, after = ([turn[case] for turn in side.times] for side in (old, new))
        slower = all(late > (1 + MARGIN) * early for early, late in zip(before, after, strict=True))
        found.append(Change(case, ratio(after, before), slower))
    return sorted(found, key=lambda one: (-one.ratio.median, one.case))


def went_wrong(old: Side, new: Side) -> bool:
    """Whether the new one is slower anywhere, or lacks what the old one has."""
    slower = any(change.slower for change in changes(old, new))
    return slower or bool(set(old.cases) - set(new.cases))


def render(old: Side, new: Side) -> str:
    """The comparison in Markdown."""
    lines = [
        f"Old is {old.name} ({old.commit[:12]}), new is {new.name} ({new.commit[:12]}); "
        f"turns of each: {len(old.times)}.",
        "",
        "| case | new time / old | quartiles | |",
        "| --- | --- | --- | --- |",
    ]
    for case, (median, low, high), slower in changes(old, new):
        lines.append(f"| {case} | {median:.2f} | {low:.2f}-{high:.2f} | {'slower' * slower} |")
    lines.append("")
    for side, other in ((old, new), (new, old)):
        lines += [
            f"- {side.name} alone has {case}" for case in side.cases if case not in other.cases
        ]
        lines += [f"- in {side.name}: {failure}" for failure in side.failures]
    return "\n".join(lines).rstrip()
