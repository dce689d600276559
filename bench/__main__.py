"""``python -m bench run|report|plot|compare``: how fast, against whom, and how near the limit."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import revisions
from bench.contest.cases import EXTENTS
from bench.measure import machine
from bench.run import run
from bench.show import compare, plot, report
from bench.show.result import errors, read


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure, and write the result, tables and pictures")
    running.add_argument(
        "--quick", dest="extent", action="store_const", const="quick", default="full",
        help="the most important cases alone: two minutes on two slow cores",
    )  # fmt: skip
    running.add_argument("--extent", choices=EXTENTS, help="how many cases: full by default")
    running.add_argument("--sections", nargs="+", default=(), help="these alone, as in the result")
    running.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    running.add_argument("--threads", type=int, help="of a CPU; by default, as torch chooses")
    running.add_argument("--out", type=Path, help="folder; by default out/bench/MACHINE")
    for name, text in (
        ("report", "a result as tables"),
        ("plot", "a result as pictures beside it"),
    ):
        commands.add_parser(name, help=text).add_argument("file", type=Path)
    comparing = commands.add_parser("compare", help="what got slower; status 1 if anything did")
    comparing.add_argument("old", help="a result file, or a revision of git")
    comparing.add_argument("new", help="another of the same kind")
    comparing.add_argument(
        "--cases", default="ours", metavar="EXPRESSION",
        help="of revisions: which to measure, as pytest's -k says it; by default all of ours",
    )  # fmt: skip
    comparing.add_argument("--turns", type=int, default=5, help="of revisions: 5 by default")
    comparing.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of revisions")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all went well; 1 if a result is wrong, or slower than before; 2 for bad arguments."""
    options = parse(arguments)
    if options.command == "run":
        return _run(options)
    if options.command == "report":
        print(report.render(read(options.file)))
    elif options.command == "plot":
        for path in plot.save(read(options.file), options.file.parent):
            print(path)
    else:
        try:
            return _compare(options)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


def _run(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA device", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    out = options.out or machine.ROOT / "out" / "bench" / machine.folder(machine.describe(device))
    out.mkdir(parents=True, exist_ok=True)
    result = run(device, options.extent, out / "run.json", options.sections)
    text = report.render(result)
    (out / "run.md").write_text(text + "\n", encoding="utf-8")
    plot.save(result, out)
    print(text)
    print(f"\nresults, tables and pictures: {out.resolve()}")
    return 1 if errors(result["results"]) else 0


def _compare(options: argparse.Namespace) -> int:
    """What is a file is a result; anything else has to be a revision."""
    old, new = Path(options.old), Path(options.new)
    if old.is_file() != new.is_file():
        file, other = (old, new) if old.is_file() else (new, old)
        raise ValueError(
            f"{file} is a file, and {other} is none: compare two files, or two revisions"
        )
    if old.is_file():
        found = compare.compare(read(old), read(new))
        print(compare.render(found))
        return 1 if found.lost or any(change.slower for change in found.changes) else 0
    if options.turns < 1:
        raise ValueError(f"--turns has to be 1 at least, not {options.turns}")
    if machine.said_by("git", "status", "--porcelain"):
        print("what is not committed is not measured", file=sys.stderr)
    sides = revisions.measure(
        (options.old, options.new), options.cases, options.turns, options.device
    )
    print(revisions.render(*sides))
    return 1 if revisions.went_wrong(*sides) else 0


if __name__ == "__main__":
    sys.exit(main())
