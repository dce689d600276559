"""Two revisions compared: of a tiny repository, whose clock only knows what it is told."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import __main__, revisions
from bench.measure import machine
from bench.revisions import RevisionError, Side

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture(autouse=True, scope="module")
def no_parallel_tests() -> Iterator[None]:
    """Where these tests are a worker's, pytest-benchmark would measure nothing in a turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield


CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--device")
"""

#: a suite that notes when it runs, and where it would import from
SUITE = """
import os
import pathlib
import pytest

NOW = [0.0]
SECONDS = {seconds}
with (pathlib.Path({log!r})).open("a") as log:
    where = pathlib.Path(os.environ["PYTHONPATH"]) == pathlib.Path.cwd()
    log.write(f"{name}, {{where}}, {{os.getpid()}}\\n")

def now():
    NOW[0] += 1e-6  # a clock that stands still has no precision
    return NOW[0]

@pytest.mark.benchmark(timer=now)
@pytest.mark.parametrize("case", [pytest.param(case, id=f"layer: {{case}}") for case in SECONDS])
def test_case(benchmark, case):
    assert SECONDS[case], "wrong by a mile"
    def work():
        NOW[0] += SECONDS[case]
    benchmark.pedantic(work, rounds=3)
"""


def commit(root: Path, name: str, seconds: dict[str, float]) -> None:
    """A revision in which cases take so many seconds; 0 makes one fail."""
    text = SUITE.format(seconds=seconds, name=name, log=str(root / "log"))
    (root / "bench").mkdir(exist_ok=True)
    (root / "bench" / "conftest.py").write_text(CONFTEST)
    (root / "bench" / "test_cases.py").write_text(text)
    for arguments in (
        ["init", "--quiet"], ["add", "bench"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-m", name],
        ["tag", name],
    ):  # fmt: skip
        revisions.git(root, *arguments)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    commit(root, "v1", {"a": 1.0, "b": 2.0, "gone": 1.0, "broken": 1.0})
    commit(root, "v2", {"a": 1.5, "b": 1.0, "come": 1.0, "broken": 0.0})
    return root


@pytest.fixture(scope="module")
def sides(repository: Path) -> tuple[Side, Side]:
    (repository / "log").unlink(missing_ok=True)  # of other tests, which may have come before
    return revisions.measure(("v1", "v2"), "layer", 2, "cpu", repository)


def worktrees(root: Path) -> int:
    return len(revisions.git(root, "worktree", "list").splitlines())


def test_new_over_old(sides: tuple[Side, Side]) -> None:
    one, other = revisions.changes(*sides)
    assert (one.case, one.slower) == ("layer: a", True)
    assert (other.case, other.slower) == ("layer: b", False)
    assert one.ratio == pytest.approx((1.5,) * 3, rel=1e-4)
    assert other.ratio == pytest.approx((0.5,) * 3, rel=1e-4)


def test_slower_is_so_in_every_turn_and_spread_is_of_turns() -> None:
    old = Side("", "", [{"a": 1.0}, {"a": 10.0}, {"a": 1.0}], {})
    new = Side("", "", [{"a": 1.2}, {"a": 10.2}, {"a": 1.6}], {})
    (change,) = revisions.changes(old, new)
    assert change.ratio == pytest.approx((1.2, 1.11, 1.4))
    assert not change.slower


def test_sides_take_turns_each_in_a_process_on_its_own_checkout(
    sides: tuple[Side, Side], repository: Path
) -> None:
    turns = [line.split(", ") for line in (repository / "log").read_text().splitlines()][:4]
    assert [name for name, _, _ in turns] == ["v1", "v2", "v1", "v2"]
    assert all(where == "True" for _, where, _ in turns)
    assert len({process for _, _, process in turns} | {str(os.getpid())}) == 5
    assert worktrees(repository) == 1


def test_what_one_revision_lacks_is_named(sides: tuple[Side, Side]) -> None:
    text = revisions.render(*sides)
    assert "| layer: a | 1.50 | 1.50-1.50 | slower |" in text
    assert "| layer: b | 0.50 | 0.50-0.50 |  |" in text
    lost = ["gone", "broken"]
    assert all(f"\n- v1 alone has layer: {case}" in text for case in lost)
    assert "\n- v2 alone has layer: come" in text
    assert text.count("wrong by a mile") == 1
    assert "\n- in v2: FAILED bench/test_cases.py::test_case[layer: broken]" in text


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, False),
        ({"a": 1.0}, {"a": 1.04}, False),
        ({"a": 1.0}, {"a": 1.06}, True),
        ({"a": 1.0, "b": 1.0}, {"a": 0.5}, True),
    ],
)
def test_slower_or_lost_is_wrong(
    old: dict[str, float], new: dict[str, float], expected: bool
) -> None:
    one, other = (Side("", "", [times] * 5, {}) for times in (old, new))
    assert revisions.went_wrong(one, other) == expected


def test_a_case_is_timed_in_every_turn_or_not_at_all() -> None:
    assert Side("", "", [{"a": 1.0, "b": 1.0}, {"a": 1.0}], {}).cases == ["a"]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def terminate(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("end", "error"), [(interrupt, KeyboardInterrupt), (terminate, SystemExit)]
)
def test_no_worktree_is_left_behind(
    end: Callable[..., None],
    error: type[BaseException],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    there: list[Path] = []

    def turn(side: Side, checkout: Path, *_: str) -> None:
        there.append(checkout)
        assert worktrees(repository) == 3
        end()

    monkeypatch.setattr(revisions, "take_turn", turn)
    with pytest.raises(error):
        revisions.measure(("v1", "v1"), "layer", 1, "cpu", repository)
    assert worktrees(repository) == 1
    assert len(there) == 1
    assert not there[0].exists()
    assert signal.getsignal(signal.SIGTERM) == handler


def test_no_worktree_is_left_where_the_second_cannot_be_made(repository: Path) -> None:
    good = revisions.commit_of(repository, "v1")
    with (
        pytest.raises(RevisionError, match="worktree add"),
        revisions.checkouts(repository, (good, "0" * 40)),
    ):
        pass
    assert worktrees(repository) == 1


def test_a_case_that_is_not_there(repository: Path) -> None:
    with pytest.raises(RevisionError, match="v2 has no case that 'gone' chooses"):
        revisions.measure(("v1", "v2"), "gone", 1, "cpu", repository)
    assert worktrees(repository) == 1


def test_no_benchmarks(repository: Path) -> None:
    with pytest.raises(RevisionError, match=r"did not run in v1:(.|\n)*Wrong expression"):
        revisions.measure(("v1", "v2"), "a b", 1, "cpu", repository)


@pytest.mark.parametrize(
    ("old", "new", "options", "reason"),
    [
        ("no-such-revision", "HEAD", [], "'no-such-revision' is neither a result file nor a revi"),
        ("--all", "HEAD", [], "'--all' is neither"),
        (str(ROOT / "README.md"), "HEAD", [], "README.md is a file, and HEAD is none"),
        ("HEAD", str(ROOT / "README.md"), [], "README.md is a file, and HEAD is none"),
        ("HEAD", "HEAD", ["--turns", "0"], "--turns has to be 1 at least, not 0"),
    ],
)
def test_command_says_what_it_cannot_compare(
    old: str, new: str, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["compare", *options, "--", old, new]) == 2
    assert reason in capsys.readouterr().err


def test_command(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def turn(side: Side, checkout: Path, cases: str, device: str) -> None:
        assert (cases, device) == ("ours", "cpu")
        slow = side.name == "v2"
        side.times.append({"a": 2.0 if slow else 1.0})

    monkeypatch.setattr(revisions, "take_turn", turn)
    monkeypatch.setattr(revisions.measure, "__defaults__", (repository,))
    monkeypatch.setattr(machine, "ROOT", repository)
    (repository / "log").touch()
    assert __main__.main(["compare", "v1", "v2"]) == 1
    printed = capsys.readouterr()
    assert "| a | 2.00 | 2.00-2.00 | slower |" in printed.out
    assert "turns of each: 5" in printed.out
    assert "what is not committed is not measured" in printed.err  # the log
    assert __main__.main(["compare", "v2", "v1"]) == 0
    assert "| a | 0.50 |" in capsys.readouterr().out


@pytest.mark.full
def test_this_revision_twice(capsys: pytest.CaptureFixture[str]) -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=False).returncode:
        pytest.skip("no repository of git")
    command = ["compare", "HEAD", "HEAD", "--turns", "1", "--cases"]
    __main__.main([*command, "ours and forward and growing and 3x8x8"])
    out = capsys.readouterr().out
    assert "| growing image: 3x8x8 K16, batch 4, float32: forward: ours | " in out
