"""Runs that are killed, cut short of room or told otherwise lose nothing, and say what is wrong."""

import random
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm")

import mintnet_triton as mint
from mintnet_triton.recipes.runs import RunError, RunFolder, write_atomically
from tests.processes import Process
from tests.tiny_run import tiny_run


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Sums are rounded otherwise with other numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(tree: Any, prefix: str = "") -> dict[str, Any]:
    """All leaves of a checkpoint by their place."""
    if isinstance(tree, dict):
        return {
            name: leaf
            for key, value in tree.items()
            for name, leaf in tensors(value, f"{prefix}/{key}").items()
        }
    return {prefix: tree}


def log(folder: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "images_per_second")
    rows = RunFolder(folder).rows()
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def assert_same(folder: Path, other: Path, which: str) -> None:
    ours, theirs = (tensors(RunFolder(path).load(which)) for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, Tensor) else None
        if same is None and name != "/seconds":
            same = value == theirs[name]
        assert same is not False, name


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("task", ["density", "classify"])
def test_a_killed_run_ends_with_the_same_bits(
    task: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """SIGKILL at random moments, then resuming: weights, moments, averages, log and best."""
    tiny_run(task, tmp_path / "whole")
    killed = tmp_path / "killed"
    moments = random.Random(task)
    kills, interrupted = 20 if pytestconfig.getoption("full") else 2, 0
    for number in range(kills):
        (tmp_path / str(number)).mkdir()
        process = Process("tests.tiny_run", [task, str(killed)], {}, tmp_path / str(number))
        before = len(RunFolder(killed).rows())
        while process.running() and len(RunFolder(killed).rows()) == before:
            time.sleep(0.005)  # until it trains
        if number > 0:  # the first one at once, so that no machine is too fast for it
            time.sleep(moments.uniform(0, 1.5 / kills))
        interrupted += process.kill() < 0
    assert interrupted > 0
    result = tiny_run(task, killed, resume=True)
    assert result.finished
    assert_same(killed, tmp_path / "whole", "last")
    assert_same(killed, tmp_path / "whole", "best")

    assert log(killed) == log(tmp_path / "whole")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    tiny_run("density", folder)
    return folder


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """A run that lost its last checkpoint: it is to be resumed."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    RunFolder(folder).checkpoints()[-1].unlink()
    return folder


@pytest.mark.usefixtures("_one_thread")
def test_what_comes_after_the_checkpoint_is_logged_once(stopped: Path, finished: Path) -> None:
    with (stopped / "log.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # cut off as it was written
    tiny_run("density", stopped, resume=True)
    assert [row["step"] for row in log(stopped)] == [row["step"] for row in log(finished)]


def test_another_recipe_is_refused(stopped: Path) -> None:
    description = RunFolder(stopped).description()
    assert description["recipe"]["learning_rate"] == 1e-2
    changed = {**description, "recipe": {**description["recipe"], "learning_rate": 0.1}}
    with pytest.raises(
        RunError, match=r"recipe\.learning_rate is 0\.01 in the run, 0\.1 is asked for\. Resume"
    ):
        RunFolder(stopped).check_same(changed)
    with pytest.raises(RunError, match=r"objective\.task is 'density' in the run, 'classify' is"):
        tiny_run("classify", stopped, resume=True)
    with pytest.raises(RunError, match=r"holds a run at step 38: give --resume"):
        tiny_run("density", stopped)


def test_two_processes_do_not_train_in_one_folder(stopped: Path) -> None:
    with (
        RunFolder(stopped).locked(),
        pytest.raises(RunError, match=f"another process trains in {stopped}: wait, or stop it"),
    ):
        tiny_run("density", stopped, resume=True)
    assert tiny_run("density", stopped, resume=True).finished


def test_a_folder_without_locks_is_said_to_be_one(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match=f"{stopped} cannot be locked: .*No locks available"):
        assert tiny_run("density", stopped, resume=True).finished


def test_a_damaged_checkpoint_is_named(stopped: Path) -> None:
    last, *_ = reversed(RunFolder(stopped).checkpoints())
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(mint.checkpoint.CheckpointError, match=rf"{last}: not a whole checkpoint"):
        tiny_run("density", stopped, resume=True)
    last.unlink()
    assert tiny_run("density", stopped, resume=True).finished
    with pytest.raises(RunError, match=r"has no checkpoint 'first\.pt', only \['checkpoint-"):
        RunFolder(stopped).load("first.pt")


def test_a_write_that_fails_leaves_the_previous_checkpoint(stopped: Path) -> None:
    left = RunFolder(stopped).checkpoints()[-1]
    content = left.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The log is below that, a checkpoint is above: as good as a full disk.
    size = (stopped / "log.jsonl").stat().st_size + 2000
    assert size < len(content)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(RunError, match=rf"cannot write .*{left} is whole: make room") as caught:
            tiny_run("density", stopped, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(caught.value.__cause__, OSError)
    assert left.read_bytes() == content
    assert not list(stopped.glob("*.partial"))
    assert tiny_run("density", stopped, resume=True).finished


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"before")
    synced: list[bool] = []

    def fsync(_: int) -> None:
        synced.append(path.read_bytes() == b"before")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"after")
    assert synced == [True]  # nothing is renamed before it is on the disk
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=f"cannot write to {tmp_path}/file/run"):
        tiny_run("density", tmp_path / "file" / "run")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RunError, match=r"has 0 MiB free, and 3 checkpoints and the best need"):
        tiny_run("density", tmp_path / "full")
    assert not RunFolder(tmp_path / "full").checkpoints()
    with pytest.raises(RunError, match=r"holds no run: there is no run\.json"):
        RunFolder(tmp_path / "none").description()
