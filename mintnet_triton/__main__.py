"""The command line: ``python -m mintnet_triton``."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import get_args

from mintnet_triton.inverse import NotConvergedError
from mintnet_triton.recipes.data import DataName
from mintnet_triton.recipes.processes import leave
from mintnet_triton.recipes.runs import RunError

# The recipes need more packages than the library does: each command imports its own.

DATA = get_args(DataName)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run what it asks for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options, arguments))
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'mintnet-triton[train]'", file=sys.stderr)
    except (ArithmeticError, NotConvergedError, OSError, RunError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
    return 1


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    from mintnet_triton.recipes.demo import run_demo

    return 0 if run_demo(options.data, options.out) else 1


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    from mintnet_triton.recipes.commands import train_preset
    from mintnet_triton.recipes.recipe import parse_change

    data = options.data or options.preset.removesuffix("+")
    if data not in DATA:
        raise ValueError(f"no data are called as preset {data!r}: give --data, one of {DATA}")
    out = options.out or Path("out") / f"{options.preset}-{options.task}"
    result = train_preset(
        options.task,
        options.preset,
        data,
        out,
        changes=dict(parse_change(change) for change in options.set),
        data_folder=options.data_dir,
        device=options.device,
        max_minutes=options.max_minutes,
        resume=options.resume,
        checkpoint_every=options.checkpoint_every,
        keep=options.keep,
        tensorboard=options.tensorboard,
        sharded=options.shard,
    )
    if os.environ.get("RANK", "0") != "0":
        return 0  # of several processes under torchrun, the first one speaks
    if result.images_per_second is not None:
        speed = f"{result.images_per_second:.4g} images per second"
        if result.peak_memory is not None:
            speed += f", {result.peak_memory:,.0f} MiB of memory at most"
        if result.whole_seconds is not None:
            speed += (
                f"; the whole recipe takes {result.whole_seconds / 3600:.3g} hours at this rate"
            )
        print(speed)
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    start = ["python"] if processes == "1" else ["torchrun", "--nproc-per-node", processes]
    again = shlex.join([*start, "-m", "mintnet_triton", *arguments])
    if not result.finished:
        more = "" if options.resume else " --resume"
        print(f"stopped after {result.steps} steps, at {result.checkpoint}; the schedule waits.")
        print(f"go on with it:  {again}{more}")
    else:
        print(f"trained for {result.steps} steps: {out / 'model.safetensors'}")
    place = "" if options.data_dir is None else f" --data-dir {shlex.quote(str(options.data_dir))}"
    print(f"judge it:       python -m mintnet_triton evaluate {shlex.quote(str(out))}{place}")
    return 0


def _evaluate(options: argparse.Namespace, _: list[str]) -> int:
    from mintnet_triton.recipes.commands import evaluate_run

    report = evaluate_run(
        options.run_folder,
        options.checkpoint,
        options.draws,
        options.inversions,
        options.data_dir,
        options.device,
        options.outliers,
        options.background,
    )
    print((options.run_folder / "evaluation.md").read_text(encoding="utf-8"))
    print(f"written to {options.run_folder}: evaluation.json, evaluation.md")
    print(f"draw it: python -m mintnet_triton figures {shlex.quote(str(options.run_folder))}")
    if report["test"]["not_finite"]:
        print(f"{report['test']['not_finite']} scores are not finite", file=sys.stderr)
        return 1
    return 0


def _sample(options: argparse.Namespace, _: list[str]) -> int:
    from mintnet_triton.recipes.commands import sample_run

    converged, residual = sample_run(
        options.run_folder,
        options.checkpoint,
        options.number,
        options.temperature,
        options.seed,
        options.device,
    )
    print(f"{converged} of {options.number} samples converged, largest residual {residual:.1e}")
    print(f"written to {options.run_folder}: samples.png, samples.npy")
    print(f"all figures: python -m mintnet_triton figures {shlex.quote(str(options.run_folder))}")
    return 0 if converged == options.number else 1


def _figures(options: argparse.Namespace, _: list[str]) -> int:
    from mintnet_triton.recipes.commands import draw_run

    print("drawn:")
    for path in draw_run(options.run_folder, options.checkpoint, options.data_dir, options.device):
        print(f"  {path}")
    folder = shlex.quote(str(options.run_folder))
    print(f"numbers to go with them: python -m mintnet_triton evaluate {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mintnet_triton", description=__doc__)
    commands = parser.add_subparsers(required=True)

    demo = commands.add_parser(
        "demo", help="train a small flow on real digits, verify it, sample, draw"
    )
    demo.add_argument("--data", choices=("digits", "mnist5k"), default="digits")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train a preset's model, with checkpoints")
    train.add_argument("task", choices=("density", "classify"))
    train.add_argument("--preset", required=True, help="mnist, cifar10, ...: model and recipe")
    train.add_argument("--data", choices=DATA, help="by default, of the preset's name, without a +")
    train.add_argument("--out", type=Path, help="folder of the run; default out/PRESET-TASK")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a value to take instead of the preset's, e.g. --set steps=1000 --set hidden=16",
    )
    train.add_argument(
        "--max-minutes",
        type=float,
        help="stop after so long, with a checkpoint; the schedule still spans the whole recipe",
    )
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS")
    train.add_argument("--keep", type=int, default=3, help="checkpoints to keep, besides the best")
    train.add_argument("--tensorboard", action="store_true", help="write a log for it, too")
    train.add_argument(
        "--shard",
        action="store_true",
        help="under torchrun: a part of the weights for each process (FSDP2), not a copy (DDP)",
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="judge a run on the whole test split")
    evaluate.add_argument("--draws", type=int, default=5, help="of the noise, for each image")
    evaluate.add_argument("--inversions", type=int, default=64, help="images to invert")
    evaluate.add_argument(
        "--outliers",
        choices=DATA,
        help="tell this set's images, reduced, and noise from the run's: areas under ROC curves",
    )
    evaluate.add_argument(
        "--background",
        type=Path,
        metavar="RUN",
        help="a run trained with --set replaced=0.2, for a likelihood ratio",
    )
    evaluate.set_defaults(run=_evaluate)

    sample = commands.add_parser("sample", help="draw images from a run")
    sample.add_argument("--number", type=int, default=64)
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(run=_sample)

    figures = commands.add_parser("figures", help="draw the paper's figures of a run")
    figures.set_defaults(run=_figures)

    for command in (evaluate, sample, figures):
        command.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
        command.add_argument("--checkpoint", default="last", help="last, best, or a file's name")
    for command in (train, evaluate, figures):
        command.add_argument(
            "--data-dir",
            type=Path,
            help="folder of mnist, fashion, cifar10 or imagenet32; else the hub",
        )
    for command in (train, evaluate, sample, figures):
        command.add_argument("--device", help="as torch names it; by default a GPU if there is one")
    return parser


if __name__ == "__main__":
    leave(main())
