"""Several processes train as one does, with copies of the weights or with shards."""

import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not say so

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import mintnet_triton as mint
from mintnet_triton.__main__ import main
from mintnet_triton.recipes.commands import load_run
from mintnet_triton.recipes.data import DataName
from mintnet_triton.recipes.runs import RunFolder
from tests.hub import write_parquet
from tests.processes import Process

SMALL = ["pairs=1", "steps=8", "batch_size=16", "validation=12", "average=0.9", "clip=1.0"]


def train(task: str, *changes: str) -> list[str]:
    command = ["train", task, "--preset", "digits", "--device", "cpu", "--checkpoint-every", "4"]
    hidden = "hidden=4" if task == "density" else "width=4"
    for change in (*SMALL, hidden, "squeezes=0", *changes):
        command += ["--set", change]
    return command


Start = Callable[..., list[Process]]


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a command in processes, as ``torchrun`` would, over gloo; none outlives the test."""
    started: list[Process] = []
    stores = []  # by which processes find each other

    def start_all(command: list[str], processes: int = 2) -> list[Process]:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stores.append(store)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        place |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ours = [
            Process(
                "mintnet_triton",
                command,
                place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                tmp_path_factory.mktemp("process"),
            )
            for rank in range(processes)
        ]
        started.extend(ours)
        return ours

    yield start_all
    for process in started:
        process.kill()


def finish(processes: list[Process], steps: int = 8) -> None:
    for rank, process in enumerate(processes):
        code, printed, errors = process.finish()
        assert code == 0, errors
        assert (f"trained for {steps} steps" in printed) is (rank == 0)


def assert_same_curves(folder: Path, other: Path) -> None:
    ours, theirs = RunFolder(folder).rows(), RunFolder(other).rows()
    assert len(ours) == len(theirs) == 4
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"seconds", "images_per_second"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-5)


def assert_same_weights(folder: Path, other: Path, tolerance: float = 1e-6) -> None:
    """Weights, averages, and all that the optimiser knows."""
    ours, theirs = RunFolder(folder).load(), RunFolder(other).load()
    for part in ("model", "average"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=1e-4, atol=tolerance)
    torch.testing.assert_close(
        ours["optimiser"]["state"], theirs["optimiser"]["state"], rtol=1e-3, atol=tolerance
    )


@pytest.mark.parametrize("way", ["copies", "shards"])
def test_the_curve_is_that_of_one_process(way: str, start: Start, tmp_path: Path) -> None:
    """Over gloo: same batches, same noise, gradients and metrics averaged, one writer."""
    one, two = tmp_path / "one", tmp_path / "two"
    command = train("density")
    shard = ["--shard"] if way == "shards" else []
    processes = start([*command, *shard, "--out", str(two)])
    assert main([*command, "--out", str(one)]) == 0
    finish(processes)
    assert_same_curves(two, one)
    assert_same_weights(two, one)
    # A run that was cut short goes on with another number of processes, and the other way.
    if way == "shards":
        for folder in (one, two):
            RunFolder(folder).checkpoints()[-1].unlink()
        processes = start([*command, "--shard", "--resume", "--out", str(one)])
        assert main([*command, "--resume", "--out", str(two)]) == 0
        finish(processes)
        assert_same_curves(two, one)
        assert_same_weights(two, one)


@pytest.mark.full
@pytest.mark.parametrize("way", ["copies", "shards"])
@pytest.mark.parametrize(
    "changes",
    [
        ["dequantiser=2"],
        ["level_spline=17", "position_bias=2", "mixture=2", "actnorm=true", "learned_base=true"],
    ],
    ids=["dequantiser", "stages"],
)
def test_what_is_beyond_the_paper_is_trained_as_in_one_process(
    changes: list[str], way: str, start: Start, tmp_path: Path
) -> None:
    """A dequantiser is called outside of what torch puts around a flow; stages start from data."""
    command = train("density", *changes)
    shard = ["--shard"] if way == "shards" else []
    processes = start([*command, *shard, "--out", str(tmp_path / "two")])
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    finish(processes)
    assert_same_curves(tmp_path / "two", tmp_path / "one")
    assert_same_weights(tmp_path / "two", tmp_path / "one")


@pytest.mark.full
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "test"), [("cifar10", "test"), ("imagenet32", "validation")])
def test_the_papers_flows_train_at_full_size(
    name: DataName, test: str, start: Start, tmp_path: Path
) -> None:
    """In one process, and in two with shards; the batch alone is smaller than the paper's."""
    data = tmp_path / "data"
    write_parquet(data, "image", (32, 32, 3), {"train": 8, test: 2})
    command = ["train", "density", "--preset", name, "--data-dir", str(data), "--device", "cpu"]
    command += ["--set", "batch_size=4", "--set", "steps=2", "--keep", "1"]
    processes = start([*command, "--shard", "--out", str(tmp_path / "two")])
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    finish(processes, steps=2)
    # The mean of a loss before the first update, and of one after it.
    (one,), (two,) = (RunFolder(tmp_path / way).rows() for way in ("one", "two"))
    assert two["bits_per_dim"] == pytest.approx(one["bits_per_dim"], rel=1e-5)
    model = load_run(tmp_path / "two").model
    assert model.arguments == mint.MintNet.from_preset(name).arguments


def test_statistics_of_a_sharded_classifier_are_those_of_copies(
    start: Start, tmp_path: Path
) -> None:
    """Each process normalises by its own part of a batch, and the first one's means are kept."""
    command = train("classify", 'schedule="milestones"', "crop=1")
    for name, shard in (("copies", []), ("shards", ["--shard"])):
        finish(start([*command, *shard, "--out", str(tmp_path / name)]))
    assert_same_curves(tmp_path / "shards", tmp_path / "copies")
    # Adam makes steps of what rounding leaves of the gradients that a later BatchNorm cancels.
    assert_same_weights(tmp_path / "shards", tmp_path / "copies", tolerance=1e-4)


@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    shard: list[str], start: Start, tmp_path: Path
) -> None:
    command = [*train("density", "steps=100000"), "--out", str(tmp_path)]
    first, second = start([*command, *shard])
    while len(RunFolder(tmp_path).checkpoints()) < 2:
        assert first.running()
        time.sleep(0.05)
    assert second.kill() == -signal.SIGKILL
    code, _, errors = first.finish()
    assert code == 1
    assert "Traceback" not in errors
    assert "process 0 lost another one at step" in errors
    left = RunFolder(tmp_path).checkpoints()[-1]
    assert f"The last good checkpoint is {left}: --resume goes on from there" in errors
    assert main([*command, "--resume", "--max-minutes", "1e-9"]) == 0
    assert RunFolder(tmp_path).load()["step"] == int(left.stem.removeprefix("checkpoint-")) + 1


@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_what_stops_the_first_process_stops_all(
    shard: list[str], start: Start, tmp_path: Path
) -> None:
    command = [*train("density"), *shard, "--out", str(tmp_path)]
    with RunFolder(tmp_path).locked():
        processes = start(command)
        for process in processes:
            code, _, errors = process.finish()
            assert code == 1
            assert errors.endswith(f"another process trains in {tmp_path}: wait, or stop it\n")
            assert "Traceback" not in errors
    for process in start([*command, "--set", "learning_rate=1e12"]):
        code, _, errors = process.finish()
        assert code == 1
        assert "training diverged at step" in errors or (shard and "lost another one" in errors)
        assert "Traceback" not in errors


def test_a_run_that_ran_out_of_time_says_how_it_goes_on(start: Start, tmp_path: Path) -> None:
    command = [*train("density"), "--shard", "--out", str(tmp_path), "--max-minutes", "1e-9"]
    _, printed, _ = start(command)[0].finish()
    again = shlex.join(["torchrun", "--nproc-per-node", "2", "-m", "mintnet_triton", *command])
    assert f"go on with it:  {again} --resume" in printed


@pytest.mark.parametrize(
    ("changes", "processes", "error"),
    [
        ([], 1, "sharded must be false where there is one process"),
        (
            ["validation=11"],
            2,
            "validation must divide by the 2 processes of a sharded run, got 11",
        ),
    ],
)
def test_what_cannot_be_sharded(
    changes: list[str], processes: int, error: str, start: Start, tmp_path: Path
) -> None:
    command = [*train("density", *changes), "--shard", "--out", str(tmp_path)]
    for process in start(command, processes):
        code, _, errors = process.finish()
        assert code == 1
        assert error in errors
