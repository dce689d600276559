"""A MintNet and its rivals on equal terms (Table 2 of the paper): ``python -m bench.table2``.

Every model has about as many parameters as the preset's MintNet, and is trained by the same loop
on the same images for the same time, at every learning rate of one grid and with every seed. The
rates are constant and the weights averaged, so that no schedule has to know how many steps the time
will do. Images held out of training choose the best checkpoint of a run and the best rate of a
model; the test images are only looked at for the table. A run that is in the file already is not
made again.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.peers import PEERS, count_parameters
from mintnet_triton.flow import MintNet
from mintnet_triton.recipes.data import DataName, ImageData, load_images
from mintnet_triton.recipes.evaluation import evaluate
from mintnet_triton.recipes.objectives import make_objective
from mintnet_triton.recipes.recipe import Experiment, read_experiment
from mintnet_triton.recipes.runs import RunFolder, write_atomically
from mintnet_triton.recipes.training import DivergedError, TrainingState, train

MINTNET = "mintnet"
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
#: the same for all; of the preset's training images, a tenth is held out
TERMS: dict[str, Any] = {
    "batch_size": 64,
    "steps": 10**9,  # time ends a run
    "schedule": "milestones",  # with none: a constant rate
    "milestones": (),
    "average": 0.99,
}
CHECKPOINT_EVERY = 100  # steps from one look at the held-out images to the next
DRAWS = 5  # of the dequantisation noise of each test image


class OtherTermsError(ValueError):
    """The file holds results that were got on other terms."""


def build(name: str, experiment: Experiment) -> nn.Module:
    """A model by its key in :data:`PEERS`, or the MintNet, whose size all have."""
    torch.manual_seed(experiment.recipe.seed)
    np.random.seed(experiment.recipe.seed)
    mintnet = MintNet(**experiment.model)
    if name == MINTNET:
        return mintnet
    return PEERS[name].build(mintnet.image_shape, count_parameters(mintnet))


def run(name: str, experiment: Experiment, data: ImageData, minutes: float) -> dict[str, Any]:
    """Train one model and judge it; what is not finite or diverged has no bits."""
    model, recipe = build(name, experiment), experiment.recipe
    objective = make_objective("density", experiment.data)
    facts: dict[str, Any] = {
        "model": name,
        "rate": recipe.learning_rate,
        "seed": recipe.seed,
        "parameters": count_parameters(model),
        "validation_bits": None,
        "test_bits": None,
    }
    with tempfile.TemporaryDirectory() as where:
        folder = RunFolder(Path(where))
        try:
            train(
                model,
                data,
                objective,
                recipe,
                folder.path,
                {"model": name},
                max_minutes=minutes,
                checkpoint_every=CHECKPOINT_EVERY,
                keep=1,
            )
        except DivergedError as error:
            # What follows is where the checkpoints were.
            return {**facts, "diverged": str(error).partition(". ")[0]}
        last = folder.load()
        facts |= {"steps": last["step"], "seconds": last["seconds"]}
        if not folder.best.is_file():
            return {**facts, "diverged": "never finite on the held-out images"}
        state = TrainingState.start(model, recipe)
        state.load_state_dict(folder.load("best"))
    bits = evaluate(state.evaluated(), data.test, objective, DRAWS).metric
    facts |= {"best_step": state.step, "validation_bits": state.best}
    if not bits.isfinite().all():
        wrong = int((~bits.isfinite()).any(0).sum())
        return {**facts, "diverged": f"not finite on {wrong} test images"}
    return {**facts, "test_bits": float(bits.mean())}


def run_all(
    data_name: DataName,
    minutes: float,
    seeds: Sequence[int],
    rates: Sequence[float],
    names: Sequence[str],
    path: Path,
) -> dict[str, Any]:
    """Make the runs that the file lacks, and write it after each.

    Args:
        data_name: of a data set and of the preset for it.
        minutes: of training, for each run.
        seeds: of initial values, order and noise.
        rates: learning rates of Adam.
        names: of models: keys of :data:`PEERS`, or "mintnet".
        path: of the file.

    Returns:
        What the file holds.

    Raises:
        OtherTermsError: the file is of other data or another time.
        MissingLibraryError: the library of a peer is not installed.
    """
    data = load_images(data_name)
    count = data.train.count()
    assert count is not None, "the data sets of this size are no streams"
    terms = {**TERMS, "milestones": [], "validation": count // 10}
    results: dict[str, Any] = {
        "data": data_name,
        "levels": data.levels,
        "minutes": minutes,
        "terms": terms,
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "runs": [],
    }
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in ("data", "minutes", "terms"):
            if found[key] != results[key]:
                raise OtherTermsError(f"{path} has {key}={found[key]!r}, not {results[key]!r}")
        results = found
    known = {(made["model"], made["rate"], made["seed"]) for made in results["runs"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that whenever it is stopped, all models have had nearly as many.
    for seed, name, rate in itertools.product(seeds, names, rates):
        if (name, rate, seed) in known:
            continue
        changes = {**terms, "seed": seed, "learning_rate": rate}
        experiment = read_experiment(data_name, "density", changes)
        print(f"{name}, rate {rate:g}, seed {seed}", flush=True)
        results["runs"].append(run(name, experiment, data, minutes))
        write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
    return results


def table(results: dict[str, Any]) -> str:
    """Bits per dimension of each model at its best rate, mean ± standard deviation, in Markdown.

    The best rate has the lowest mean on the held-out images, over all seeds; one at which a run
    diverged comes last.
    """
    lines = [
        f"{results['data']}: {results['levels']} levels, hence {math.log2(results['levels']):.3f} "
        f"bits for uniform noise; {results['minutes']:g} minutes a run",
        "",
        "| model | library | parameters | rate | bits per dimension | seeds | steps | ms a step "
        "| diverged, of all runs |",
        "| --- " * 9 + "|",
    ]
    rows = []
    for name in dict.fromkeys(made["model"] for made in results["runs"]):
        made = [entry for entry in results["runs"] if entry["model"] == name]
        by_rate = {
            rate: [entry for entry in made if entry["rate"] == rate]
            for rate in sorted({entry["rate"] for entry in made})
        }
        rate = min(by_rate, key=lambda rate: _validation(by_rate[rate]))
        rows.append((_test(by_rate[rate]), _row(name, rate, by_rate[rate], made)))
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


def _validation(runs: list[dict[str, Any]]) -> float:
    if any("diverged" in entry for entry in runs):
        return math.inf
    return statistics.fmean(entry["validation_bits"] for entry in runs)


def _test(runs: list[dict[str, Any]]) -> float:
    bits = [math.inf if entry["test_bits"] is None else entry["test_bits"] for entry in runs]
    return statistics.fmean(bits)


def _row(name: str, rate: float, runs: list[dict[str, Any]], all_runs: list[dict[str, Any]]) -> str:
    title, library = (
        ("MintNet", "this one") if name == MINTNET else (PEERS[name].name, PEERS[name].library)
    )
    diverged = sum("diverged" in entry for entry in all_runs)
    bits = steps = milliseconds = "-"
    if math.isfinite(_test(runs)):
        bits = f"{_test(runs):.3f}"
        if len(runs) > 1:
            bits += f" ± {statistics.stdev(entry['test_bits'] for entry in runs):.3f}"
        steps = f"{statistics.median(entry['steps'] for entry in runs):.0f}"
        each = [1000 * entry["seconds"] / entry["steps"] for entry in runs]
        milliseconds = f"{statistics.median(each):.0f}"
    return (
        f"| {title} | {library} | {runs[0]['parameters']} | {rate:g} | {bits} | {len(runs)} "
        f"| {steps} | {milliseconds} | {diverged} of {len(all_runs)} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.table2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=["digits", "mnist5k"], default="digits")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    names = [MINTNET, *PEERS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=Path("out/table2.json"))
    options = parser.parse_args(arguments)
    results = run_all(
        options.data, options.minutes, options.seeds, options.rates, options.models, options.out
    )
    print(table(results))
    print(f"written to {options.out.resolve()}")


if __name__ == "__main__":
    main()
