"""``python -m bench.gpu [tests|times]``: the tests that need a GPU, and the times of every case.

Made for a GPU that is lent for ten minutes: each of the two parts ends within eight, compilation
included, the most telling comes first, and nothing that is known is lost when it is stopped.

- tests: the steps of :data:`STEPS`, by :mod:`bench.suite`: for each of them a file of results and
  one of what was printed, in ``tests/``.
- times: everything is compiled by many processes (``compile/``), then the tasks of
  :mod:`bench.run` and of :mod:`bench.measure.kernels` are measured one by one, by priority.

``run.json`` and ``run.md`` hold what is known after every case; ``python -m bench`` compares and
draws them as any other result. What was compiled is packed in ``compiled.tar.gz``: a later run that
is given it by ``--compiled`` need not compile it again.
"""

import argparse
import gc
import os
import shlex
import sys
import tarfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from bench import suite
from bench.suite import ROOT, Step

if TYPE_CHECKING:
    from bench.contest.cases import Extent
    from bench.run import Task

REPORT = "run.json"
COMPILED = "compiled.tar.gz"

#: the tests, the most telling first: layers of the paper's sizes against float64; all else that
#: only a GPU shows; the kernels on small shapes
OF_A_GPU = "tests/test_gpu.py"
STEPS = [
    Step("layers", [OF_A_GPU, "-k", "against_float64 or test_inversion"]),
    Step("gpu", [OF_A_GPU]),
    Step("kernels", [str(path) for path in sorted(ROOT.glob("tests/test_*_kernels.py"))]),
]

#: of the time for times, what compilation may take
TO_COMPILE = 0.45
#: seconds beyond the time, for the case under way; packing takes some more
GRACE = 30
#: seconds without a finished case after which the process is taken to hang
STALLED = 120
#: how often the process of the cases is started anew after a crash
STARTS = 8

Report = dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("part", nargs="?", choices=["tests", "times", "all"], default="all")
    parser.add_argument("--out", type=Path, help="folder of the results: $OUT, or out/gpu")
    parser.add_argument(
        "--minutes", type=float, default=7, help="for each part, which ends within 8 by default"
    )
    parser.add_argument("--tests", help="arguments of pytest: these tests instead of all")
    parser.add_argument("--jobs", type=int, help="processes that test or compile")
    parser.add_argument("--compiled", type=Path, help=f"of an earlier run: {COMPILED} in --out")
    parser.add_argument("--commit", help="what is measured; by default, git is asked")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, to try this script")
    # The processes that this one starts:
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", metavar="SHARE/SHARES", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = (options.out or Path(os.environ.get("OUT") or ROOT / "out" / "gpu")).resolve()
    options.compiled = options.compiled or options.out / COMPILED
    if options.jobs is None:
        options.jobs = 1 if options.dry_run else os.cpu_count() or 2
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

    if not (options.dry_run or torch.cuda.is_available()):
        print("bench.gpu needs a CUDA device; --dry-run tries it on a CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with compilers_caches(options.out / "compiled", options.compiled) as folder:
        for part in ("tests", "times") if options.part == "all" else (options.part,):
            start = time.time()
            options.until = start + 60 * options.minutes
            try:
                (run_tests if part == "tests" else run_times)(options)
            except Exception:  # whatever it is, the other part is wanted
                traceback.print_exc()
                failed = True
            pack(folder, options.out / COMPILED)
            report = begin(options)
            report["seconds"] = report.get("seconds", {}) | {part: round(time.time() - start, 1)}
            write(options.out, report)
    print((options.out / "run.md").read_text(encoding="utf-8"))
    return 1 if failed or went_wrong(options) else 0


def run_tests(options: argparse.Namespace) -> None:
    report = begin(options) | {"tests": {}}
    write(options.out, report)
    steps = STEPS if options.tests is None else [Step("chosen", shlex.split(options.tests))]
    report["tests"] = suite.run(steps, options.jobs, options.out / "tests", options.until)
    write(options.out, report)


def run_times(options: argparse.Namespace) -> None:
    write(options.out, begin(options) | {"results": {}})
    compile_all(options, time.time() + TO_COMPILE * 60 * options.minutes)
    supervise(options)


def begin(options: argparse.Namespace) -> Report:
    """A report of this machine, with what another part has found here."""
    from bench.measure import machine

    before = read(options.out) if (options.out / REPORT).exists() else {}
    about = {"extent": extent(options), "dry run": options.dry_run}
    about = machine.describe(the_device(options), options.commit) | about
    return {"tests": {}, "results": {}} | before | {"machine": about}


def went_wrong(options: argparse.Namespace) -> bool:
    from bench.show.result import errors

    report = read(options.out)
    steps = report["tests"].values()
    tests = any(step["wrong"] or "unfinished" in step or not step["collected"] for step in steps)
    return tests or bool(errors(report["results"]))


@contextmanager
def compilers_caches(folder: Path, archive: Path) -> Iterator[Path]:
    """A folder in which compilers keep what they make, for as long as the block lasts.

    Thousands of files are not brought back from every machine: they are unpacked from an archive,
    if it is there, and :func:`pack` makes one of them.
    """
    if archive.exists():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    folder.mkdir(exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    yield folder
    rmtree(folder)


def pack(folder: Path, archive: Path) -> None:
    """Replace the archive by one of all files in the folder."""
    new = archive.with_suffix(".new")
    with tarfile.open(new, "w:gz", compresslevel=1) as file:
        file.add(folder, "")
    new.replace(archive)


def own_command(options: argparse.Namespace, *more: str) -> list[str]:
    command = ["-m", "bench.gpu", "times", "--out", str(options.out)]
    command += ["--until", str(options.until)]
    return [*command, *(["--dry-run"] if options.dry_run else []), *more]


def compile_all(options: argparse.Namespace, until: float) -> None:
    """Compile what is to be timed, in many processes."""
    logs = options.out / "compile"
    logs.mkdir(exist_ok=True)
    shares = 0 if options.dry_run else options.jobs
    processes = []
    for share in range(shares):
        command = own_command(options, "--compile", f"{share}/{shares}")
        log = logs / f"{share:02}.txt"
        processes.append(suite.spawn(command, log, environment=suite.ONE_OF_MANY))
    suite.wait(processes, until)
    report = read(options.out)
    ended = sum(process.returncode == 0 for process in processes)
    report["compiling"] = {"processes": shares, "ended in time": ended}
    write(options.out, report)


def all_tasks(options: argparse.Namespace) -> "list[Task]":
    """Those of any run, and the kernels' own; the most important first."""
    from bench.measure import kernels
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
        process = suite.spawn(own_command(options, "--measure"), None)
        while process.poll() is None:
            time.sleep(0.2)
            now = time.time()
            if now > options.until + GRACE or now - max(started, report.stat().st_mtime) > STALLED:
                suite.end(process)
        if process.returncode == 0 or time.time() > options.until:
            return


def read(out: Path) -> Report:
    from bench.show import result

    return result.read(out / REPORT)


def write(out: Path, report: Report) -> None:
    """Write the report, and what it says."""
    from bench.show import result

    result.write(out / REPORT, report)
    (out / "run.md").write_text(render(report) + "\n", encoding="utf-8")


def render(report: Report) -> str:
    """The report as tables in Markdown: tests, what any run has, and the kernels' own."""
    from bench.show.report import render as render_run

    results = report["results"]
    lines = [render_run(report), "", "## Tests", ""]
    for step, found in report["tests"].items():
        outcomes = (f"{name} {value}" for name, value in found.items() if isinstance(value, int))
        lines.append(f"- {step}: {', '.join(outcomes)}")
        for kind in ("wrong", "passed alone"):
            lines += [f"  - {kind}: {name}" for name in found.get(kind, [])]
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
