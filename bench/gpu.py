"""``python -m bench.gpu``: the tests that need a GPU, and the times of every case on one.

First the tests run and, beside them, everything is compiled; then the tasks of :mod:`bench.run` and
of :mod:`bench.kernels` are measured one by one, the most important first, until the time is
up. run.json and run.md hold what is known after every case, so that nothing is lost when the run is
stopped; tests.txt and compile.txt hold what the first part printed. ``python -m bench`` compares
and draws the result as any other.
"""

import argparse
import contextlib
import gc
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.cases import Extent
    from bench.run import Task

ROOT = Path(__file__).resolve().parents[1]
REPORT = "run.json"

#: of the time, for tests and compilation
FIRST_PART = 0.5
#: seconds beyond the time, for the case under way
GRACE = 30
#: seconds without a finished case after which the process is taken to hang
STALLED = 120
#: how often the process of the cases is started anew after a crash
STARTS = 8

Report = dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results: $OUT, or out/gpu")
    parser.add_argument(
        "--minutes", type=float, default=7.4, help="for everything, which ends within 8 by default"
    )
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--tests", default="-m gpu", help="arguments of pytest: which tests to run")
    parser.add_argument("--jobs", type=int, help="processes for tests, and as many to compile")
    parser.add_argument("--commit", help="what is measured; by default, git is asked")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, to try this script")
    # The processes that this one starts:
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", metavar="SHARE/SHARES", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = (options.out or Path(os.environ.get("OUT") or ROOT / "out" / "gpu")).resolve()
    if options.jobs is None:
        options.jobs = 1 if options.dry_run else max(1, (os.cpu_count() or 2) // 2)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all went well, 1 if a test or a case went wrong, 2 without a GPU."""
    options = parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    if options.measure:
        return measure(options)
    if options.compile:
        return compile_share(options)

    import torch

    from bench import machine
    from bench.run import errors

    if not (options.dry_run or torch.cuda.is_available()):
        print("bench.gpu needs a CUDA device; --dry-run tries it on a CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    options.until = start + 60 * options.minutes
    about = {"extent": extent(options), "dry run": options.dry_run}
    about = machine.describe(the_device(options), options.commit) | about
    report: Report = {"machine": about, "tests": {}, "results": {}}
    write(options.out, report)
    report["tests"] = test_and_compile(options, start + FIRST_PART * 60 * options.minutes)
    report["tests"]["seconds"] = time.time() - start
    write(options.out, report)
    supervise(options)
    report = read(options.out)
    report["seconds"] = time.time() - start
    write(options.out, report)
    print((options.out / "run.md").read_text(encoding="utf-8"))
    bad = [name for name in ("failed", "error", "unfinished") if report["tests"].get(name)]
    return 1 if bad or errors(report["results"]) else 0


def spawn(command: Sequence[str], output: Path | None, **environment: str) -> Any:
    """Start Python in a process group of its own."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output.open("w", encoding="utf-8")) if output else None
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
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


def own_command(options: argparse.Namespace, *more: str) -> list[str]:
    command = ["-m", "bench.gpu", "--out", str(options.out), "--until", str(options.until)]
    return [*command, *(["--dry-run"] if options.dry_run else []), *more]


def test_and_compile(options: argparse.Namespace, until: float) -> dict[str, Any]:
    """Run the tests, and compile what is to be timed, in many processes.

    Returns:
        Numbers of tests by outcome, and the names of those that did not pass.
    """
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
    names: list[str] = []
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        for share in range(0 if options.dry_run else options.jobs):
            command = own_command(options, "--compile", f"{share}/{options.jobs}")
            log = logs / f"compile-{share:02}"
            processes.append(spawn(command, log, TORCHINDUCTOR_COMPILE_THREADS="1"))
        if not options.skip_tests:
            listing = logs / "tests-listing"
            process = spawn([*pytest, "--collect-only", "-q", *shlex.split(options.tests)], listing)
            wait([process], until)
            names = re.findall(r"^\S+\.py::.+$", read_text(listing), re.MULTILINE)
        for share in range(options.jobs):
            if some := names[share :: options.jobs]:
                log = logs / f"tests-{share:02}"
                command = [*pytest, "-v", "--tb=short", *some]
                processes.append(spawn(command, log, TORCHINDUCTOR_COMPILE_THREADS="1"))
        wait(processes, until)
        for kind in ("tests", "compile"):
            texts = [read_text(log) for log in sorted(logs.glob(f"{kind}-*"))]
            if texts:
                (options.out / f"{kind}.txt").write_text("\n".join(texts), encoding="utf-8")
        if options.skip_tests:
            return {}
        return outcomes(names, "\n".join(read_text(log) for log in logs.glob("tests-[0-9]*")))


def wait(processes: Iterable[Any], until: float) -> None:
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, until - time.time()))
        if process.poll() is None:
            end(process)


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def outcomes(names: Sequence[str], text: str) -> dict[str, Any]:
    """Count outcomes in what ``pytest -v`` printed; tests without one are "unfinished"."""
    pattern = r"^(\S+\.py::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b"
    found = dict(re.findall(pattern, text, re.MULTILINE))
    missing = [name for name in names if name not in found]
    counts = Counter(outcome.lower() for outcome in found.values())
    bad = [name for name, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    return {
        "collected": len(names),
        **counts,
        **({"unfinished": len(missing)} if missing else {}),
        "not passed": [*bad, *missing],
    }


def all_tasks(options: argparse.Namespace) -> "list[Task]":
    """Those of any run, and the kernels' own; the most important first."""
    from bench import kernels
    from bench.run import Task, tasks

    device = the_device(options)
    found = tasks(device, extent(options)) + [
        Task(section, name, run, run, priority)
        for section, name, run, priority in kernels.all_parts(device, tiny=options.dry_run)
    ]
    return sorted(found, key=lambda task: task.priority)


def compile_share(options: argparse.Namespace) -> int:
    """Run once what is to be compiled, every so many-th case."""
    from bench.run import clock_for, measured

    share, shares = (int(number) for number in options.compile.split("/"))
    clock = clock_for(the_device(options), extent(options), once=True)
    to_compile = [
        task._replace(run=task.compile) for task in all_tasks(options) if task.compile is not None
    ]
    for task in to_compile[share::shares]:
        result = measured(task, clock)
        print(f"{task.section}: {task.name}: {result}", flush=True)
        if not usable(clock.device):
            return 3
    return 0


def measure(options: argparse.Namespace) -> int:
    """Measure what the report lacks; 3 if the GPU is of no use to this process any more."""
    from bench.run import clock_for, measured

    clock = clock_for(the_device(options), extent(options))
    report = read(options.out)
    for task in all_tasks(options):
        section = report["results"].setdefault(task.section, {})
        if task.name in section:
            continue
        if time.time() > options.until:
            section[task.name] = {"status": "skipped", "reason": "no time left"}
            continue
        reason = "the process ended or was stopped in this case"
        section[task.name] = {"status": "failed", "reason": reason}
        write(options.out, report)
        section[task.name] = measured(task, clock)
        write(options.out, report)
        if not usable(clock.device):
            return 3
    write(options.out, report)
    return 0


def extent(options: argparse.Namespace) -> "Extent":
    return "tiny" if options.dry_run else "full"


def the_device(options: argparse.Namespace) -> Any:
    import torch

    return torch.device("cpu") if options.dry_run else torch.device("cuda", 0)


def usable(device: Any) -> bool:
    """Give memory back; False after an error from which a process cannot recover."""
    import torch

    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return False
    return True


def supervise(options: argparse.Namespace) -> None:
    """Have the cases measured by a process that may crash or hang."""
    report = options.out / REPORT
    for _ in range(STARTS):
        started = time.time()
        process = spawn(own_command(options, "--measure"), None)
        while process.poll() is None:
            time.sleep(0.2)
            now = time.time()
            if now > options.until + GRACE or now - max(started, report.stat().st_mtime) > STALLED:
                end(process)
        if process.returncode == 0 or time.time() > options.until:
            return


def read(out: Path) -> Report:
    from bench import run

    return run.read(out / REPORT)


def write(out: Path, report: Report) -> None:
    """Write the report, and what it says."""
    from bench import run

    run.write(out / REPORT, report)
    (out / "run.md").write_text(render(report) + "\n", encoding="utf-8")


def render(report: Report) -> str:
    """The report as tables in Markdown: tests, what any run has, and the kernels' own."""
    from bench.report import render as render_run

    results = report["results"]
    tests = {name: value for name, value in report["tests"].items() if name != "not passed"}
    lines = [render_run(report), "", "## Tests", ""]
    lines.append(", ".join(f"{name} {value}" for name, value in tests.items()))
    lines += [f"- {name}" for name in report["tests"].get("not passed", [])]
    lines += render_rows(results.get("rows", {}))
    lines += render_kernels(results.get("kernels", {}))
    lines += render_tiles(results.get("tiles", {}))
    return "\n".join(lines)


def cell(value: Any, key: str = "ms") -> str:
    """A number of a result as a cell: empty if there is none."""
    if isinstance(value, dict):
        value = value.get(key)
    return "" if value is None else f"{value:.4g}"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(row) + " |" for row in rows]
    if not body:
        return []
    heads = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return ["", f"## {title}", "", *heads, *body]


def render_rows(cases: dict[str, Any]) -> list[str]:
    found = {name: case["ms"] for name, case in cases.items() if "ms" in case}
    names = list(next(iter(found.values()), {}))
    rows = [[case, *(cell(row, name) for name in names)] for case, row in found.items()]
    return table("Middle convolution on padded rows: ms", ["case", *names], rows)


def render_kernels(cases: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for part, title in (
        ("profile", "Training step by kernel: us"),
        ("operations", "Training step by operation: ms"),
    ):
        found = {name: case.get(part) for name, case in cases.items()}
        columns: list[str] = []
        for result in found.values():
            if isinstance(result, dict):
                columns += [
                    key
                    for key, value in result.items()
                    if key not in columns and not isinstance(value, dict)
                ]
        rows = [
            [name, *(cell(result, key) for key in columns)]
            for name, result in found.items()
            if isinstance(result, dict)
        ]
        lines += table(title, ["case", *columns], rows)
    return lines


def render_tiles(cases: dict[str, Any]) -> list[str]:
    groups: dict[str, list[tuple[float, list[str]]]] = {}
    for name, case in cases.items():
        group, label = name.rsplit(", ", 1)
        if "ms" in case:
            used = "x".join(str(number) for number in case["tile"])
            row = [group, label, used, cell(case), cell(case, "TFLOP/s exact")]
            groups.setdefault(group, []).append((case["ms"], row))
    rows = [row for group in groups.values() for _, row in sorted(group)]
    return table("Tiles of the middle kernel", ["case", "tile", "used", "ms", "TFLOP/s"], rows)


if __name__ == "__main__":
    sys.exit(main())
