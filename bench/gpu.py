"""``python -m bench.gpu``: the tests that need a GPU, and the times of every case on one.

First the tests run and, beside them, everything is compiled; then the cases of :mod:`bench.cases`
are timed one by one, the most important first, until the time is up. gpu.json and gpu.md hold what
is known after every case, so that nothing is lost when the run is stopped; tests.txt and
compile.txt hold what the first part printed.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORT = "gpu.json"

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

    if not (options.dry_run or torch.cuda.is_available()):
        print("bench.gpu needs a CUDA device; --dry-run tries it on a CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    options.until = start + 60 * options.minutes
    report: Report = {"machine": machine(options), "tests": {}, "results": {}}
    write(options.out, report)
    report["tests"] = test_and_compile(options, start + FIRST_PART * 60 * options.minutes)
    report["tests"]["seconds"] = time.time() - start
    write(options.out, report)
    supervise(options)
    report = read(options.out)
    report["seconds"] = time.time() - start
    write(options.out, report)
    print((options.out / "gpu.md").read_text(encoding="utf-8"))
    bad = [name for name in ("failed", "error", "unfinished") if report["tests"].get(name)]
    return 1 if bad or any(errors(report["results"])) else 0


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch
    import triton

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": options.commit or said_by("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cores": os.cpu_count(),
        "dry run": options.dry_run,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found["driver"] = said_by(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return found


def said_by(*command: str) -> str | None:
    """What a program prints, or None if there is no such program or it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()
    return None


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


def compile_share(options: argparse.Namespace) -> int:
    """Run once what is to be compiled, every so many-th case."""
    from bench.cases import Clock, all_cases, attempt

    share, shares = (int(number) for number in options.compile.split("/"))
    device = the_device(options)
    clock = Clock(device, once=True)
    cases = [case for case in all_cases(device, tiny=options.dry_run) if case.compiles]
    for case in cases[share::shares]:
        start = time.time()
        result = attempt(partial(case.run, clock))
        print(f"{case.section}: {case.name}: {time.time() - start:.1f} s {result}", flush=True)
        if not usable(device):
            return 3
    return 0


def measure(options: argparse.Namespace) -> int:
    """Measure what the report lacks; 3 if the GPU is of no use to this process any more."""
    from bench.cases import Clock, all_cases, attempt

    device = the_device(options)
    clock = Clock(device)
    report = read(options.out)
    for case in all_cases(device, tiny=options.dry_run):
        section = report["results"].setdefault(case.section, {})
        if case.name in section:
            continue
        if time.time() > options.until:
            section[case.name] = {"skipped": "no time left"}
            continue
        section[case.name] = {"error": "the process ended or was stopped in this case"}
        write(options.out, report)
        start = time.time()
        result = attempt(partial(case.run, clock))
        section[case.name] = result if isinstance(result, dict) else {"error": result}
        section[case.name]["seconds"] = time.time() - start
        write(options.out, report)
        if not usable(device):
            return 3
    write(options.out, report)
    return 0


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
    report: Report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    return report


def write(out: Path, report: Report) -> None:
    """Replace both files as a whole, so that neither is ever half written."""
    for name, text in ((REPORT, json.dumps(report, indent=1)), ("gpu.md", render(report))):
        part = out / f"{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(out / name)


def errors(results: dict[str, Any]) -> list[str]:
    """The texts of what went wrong, with the names of the cases; lack of memory is no fault."""
    found = []
    for section, cases in results.items():
        for name, case in cases.items():
            for part, value in case.items():
                if isinstance(value, str) and part != "skipped" and value != "out of memory":
                    found.append(f"{section}: {name}: {part}: {value}")
    return found


def render(report: Report) -> str:
    """The report as tables in Markdown."""
    results = report["results"]
    lines = ["# On a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    tests = {name: value for name, value in report["tests"].items() if name != "not passed"}
    lines += ["", "## Tests", "", ", ".join(f"{name} {value}" for name, value in tests.items())]
    lines += [f"- {name}" for name in report["tests"].get("not passed", [])]
    lines += render_conv(results.get("conv2", {}))
    lines += render_layers(results.get("layer", {}), results.get("graph", {}))
    lines += render_kernels(results.get("kernels", {}))
    lines += render_sampling(results.get("sampling", {}))
    lines += render_tiles(results.get("tiles", {}))
    skipped = [
        f"- {section}: {name}"
        for section, cases in results.items()
        for name, case in cases.items()
        if "skipped" in case
    ]
    lines += ["", "## Errors", "", *(f"- {text}" for text in errors(results))]
    lines += ["", "## Not measured, for lack of time", "", *skipped]
    return "\n".join(lines)


def cell(value: Any, key: str = "ms") -> str:
    """A number of a result as a cell: empty if there is none, short if it is an error."""
    if isinstance(value, dict):
        value = value.get(key)
    if isinstance(value, str):
        return "no memory" if value == "out of memory" else "error"
    return "" if value is None else f"{value:.4g}"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(row) + " |" for row in rows]
    if not body:
        return []
    heads = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return ["", f"## {title}", "", *heads, *body]


def render_conv(cases: dict[str, Any]) -> list[str]:
    rivals = ("ours", "op", "cudnn", "cudnn padded")
    rows = []
    for name, case in cases.items():
        found = {rival: case.get(rival) for rival in rivals}
        times = {rival: result["ms"] for rival, result in found.items() if isinstance(result, dict)}
        dense = [times[rival] for rival in rivals[2:] if rival in times]
        ratio = f"{min(dense) / times['ours']:.2f}x" if dense and "ours" in times else ""
        rates = [cell(found["ours"], f"TFLOP/s {count}") for count in ("exact", "dense")]
        rows.append([name, *(cell(found[rival]) for rival in rivals), ratio, *rates])
    header = ("case", "ours", "our op", "cuDNN", "cuDNN, padded", "speed", "exact", "dense")
    return table("Middle convolution: ms, speed against cuDNN, our TFLOP/s", header, rows)


def render_layers(layers: dict[str, Any], graphs: dict[str, Any]) -> list[str]:
    rows: dict[str, dict[str, Any]] = {}
    columns: list[str] = []
    for cases, suffix in ((layers, ""), (graphs, " in a graph")):
        for name, case in cases.items():
            key, rival = name.rsplit(", ", 1)
            rows.setdefault(key, {})[rival + suffix] = case
            if rival + suffix not in columns:
                columns.append(rival + suffix)
    lines = []
    for title, work, key in (
        ("Forward with log-det: ms", "forward", "ms"),
        ("Training step: ms", "training", "ms"),
        ("Training step: peak memory, MiB", "training", "MiB"),
        ("Inversion, 20 iterations: ms", "inversion", "ms"),
    ):
        body = [
            [name, *(cell(row.get(column, {}).get(work), key) for column in columns)]
            for name, row in rows.items()
        ]
        lines += table(title, ["case", *columns], [row for row in body if any(row[1:])])
    return lines


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


def render_sampling(cases: dict[str, Any]) -> list[str]:
    keys = ("ms", "ms of the paper's", "residual", "not converged", "by wavefront")
    rows = [[name, *(cell(case, key) for key in keys)] for name, case in cases.items()]
    return table("Sampling", ["case", *keys], rows)


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
