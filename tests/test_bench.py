import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.cases import CIFAR10, MNIST, all_cases
from bench.ratios import ratios

ROOT = Path(__file__).parents[1]


def test_ratio_is_naive_over_ours() -> None:
    result = {
        "benchmarks": [
            {"group": "a", "extra_info": {"rival": "naive"}, "stats": {"median": 6.0}},
            {"group": "a", "extra_info": {"rival": "mintnet_triton"}, "stats": {"median": 1.5}},
        ]
    }
    assert ratios(result) == {"a": pytest.approx(4.0)}


def test_dry_run_on_a_cpu_measures_every_kind_of_case(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--skip-tests", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["machine"]["dry run"]
    assert report["results"].keys() == {
        "conv2", "kernels", "layer", "sampling", "graph", "tiles",
    }  # fmt: skip
    assert not gpu.errors(report["results"])
    rivals = {name.rsplit(", ", 1)[1] for name in report["results"]["layer"]}
    assert rivals == {"ours", "torch", "naive", "compiled"}
    tables = (tmp_path / "gpu.md").read_text()
    for title in ("Middle convolution", "Forward", "Training", "Inversion", "Sampling", "Tiles"):
        assert f"## {title}" in tables


def test_a_run_ends_within_eight_minutes() -> None:
    assert 60 * gpu.parse([]).minutes + gpu.GRACE <= 8 * 60 - 5  # some seconds to start and to end


def test_the_middle_convolution_is_timed_at_every_scale() -> None:
    cases = all_cases(torch.device("cpu"))
    names = {case.name.rsplit(", ", 1)[0] for case in cases if case.section == "conv2"}
    scales = [*CIFAR10, *MNIST]
    assert names == {f"{scale}, {batch}" for scale in scales for batch in (32, 128)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_outcomes_of_tests_are_counted() -> None:
    printed = """
tests/test_a.py::test_1[3x32x32 K85] PASSED                 [ 25%]
tests/test_a.py::test_2 FAILED                              [ 50%]
tests/test_a.py::test_3 SKIPPED (needs two devices)         [ 75%]
FAILED tests/test_a.py::test_2 - AssertionError
tests/test_a.py::test_4"""
    names = [f"tests/test_a.py::test_{name}" for name in ("1[3x32x32 K85]", "2", "3", "4")]
    assert gpu.outcomes(names, printed) == {
        "collected": 4,
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "unfinished": 1,
        "not passed": [names[1], names[3]],
    }


def test_what_went_wrong_is_listed() -> None:
    results = {
        "layer": {
            "a": {"forward": {"ms": 1.0}, "training": "out of memory"},
            "b": {"forward": "WrongResultError: y", "seconds": 1.0},
            "c": {"skipped": "no time left"},
        }
    }
    assert gpu.errors(results) == ["layer: b: forward: WrongResultError: y"]
