import copy
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle

import mintnet_triton as mint
from bench import __main__, gpu, run, step, suite
from bench.contest import rivals
from bench.contest.cases import (
    BFLOAT16,
    CIFAR10,
    FLOAT32,
    MNIST,
    SWEEPS,
    TINY,
    Case,
    all_cases,
    make_layer,
)
from bench.measure import machine, memory, models, race, timing
from bench.measure.ceilings import flops_of
from bench.measure.timing import Clock
from bench.peers import FixedPointError
from bench.show import compare, plot, report
from bench.show.result import entries, errors, read, write
from mintnet_triton import MaskedConv2d, MintLayer
from mintnet_triton.kernels import backend

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Machine:
    """A clock without time, and work that takes as long as it says, on a machine that varies."""

    def __init__(self, slowness: Callable[[int], float] = lambda _: 1.0) -> None:
        self.time, self.calls = 0.0, list[str]()
        self.slowness = slowness

    def now(self) -> float:
        return self.time

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.time += seconds * self.slowness(len(self.calls))
            self.calls.append(name)

        return call


def test_spread_is_median_and_quartiles() -> None:
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_race_takes_every_rival_once_a_round_in_changing_order() -> None:
    fake = Machine()
    clock = Clock(CPU, seconds=1.0, rounds=(2, 8), now=fake.now)
    times = clock.race({"fast": fake.work("fast", 0.01), "slow": fake.work("slow", 0.04)})
    assert {name: len(values) for name, values in times.items()} == {"fast": 8, "slow": 8}
    assert times["fast"] == pytest.approx([10.0] * 8)
    assert times["slow"] == pytest.approx([40.0] * 8)
    in_rounds = fake.calls[4:]  # a call to warm up and one to estimate
    pairs = list(zip(in_rounds[::2], in_rounds[1::2], strict=True))
    assert set(pairs) == {("fast", "slow"), ("slow", "fast")}


def test_ratio_does_not_see_a_machine_that_slows_down() -> None:
    fake = Machine(slowness=lambda calls: 1.0 + calls / 10)
    clock = Clock(CPU, seconds=10.0, rounds=(2, 21), now=fake.now)
    times = clock.race({"a": fake.work("a", 0.01), "b": fake.work("b", 0.03)})
    assert timing.spread(times["b"]).high > 1.3 * timing.spread(times["b"]).low
    median, low, high = timing.ratio(times["b"], times["a"])
    assert median == pytest.approx(3.0, rel=0.1)
    assert high - low < 0.5


def test_work_too_short_for_the_clock_is_repeated() -> None:
    fake = Machine()
    clock = Clock(CPU, seconds=1.0, rounds=(3, 3), now=fake.now)
    (times,) = clock.race({"a": fake.work("a", 1e-4)}).values()
    assert times == pytest.approx([0.1] * 3)
    assert len(fake.calls) == 2 + 3 * round(timing.SHORTEST / 1e-4)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 5), (1.0, 10), (100.0, 30)])
def test_rounds_fill_the_seconds_within_bounds(seconds: float, rounds: int) -> None:
    fake = Machine()
    clock = Clock(CPU, seconds=seconds, rounds=(5, 30), now=fake.now)
    assert len(clock.race({"a": fake.work("a", 0.0999)})["a"]) == rounds


#: what :func:`.timing.peak_memory` tells of 64 MiB, where a heap has kept as much from before
PEAK = """
import torch
from bench.measure.timing import peak_memory

torch.ones(31 << 20, dtype=torch.uint8)  # once freed, makes glibc keep blocks up to this size
kept = [torch.ones(20 << 20, dtype=torch.uint8) for _ in range(16)]
last = torch.ones(20 << 20, dtype=torch.uint8)
del kept
print(peak_memory(lambda: torch.ones(64 << 20, dtype=torch.uint8).max(), torch.device("cpu")))
"""


def test_peak_of_memory() -> None:
    """Only of a process that returns freed memory: another finds room in what it has kept."""
    peak = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, env={**os.environ, **memory.ENVIRONMENT},
        stdout=subprocess.PIPE, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if peak == "None":
        pytest.skip("this system does not tell")
    assert 60 < float(peak) < 90


LAYER = Case("layer", "layer", FLOAT32, 2, ("forward", "training"), ("torch", "naive"), scale=TINY)


def wrong_forward(layer: MintLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y, log_det = MintLayer._forward(layer, x)
    return y, log_det * 1.001


class WrongLayer(MintLayer):
    _forward = wrong_forward


def spoil(module: torch.nn.Module) -> torch.nn.Module:
    module.__class__ = WrongLayer
    return module


def test_a_wrong_rival_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rivals.RIVALS, "naive", rivals.Rival(prepare=spoil, backend="torch"))
    result = race.measure(LAYER, Clock(CPU, rounds=(2, 2), seconds=0))
    for pass_ in LAYER.passes:
        found = result["passes"][pass_]["rivals"]
        assert found["naive"]["status"] == "wrong"
        assert "log_det" in found["naive"]["reason"]
        assert "ms" not in found["naive"]
        assert len(found["torch"]["ms"]) == 2
    assert len(errors({"layer": {"a": result}})) == 2


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def hooked(module: torch.nn.Module) -> torch.nn.Module:
        next(module.parameters()).register_hook(lambda gradient: gradient * 1.001)
        return module

    monkeypatch.setitem(rivals.RIVALS, "naive", rivals.Rival(prepare=hooked, backend="torch"))
    found = race.measure(LAYER, Clock(CPU, rounds=(2, 2), seconds=0))["passes"]
    assert "ms" in found["forward"]["rivals"]["naive"]
    assert found["training"]["rivals"]["naive"]["status"] == "wrong"


def test_a_wrong_inverse_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(target: rivals.Target) -> rivals.Inversion:
        right = rivals.one_by_one(target, cached=True)
        return right._replace(work=lambda: right.work() + 0.01)

    monkeypatch.setitem(rivals.INVERSIONS, "paper", off)
    case = replace(LAYER, passes=("inverse",), inversions=("paper", "one by one"))
    found = race.measure(case, Clock(CPU, rounds=(2, 2), seconds=0))["passes"]["inverse"]["rivals"]
    assert found["paper"]["status"] == "wrong"
    assert found["one by one"]["extrapolated"]


def test_what_is_not_to_be_had_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(module: torch.nn.Module) -> rivals.Map:
        raise rivals.UnavailableError("there is no compiler")

    monkeypatch.setitem(rivals.RIVALS, "naive", rivals.Rival(wrap=unavailable))
    result = race.measure(LAYER, Clock(CPU, rounds=(2, 2), seconds=0))
    status = result["passes"]["forward"]["rivals"]["naive"]
    assert status == {"status": "unavailable", "reason": "there is no compiler"}
    assert not errors({"layer": {"a": result}})


def test_models_of_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(mint.MintNet):
        def log_prob(self, x: torch.Tensor) -> torch.Tensor:
            return super().log_prob(x) + (0.1 if x.dtype == torch.float32 else 0)

    class Stuck(mint.MintNet):
        def sample(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            raise FixedPointError("f(x) = y is off")

    def build(kind: type[mint.MintNet]) -> Any:
        def construct(shape: tuple[int, int, int], parameters: int) -> mint.MintNet:
            flow = kind(shape[0], shape[1:], pairs=2, hidden=4, squeezes=1)
            assert sum(one.numel() for one in flow.parameters()) == parameters
            return flow

        return SimpleNamespace(build=construct, log_det="exact")

    def missing(shape: Any, parameters: int) -> mint.MintNet:
        raise ModuleNotFoundError("zuko is not installed: pip install zuko")

    nice = SimpleNamespace(build=missing, log_det="exact")
    peers = {
        "right": build(mint.MintNet),
        "wrong": build(Wrong),
        "stuck": build(Stuck),
        "nice": nice,
    }
    monkeypatch.setattr(models, "PEERS", peers)
    with mint.use_backend("torch"):
        found = models.measure_models(None, 2, Clock(CPU, rounds=(2, 2), seconds=0))["passes"]
    for pass_ in ("forward", "training", "inverse"):
        assert len(found[pass_]["rivals"]["right"]["ms"]) == 2
        assert found[pass_]["rivals"]["nice"]["status"] == "unavailable"
    assert found["forward"]["rivals"]["wrong"]["status"] == "wrong"
    assert len(found["training"]["rivals"]["stuck"]["ms"]) == 2
    assert found["inverse"]["rivals"]["stuck"]["status"] == "unavailable"
    assert report.tables({"machine": {}, "results": {"models": {"tiny": {"passes": found}}}})


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("order", ["channel", "pixel"])
def test_one_by_one_solves_what_it_says(order: str, triangle: str) -> None:
    layer = make_layer(TINY, order=order, triangle=triangle)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    z = copy.deepcopy(layer).double()(x)[0].detach()
    for cached in (False, True):
        inversion = rivals.one_by_one(rivals.Target(layer.double(), x, z), cached=cached)
        assert inversion.times * len(inversion.expected) == 2 * 3 * 3
        torch.testing.assert_close(inversion.work(), inversion.expected, rtol=0, atol=1e-4)
        layer.float()


def test_flops_are_what_the_mask_leaves() -> None:
    pytest.importorskip("triton")
    conv = MaskedConv2d(4, 4, 3, colours=2)
    left = 0
    weight = conv.masked_weight() != 0
    for row in range(3):
        for column in range(3):
            inside = (5 - abs(row - 1)) * (4 - abs(column - 1))
            left += int(weight[:, :, row, column].sum()) * inside
    assert flops_of(conv, (7, 4, 5, 4)) == 2 * 7 * left


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(power: float) -> None:
    sizes = [1, 2, 4, 8, 16]
    assert report.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)
    # What is constant for small sizes does not count.
    values = [max(3 * size**power, 3 * 4**power) for size in sizes]
    assert report.exponent(sizes, values) == pytest.approx(power)
    with pytest.raises(ValueError, match="three points, got 2"):
        report.exponent([1, 2], [1, 2])


def synthetic(ours: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """A result as a run writes it, with times around what is asked for; naive is 4 times slower."""
    random = np.random.default_rng(seed)

    def timed(median: float, **more: Any) -> dict[str, Any]:
        return {"ms": list(median * random.uniform(0.98, 1.02, 15)), "error": 1e-7, **more}

    def case(batch: int, scale: Any, **others: Any) -> dict[str, Any]:
        rivals = {"ours": timed(ours * batch, MiB=2.0 * batch, executed=3e9), **others}
        rivals["naive"] = timed(4.0 * batch, MiB=8.0 * batch)
        race_ = {"rivals": rivals, "flops": 2e9, "bytes": 1e6}
        return {
            "mode": "float32", "batch": batch, **scale._asdict(),
            "passes": {"forward": race_, "training": copy.deepcopy(race_)},
        }  # fmt: skip

    compiled = {"status": "unavailable", "reason": "there is no C++ compiler"}
    points = [{"iterations": 1, "seconds": 0.1, "errors": [0.1, None]}]
    row = {"worst residual": 1e-7, "not converged": 1, "samples": 16}
    growing = [replace_size(CIFAR10[0], size) for size in (8, 16, 32)]
    return {
        "machine": {"processor": "Some CPU", "cores": 2, "commit": "abc"},
        "results": {
            "ceilings": {"float32": {"matrix product": 5.0, "convolution": 4.0, "copy": 20.0}},
            "layer": {
                "one": case(8, CIFAR10[0], torch=timed(6.0), compiled=compiled),
                "two": case(8, CIFAR10[1], compiled={"status": "wrong", "reason": "y is off"}),
            },
            "growing batch": {f"b{n}": case(n, CIFAR10[0]) for n in (1, 2, 4, 8)},
            "growing image": {str(scale): case(scale.size**2, scale) for scale in growing},
            "solvers": {
                "net": {"solvers": {"paper": row | timed(100.0), "Auto()": row | timed(1.0)}}
            },
            "curves": {
                "one layer": {
                    "curves": {"α = 1": points, "Auto": [points[0] | {"iterations": None}]},
                    "paper seconds": 3.0,
                }
            },
        },
    }


def replace_size(scale: Any, size: int) -> Any:
    return scale._replace(size=size)


def test_tables_of_a_result() -> None:
    found = report.tables(synthetic())
    (table,) = (text for title, text in found.items() if title.startswith("Layer, forward"))
    first, second = table.splitlines()[2:]
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    header = [cell.strip() for cell in table.splitlines()[0].split("|")[1:-1]]
    row = dict(zip(header, cells, strict=True))
    assert row["naive"].startswith("4.0x (")
    assert row["torch"].startswith("0.75x (")
    assert row["compiled"] == "unavailable"
    # 2 GFLOP in 8 ms of 4 TFLOP/s
    assert row["share of the convolution ceiling"] == "6%"
    assert row["flops executed, of the exact"] == "1.50"
    assert "wrong" in second
    assert "against torch" in found["Where we lose"]
    assert "naive" not in found["Where we lose"]
    assert found["What went wrong"].count("y is off") == 2
    assert "no C++ compiler" in found["Not to be had here"]
    growth = found["Cost as work grows: time ~ (what grows) ^ exponent"]
    exponents = {line.split("|")[1].strip(): float(line.split("|")[-2]) for line in
                 growth.splitlines()[2:]}  # fmt: skip
    assert exponents == {"batch": pytest.approx(1, abs=0.05), "size": pytest.approx(2, abs=0.05)}
    assert "| 16 | 64 |" in found["Peak memory, MiB"]
    assert "| Auto() | 0.010 | 1e-07 | 1 of 16 |" in found["Solvers on a net"]


def test_what_the_processor_only_emulates_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "multiplies", lambda dtype: True)
    everything = run.tasks(CPU, "full")
    monkeypatch.setattr(backend, "multiplies", lambda dtype: False)
    results: dict[str, Any] = {}
    clock = Clock(CPU, seconds=0, rounds=(2, 2))
    for task in run.tasks(CPU, "full"):
        if isinstance(task.run, partial) and task.run.func is run.leave_out:
            results.setdefault(task.section, {})[task.name] = run.measured(task, clock)
    halves = [task for task in everything if "bfloat16" in task.name]
    assert sum(map(len, results.values())) == len(halves) > 6
    assert not errors(results)
    missing = report.tables({"machine": {}, "results": results})["Not to be had here"]
    assert "- ceilings: bfloat16: unavailable: left out, for this processor has no" in missing
    for task in halves:
        assert task.name in missing


def test_each_convolution_of_a_layer_is_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    for part, inputs, outputs in (("first", 2, 4), ("middle", 4, 4), ("last", 4, 2)):
        case = Case("convolution", "convolution", FLOAT32, 2, ("training",), ("ours", "dense"),
                    scale=TINY, part=part)  # type: ignore[arg-type]  # fmt: skip
        assert (part in case.name) == (part != "middle")
        problem = race.Problem(case, CPU)
        assert isinstance(problem.module, MaskedConv2d)
        assert problem.module.weight.shape == (outputs, inputs, 3, 3)
        for name in case.rivals:
            assert problem.contender("training", name).check()["error"] < 1e-5


def test_autocast_is_raced_with_float32() -> None:
    case = replace(LAYER, mode=BFLOAT16, rivals=("torch", "float32"))
    problem = race.Problem(case, CPU)
    for name, dtype in (("torch", torch.bfloat16), ("float32", torch.float32)):
        subject = race.Subject(problem, rivals.RIVALS[name])
        subject.map = lambda x: (F.conv2d(x, x, padding=1), x)
        assert subject.run(torch.ones(2, 2, 3, 3))["y"].dtype == dtype


def test_the_faster_dense_convolution_counts() -> None:
    found = {"ours": {"ms": [1.0]}, "dense": {"ms": [3.0]}, "dense, channels last": {"ms": [2.0]}}
    assert report.speed(found, "dense") == (2.0, 2.0, 2.0)
    found["dense, channels last"] = {"ms": [5.0]}
    assert report.speed(found, "dense") == (3.0, 3.0, 3.0)


def test_times_of_a_cpu_are_not_told_but_those_of_a_gpu() -> None:
    result = synthetic()
    assert "ours, ms" not in report.render(result)
    result["machine"]["gpu"] = "NVIDIA H100"
    assert "ours, ms" in report.render(result)


def test_pictures_of_a_result(tmp_path: Path) -> None:
    figures = plot.figures(synthetic())
    assert figures.keys() == {"speed", "roofline", "scaling", "memory", "sampling"}
    for figure in figures.values():
        for axis in figure.axes:
            assert axis.lines or axis.collections or axis.patches
        assert figure.axes[-1].get_xlabel()
    assert "pixels" in figures["scaling"].axes[-1].get_xlabel()
    bars = figures["speed"].axes[0].patches
    lengths = [bar.get_x() + bar.get_width() for bar in bars if isinstance(bar, Rectangle)]
    assert max(lengths) == pytest.approx(4.0, rel=0.05)
    assert all(path.stat().st_size > 1000 for path in plot.save(synthetic(), tmp_path))
    assert not plot.figures({"results": {}})


def test_compare_finds_a_slow_down() -> None:
    found = compare.compare(synthetic(), synthetic(1.2, seed=1))
    assert all(change.slower for change in found.changes)
    assert found.changes[0].ratio.median == pytest.approx(1.2, abs=0.05)
    assert not any(change.slower for change in compare.compare(synthetic(), synthetic(seed=1))[1])


def test_compare_knows_a_slow_machine_from_slow_code() -> None:
    slow = synthetic(seed=1)
    for entry in entries(slow["results"]):
        if "ms" in entry.found:
            entry.found["ms"] = [1.5 * time for time in entry.found["ms"]]
    found = compare.compare(synthetic(), slow)
    assert found.drift == pytest.approx(1.5, abs=0.05)
    assert not any(change.slower for change in found.changes)


def test_compare_tells_what_is_wrong_now(tmp_path: Path) -> None:
    wrong = synthetic(seed=1)
    rivals_ = wrong["results"]["layer"]["one"]["passes"]["forward"]["rivals"]
    rivals_["ours"] = {"status": "wrong", "reason": "y is off"}
    assert compare.compare(synthetic(), wrong).lost == ["layer: one: forward: ours: y is off"]


def test_command_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = synthetic()
    other["machine"]["cores"] = 4
    paths = {}
    for name, result in (
        ("old", synthetic()), ("same", synthetic(seed=1)), ("slow", synthetic(1.2)),
        ("other", other),
    ):  # fmt: skip
        paths[name] = tmp_path / f"{name}.json"
        write(paths[name], result)
    expected = {"same": 0, "slow": 1, "other": 2}
    codes = {
        name: __main__.main(["compare", str(paths["old"]), str(paths[name])]) for name in expected
    }
    assert codes == expected
    printed = capsys.readouterr()
    assert "| slower |" in printed.out
    assert "different machines" in printed.err
    assert __main__.main(["report", str(paths["old"])]) == 0
    assert __main__.main(["plot", str(paths["old"])]) == 0


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({"processor": "AMD EPYC Zen4", "cores": 2}, "amd-epyc-zen4-2-cores"),
        ({"processor": "Intel(R) Xeon(R) 8488C", "cores": 4}, "intel-xeon-8488c-4-cores"),
        ({"processor": "x", "cores": 16, "gpu": "NVIDIA H100 80GB HBM3"}, "nvidia-h100-80gb-hbm3"),
    ],
)
def test_name_of_a_machine(about: dict[str, Any], name: str) -> None:
    assert machine.folder(about) == name


def test_machine_is_described() -> None:
    found = machine.describe(CPU)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["processor"]


def plain_environment() -> dict[str, str]:
    """A user's: no interpreter, no parallel tests; and no C++ compiler, which takes its time."""
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return {**own, "TRITON_INTERPRET": "0", "CXX": "no-such-compiler", "PATH": ""}


def test_run_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "run", "--extent", "tiny", "--threads", "1", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env=plain_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = read(tmp_path / "run.json")
    assert result["machine"]["threads"] == 1
    assert result["results"].keys() == {
        "ceilings", "convolution", "layer", "model", "growing batch",
    }  # fmt: skip
    for entry in entries(result["results"]):
        unavailable = entry.rival in ("compiled", "ours, graph")
        assert ("status" if unavailable else "ms") in entry.found, entry
        if entry.section == "growing batch":
            assert "MiB" in entry.found
    assert str(tmp_path) in done.stdout.splitlines()[-1]
    assert (tmp_path / "run.md").read_text().splitlines()[-1] in done.stdout
    assert (tmp_path / "scaling.png").exists()


#: pytest's own way, as docs/benchmarks.md has it: twice, for PyTorch takes its time to be imported
PYTEST_TWICE = """
import sys
import pytest

command = ["bench", "-q", "-p", "no:randomly", "-k", "ours and forward and growing and 3x8x8"]
for options in (["--benchmark-json=old.json"], sys.argv[1:]):
    code = pytest.main([*command, *options])
    if code:
        sys.exit(code)
"""


def by_pytest(folder: Path, *options: str) -> str:
    """What pytest prints when it measures once, and once more with some options."""
    command = [sys.executable, "-c", PYTEST_TWICE.replace("old.json", str(folder / "old.json"))]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env={**plain_environment(), "COLUMNS": "200"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pytest_compares_and_draws(tmp_path: Path) -> None:
    # Looked for, not imported: it would change how all that follows is imported.
    if importlib.util.find_spec("pygal") is None:
        pytest.skip("pytest-benchmark[histogram] draws with pygal")
    printed = by_pytest(
        tmp_path, f"--benchmark-compare={tmp_path / 'old.json'}",
        f"--benchmark-histogram={tmp_path / 'drawn'}",
    )  # fmt: skip
    name = "growing image: 3x8x8 K16, batch 4, float32: forward: ours"
    (found,) = read(tmp_path / "old.json")["benchmarks"]
    assert found["param"] == name
    assert len(found["stats"]["data"]) == found["stats"]["rounds"] == 9
    assert found["extra_info"]["rival"] == "ours"
    assert 0 < found["extra_info"]["error"] < 1e-5
    assert f"test_case[{name}] (NOW)" in printed
    assert re.search(rf"^test_case\[{re.escape(name)}\] \(.*old\)", printed, re.MULTILINE)
    (drawing,) = tmp_path.glob("drawn-*.svg")
    assert name in drawing.read_text(encoding="utf-8")


def test_run_of_some_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--extent", "tiny", "--sections", "ceilings", "--out", str(tmp_path)]
    assert __main__.main(command) == 0
    assert read(tmp_path / "run.json")["results"].keys() == {"ceilings"}
    assert "matrix product" in capsys.readouterr().out


def test_dry_run_on_a_cpu_measures_every_kind_of_case(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "times", "--dry-run", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report_ = json.loads((tmp_path / "run.json").read_text())
    assert report_["machine"]["dry run"]
    assert report_["results"].keys() == {
        "ceilings", "convolution", "layer", "model", "growing batch", "kernels", "rows", "tiles",
    }  # fmt: skip
    assert not errors(report_["results"])
    tables = (tmp_path / "run.md").read_text()
    for title in ("Layer, forward", "Layer, inversion", "Middle convolution", "Tests", "Tiles"):
        assert f"## {title}" in tables


def test_a_part_of_a_run_ends_within_eight_minutes() -> None:
    assert 60 * gpu.parse([]).minutes + gpu.GRACE <= 8 * 60 - 20  # to start, and to pack


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_full_table_has_every_scale_and_names_every_case_once(device: str) -> None:
    cases = all_cases(torch.device(device), "full")
    for section in ("convolution", "layer"):
        scales = {case.scale for case in cases if case.section == section}
        assert scales >= {*CIFAR10, *MNIST}
    assert {case.preset for case in cases if case.subject == "model"} == {"mnist", "cifar10"}
    assert {case.section for case in cases} >= SWEEPS.keys()
    names = [(case.section, case.name, pass_) for case in cases for pass_ in case.passes]
    assert len(names) == len(set(names))
    known: dict[str, Collection[str]] = {
        "forward": rivals.RIVALS,
        "training": rivals.RIVALS,
        "inverse": rivals.INVERSIONS,
    }
    for case in cases:
        for pass_ in case.passes:
            assert set(case.rivals_of(pass_)) <= set(known[pass_])


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
tests/test_a.py::test_5 PASSED                              [ 80%]
tests/test_a.py::test_5 ERROR                               [ 80%]
FAILED tests/test_a.py::test_2 - AssertionError
tests/test_a.py::test_4"""
    names = [f"tests/test_a.py::test_{name}" for name in ("1[3x32x32 K85]", "2", "3", "4", "5")]
    found = suite.outcomes_in(printed)
    assert suite.count(names, found, {names[4]: "PASSED", names[1]: "FAILED"}) == {
        "collected": 5,
        "passed": 2,
        "failed": 1,
        "skipped": 1,
        "unfinished": 1,
        "wrong": [names[1]],
        "passed alone": [names[4]],
    }


TROUBLE = """
import os
import time

spoiled = False

def test_good(): pass
def test_bad(): assert False
def test_hang():
    open("hanging", "w").close()
    for number in os.listdir("/proc/self/fd"):
        output = os.path.realpath(f"/proc/self/fd/{number}")
        if "share-" in output:
            os.utime(output, (0, 0))  # as if it had hung for long
    time.sleep(1000)
def test_spoils():
    global spoiled
    spoiled = True
def test_spoiled(): assert not spoiled
def test_crash(): os._exit(3)
def test_after(): pass
"""


def test_a_suite_goes_on_whatever_its_tests_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process at a time, of which each takes all the tests of a step."""
    (tmp_path / "test_trouble.py").write_text(TROUBLE)
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    monkeypatch.setattr(suite, "TURNS", 1)
    steps = [
        suite.Step("hangs", ["test_trouble.py", "-k", "hang"]),
        suite.Step("broken", ["test_broken.py"]),
        suite.Step("all", ["test_trouble.py"]),
    ]
    out = tmp_path / "results"
    results = suite.run(steps, 1, out, math.inf, tmp_path)
    for name, found in results.items():
        written = json.loads((out / f"{name}.json").read_text())
        assert written.pop("seconds") <= found.pop("seconds")
        assert written == found
    test = "test_trouble.py::test_"
    assert results == {
        "hangs": {"collected": 1, "hung": 1, "wrong": [f"{test}hang"]},
        "broken": {"collected": 0, "wrong": []},
        "all": {
            "collected": 6, "passed": 4, "failed": 1, "crashed": 1,
            "wrong": [f"{test}bad", f"{test}crash"],
            "passed alone": [f"{test}spoiled", f"{test}after"],
        },
    }  # fmt: skip
    assert "no_such_module" in (out / "broken.txt").read_text()
    assert "assert False" in (out / "all.txt").read_text()


def test_a_suite_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_trouble.py").write_text(TROUBLE)

    def now() -> float:
        """The time is up when a test hangs."""
        return 2e6 if (tmp_path / "hanging").exists() else 0.0

    monkeypatch.setattr(suite, "TURNS", 1)
    monkeypatch.setattr(suite, "time", SimpleNamespace(**(vars(time) | {"time": now})))
    steps = [suite.Step("all", ["test_trouble.py", "-k", "good or hang or spoil"])]
    found = suite.run(steps, 1, tmp_path, 1e6, tmp_path)["all"]
    assert (found["collected"], found["passed"], found["unfinished"]) == (4, 1, 3)
    assert not found["wrong"]


def test_what_is_compiled_is_taken_up_by_a_later_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    archive = tmp_path / gpu.COMPILED
    for kernel in ("first", "second"):
        with gpu.compilers_caches(tmp_path / "compiled", archive) as folder:
            made = Path(os.environ["TRITON_CACHE_DIR"])
            assert sorted(made.rglob("*.cubin")) == (
                [made / "first.cubin"] if kernel == "second" else []
            )
            made.mkdir(exist_ok=True)
            (made / f"{kernel}.cubin").write_text(kernel)
            gpu.pack(folder, archive)
        assert not folder.exists()
    with tarfile.open(archive) as file:
        names = {name.removeprefix("./") for name in file.getnames()}
    assert {"triton/first.cubin", "triton/second.cubin"} <= names


def test_tests_are_part_of_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    found = {"collected": 2, "passed": 2, "wrong": [], "seconds": 1.5}
    given = []

    def run_suite(steps: list[suite.Step], jobs: int, out: Path, until: float) -> Any:
        given.append((steps, jobs, out))
        return {"some": found}

    monkeypatch.setattr(suite, "run", run_suite)
    command = ["tests", "--dry-run", "--tests", "a.py -k 'b or c'", "--out", str(tmp_path)]
    assert gpu.main(command) == 0
    assert given == [([suite.Step("chosen", ["a.py", "-k", "b or c"])], 1, tmp_path / "tests")]
    report_ = read(tmp_path / "run.json")
    assert report_["tests"] == {"some": found}
    assert report_["seconds"].keys() == {"tests"}
    assert "- some: collected 2, passed 2" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.md", gpu.COMPILED}
    options = gpu.parse(command)
    assert not gpu.went_wrong(options)
    for bad in (
        {"collected": 0, "wrong": []},
        {"collected": 2, "passed": 1, "failed": 1, "wrong": ["a"]},
        {"collected": 2, "passed": 1, "unfinished": 1, "wrong": []},
    ):
        gpu.write(options.out, report_ | {"tests": {"chosen": bad}})
        assert gpu.went_wrong(options)


def test_what_went_wrong_is_listed() -> None:
    oom = {"status": "out of memory", "reason": ""}
    results = {
        "layer": {
            "a": {"passes": {"forward": {"rivals": {"naive": oom, "ours": {"ms": [1.0]}}}}},
            "b": {"passes": {"forward": {"rivals": {"ours": {"status": "wrong", "reason": "y"}}}}},
            "c": {"status": "skipped", "reason": "no time left"},
            "d": {"status": "failed", "reason": "it hangs"},
        }
    }
    assert errors(results) == [
        "layer: b: forward: ours: wrong: y",
        "layer: d: failed: it hangs",
    ]


def test_step_of_a_whole_model(tmp_path: Path) -> None:
    result = step.run(None, 2, 1, tmp_path)
    assert read(tmp_path / "step.json") == result
    assert all(len(found["seconds"]) == 1 for found in result["rivals"].values())
    assert result["rivals"]["ours"]["error"] < 1e-4
    made_up = {
        "naive": {"seconds": [8.0, 9.0], "MiB": [100.0, 100.0]},
        "ours": {"seconds": [1.0, 1.0], "MiB": [10.0, 30.0]},
    }
    assert "| ours | 8.5x | 20 | 5.0x less |" in step.table({"rivals": made_up})
