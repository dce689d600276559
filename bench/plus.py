"""``python -m bench.plus``: what a training step takes beyond the paper, of the plain model's.

Both models are of about as many parameters, as in ``python -m bench.tables density``. They take
turns on one thread, with batches and the optimiser as there; each turn tells a ratio.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from bench.measure import machine
from bench.measure.timing import Clock, Work, ratio
from bench.peers import count_parameters
from bench.show.result import write
from bench.tables import CONTESTS, MINT, PLUS, Job, build, read
from mintnet_triton.recipes.batches import generator
from mintnet_triton.recipes.data import DataName, load_images
from mintnet_triton.recipes.objectives import make_objective
from mintnet_triton.recipes.state import TrainingState

DATA: tuple[DataName, ...] = ("digits", "mnist5k")


def prepare(data: DataName, name: str) -> tuple[int, Work]:
    """The parameters of a model, and a step of its training."""
    experiment = read(Job("density", data, name, 1e-3, 0, None, CONTESTS["density"].changes))
    model, recipe = build(name, experiment), experiment.recipe
    objective = make_objective("density", experiment.data)
    optimiser = TrainingState.start(model, recipe).optimiser
    train = load_images(data).train
    samples = [train.fetch(index) for index in range(recipe.batch_size)]
    images = torch.stack([sample.image for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    rngs = [generator(0, "training", 0, sample.index) for sample in samples]
    inputs = objective.inputs(images, rngs)

    def step() -> None:
        optimiser.zero_grad()
        objective.scores(model, inputs, labels).loss.mean().backward()
        optimiser.step()

    return count_parameters(model), step


def run(seconds: float) -> dict[str, Any]:
    """Both models on each data set."""
    clock = Clock(torch.device("cpu"), seconds=seconds, rounds=(20, 500), now=time.process_time)
    found: dict[str, Any] = {"machine": machine.describe(torch.device("cpu")), "data": {}}
    for data in DATA:
        models = {name: prepare(data, name) for name in (MINT, PLUS)}
        found["data"][data] = {
            "parameters": {name: count for name, (count, _) in models.items()},
            "ms": clock.race({name: step for name, (_, step) in models.items()}),
        }
    return found


def table(result: dict[str, Any]) -> str:
    """Ratios, with quartiles, in Markdown."""
    rows = ["| data | parameters | a step, of the plain model's | quartiles |", "| --- " * 4 + "|"]
    for data, found in result["data"].items():
        times, count = found["ms"], found["parameters"]
        middle, low, high = ratio(times[PLUS], times[MINT])
        of = f"{count[PLUS]} of {count[MINT]}"
        rows.append(f"| {data} | {of} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plus", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="about, of each data set")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of plus.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options.seconds)
    write(options.out / "plus.json", result)
    print(table(result))


if __name__ == "__main__":
    main()
