"""The paper's recipes at full size: ``python -m bench.full_size``.

Trains the presets for a few steps at the paper's batch, in one process and in two, on noise in
files like those of the hub, and says how long the paper's whole training would take here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import machine
from bench.show.result import write
from mintnet_triton.recipes.commands import train_preset
from mintnet_triton.recipes.data import DataName
from mintnet_triton.recipes.processes import leave
from mintnet_triton.recipes.recipe import read_experiment

#: images of the training split, and the split that is tested on
DATA: dict[DataName, tuple[int, str]] = {
    "cifar10": (50_000, "test"),
    "imagenet32": (1_281_167, "validation"),
}
CASES: tuple[tuple[str, DataName], ...] = (
    ("density", "cifar10"),
    ("classify", "cifar10"),
    ("density", "imagenet32"),
)
#: processes, and whether each has but a part of the weights
WAYS = {"one process": (1, False), "two, copies": (2, False), "two, shards": (2, True)}


def write_images(folder: Path, splits: dict[str, int]) -> None:
    """Noise in the hub's schema, a parquet file a split."""
    from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars

    disable_progress_bars()
    source = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    for split, count in splits.items():
        images = source.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        rows = {"image": list(images), "label": [0] * count}
        data = Dataset.from_dict(rows, features=features)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def work(task: str, name: DataName, sharded: bool, steps: int, folder: Path, out: Path) -> None:
    """In each process: train, and leave in a file what the first one says of it."""
    result = train_preset(
        task, name, name, out, changes={"steps": steps}, data_folder=folder, device="cpu",
        checkpoint_every=steps, sharded=sharded,
    )  # fmt: skip
    if os.environ["RANK"] == "0":
        rate, peak = result.images_per_second, result.peak_memory
        (out / "found.json").write_text(json.dumps({"images_per_second": rate, "MiB": peak}))


def run(steps: int) -> dict[str, Any]:
    """Every case in every way.

    Raises:
        subprocess.CalledProcessError: one failed, and has printed why.
    """
    found = []
    for task, name in CASES:
        images, test = DATA[name]
        recipe = read_experiment(name, task).recipe
        all_steps = recipe.steps or (recipe.epochs or 0) * (images // recipe.batch_size)
        with tempfile.TemporaryDirectory() as where:
            folder = Path(where)
            write_images(folder, {"train": 2 * recipe.batch_size, test: 1})
            for way, (processes, sharded) in WAYS.items():
                out = folder / way
                worker = ["--worker", task, name, str(sharded), str(steps), where, str(out)]
                threads = str(max(1, torch.get_num_threads() // processes))
                subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node",
                     str(processes), "-m", "bench.full_size", *worker],
                    cwd=machine.ROOT, env={**os.environ, "OMP_NUM_THREADS": threads},
                    stdout=subprocess.PIPE, check=True,
                )  # fmt: skip
                measured = json.loads((out / "found.json").read_text())
                hours = all_steps * recipe.batch_size / measured["images_per_second"] / 3600
                facts = {"task": task, "data": name, "way": way}
                found.append({**facts, **measured, "hours": hours})
    return {"machine": machine.describe(torch.device("cpu")), "steps": steps, "runs": found}


def table(result: dict[str, Any]) -> str:
    """Speed, memory and the time of the paper's training, in Markdown."""
    heads = ("recipe", "trained by", "images per second", "peak memory of a process, MiB", "whole")
    rows = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for one in result["runs"]:
        memory = "" if one["MiB"] is None else f"{one['MiB']:.0f}"
        days = f"{one['hours'] / 24:.3g} days"
        rows.append(
            f"| {one['data']} {one['task']} | {one['way']} | {one['images_per_second']:.3g} "
            f"| {memory} | {days} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.full_size", description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="of each; the first is not timed")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of full_size.json")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)  # started by this one
    options = parser.parse_args()
    if options.worker:
        task, name, sharded, steps, folder, out = options.worker
        work(task, name, sharded == "True", int(steps), Path(folder), Path(out))
        leave(0)
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options.steps)
    write(options.out / "full_size.json", result)
    print(table(result))
    print(f"written to {(options.out / 'full_size.json').resolve()}")


if __name__ == "__main__":
    main()
