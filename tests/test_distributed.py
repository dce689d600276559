"""Two processes train as one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from mintnet_triton.__main__ import main
from mintnet_triton.recipes.runs import RunFolder

ROOT = Path(__file__).parent.parent
CHANGES = ("pairs=1", "hidden=4", "squeezes=0", "steps=8", "batch_size=16", "validation=11")
TRAIN = ["train", "density", "--preset", "digits", "--device", "cpu", "--checkpoint-every", "4"]
TRAIN += [word for change in CHANGES for word in ("--set", change)]


def test_the_curve_is_that_of_one_process(tmp_path: Path) -> None:
    """Over gloo: same batches, same noise, gradients and metrics averaged, one writer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "mintnet_triton", *TRAIN, "--out", str(tmp_path / "two")]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    assert main([*TRAIN, "--out", str(tmp_path / "one")]) == 0
    for process, speaks in zip(processes, (True, False), strict=True):
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert ("trained for 8 steps" in printed) is speaks
    one, two = (RunFolder(tmp_path / name).rows() for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", "images_per_second"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
