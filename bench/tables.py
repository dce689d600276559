"""Mint models and rivals on equal terms: ``python -m bench.tables density|ablation|classify``.

Table 2 of the paper compares flows, Table 1 a classifier with a ResNet. Here every model has about
as many parameters as the preset's Mint model, and is trained by the same loop on the same images:
at every learning rate of one grid with the first seed, then with the other seeds at the best rate.
Images held out of training choose that rate, and the best checkpoint of a run; the test images are
only looked at for the table. An ablation compares the paper's Mint model with those that have one
part more, and with all that pay; it and the table of flows have them at the plain model's size.

Flows get the same time, at constant rates and with their weights averaged, so that no schedule has
to know how many steps the time will do. Time is that of one core, which a run has to itself: it is
counted for the process, hence runs can be made side by side. Classifiers get the preset's epochs.
A run that is in the file already is not made again.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from bench.peers import PEERS, BudgetError, ResNet, count_parameters
from bench.show.learning import learning
from mintnet_triton import MintNet, invert
from mintnet_triton.presets import PresetError
from mintnet_triton.recipes.commands import new_model
from mintnet_triton.recipes.data import DataName, load_images
from mintnet_triton.recipes.evaluation import evaluate
from mintnet_triton.recipes.figures import image_grid
from mintnet_triton.recipes.objectives import Density, make_objective
from mintnet_triton.recipes.recipe import Experiment, read_experiment
from mintnet_triton.recipes.runs import RunFolder, write_atomically
from mintnet_triton.recipes.state import TrainingState
from mintnet_triton.recipes.training import DivergedError, start_from_data, train

MINT = "mint"
PLUS = "mint+"  # with what the preset of that name adds
RESNET = "resnet"
RATES = (1e-3, 3e-3, 1e-2)
CHECKPOINT_EVERY = 100  # steps from one look at the held-out images to the next
POINTS = 60  # of a curve
SAMPLES = 64  # to be drawn of a Mint model
MOST_HELD_OUT = 1000  # of a tenth of the images, so that those looks take little of the time


#: in the place of how many values a pixel of the data may take
LEVELS = "levels"
#: Mint models with parts, by what differs from the preset, or for mint++ from the one with a plus
VARIANTS: dict[str, dict[str, Any]] = {
    "mint+spline": {"level_spline": LEVELS, "logit_lambda": 1e-6},
    "mint+position": {"position_bias": 4},
    "mint+spline+position": {"level_spline": LEVELS, "logit_lambda": 1e-6, "position_bias": 2},
    "mint+actnorm": {"actnorm": True},
    "mint+mixing": {"mixing": True},
    "mint+factor_out": {"factor_out": True},
    "mint+prior": {"factor_out": True, "conditional_prior": 16},
    "mint+learned_base": {"learned_base": True},
    "mint+mixture": {"mixture": 8},
    "mint+logit": {"logit_lambda": 1e-3},
    "mint+depth": {"pairs": 8},
    "mint+decay": {"weight_decay": 1e-4},
    # digits' plus is all of these three: what it is without each
    "mint+position+decay": {"position_bias": 4, "weight_decay": 1e-4},
    "mint+spline+decay": {"level_spline": LEVELS, "logit_lambda": 1e-6, "weight_decay": 1e-4},
    "mint+spline+position4": {"level_spline": LEVELS, "logit_lambda": 1e-6, "position_bias": 4},
    "mint+dequantiser": {"dequantiser": 4},
    "mint++dequantiser": {"dequantiser": 4},
    "mint++mixing": {"mixing": True},
    "mint++depth": {"pairs": 8},
}


@dataclass(frozen=True)
class Contest:
    """Who takes part in a table, and on which terms."""

    task: str  #: "density" or "classify"
    models: tuple[str, ...]
    minutes: float | None  #: of training, for each run; None: as long as the preset says
    draws: int  #: of the noise, for each test image
    changes: dict[str, Any]  #: of the preset


_FLOWS: dict[str, Any] = {
    "task": "density",
    "minutes": 5.0,
    "draws": 5,
    "changes": {
        "batch_size": 64,
        "steps": 10**9,  # time ends a run
        "schedule": "milestones",  # with none: a constant rate
        "milestones": [],
        "average": 0.99,
    },
}
CONTESTS = {
    "density": Contest(models=(MINT, PLUS, *PEERS), **_FLOWS),
    "ablation": Contest(models=(MINT, PLUS, *VARIANTS), **_FLOWS),
    "classify": Contest(task="classify", models=(MINT, RESNET), minutes=None, draws=1, changes={}),
}


class OtherTermsError(ValueError):
    """The file holds results that were got on other terms."""


class Job(NamedTuple):
    """A run to be made."""

    contest: str
    data: DataName
    model: str
    rate: float
    seed: int
    minutes: float | None
    changes: dict[str, Any]  #: of the preset
    data_dir: Path | None = None  #: of the data, which may come from elsewhere
    pictures: Path | None = None  #: a folder for samples


def as_large(experiment: Experiment, count: int) -> Experiment:
    """With so many hidden units that its Mint model has about that many parameters."""

    def missing(hidden: int) -> int:
        changed = replace(experiment, model={**experiment.model, "hidden": hidden})
        with torch.device("meta"):
            return abs(count_parameters(new_model(changed)) - count)

    first = int(experiment.model["hidden"])
    least = max(first // 2, 4 ** int(experiment.model["squeezes"]))  # which squeezes leave one of
    hidden = min(range(least, 2 * first + 1), key=missing)
    return replace(experiment, model={**experiment.model, "hidden": hidden})


def read(job: Job) -> Experiment:
    """What a job trains: a Mint model, or the plain one whose size its rival has."""
    task = CONTESTS[job.contest].task
    changes = {**job.changes, "seed": job.seed, "learning_rate": job.rate}
    plain = read_experiment(job.data, task, changes)
    if job.model not in (PLUS, *VARIANTS):
        return plain
    beyond = _beyond(job.data, task) if _is_plus(job.model) else {}
    beyond |= VARIANTS.get(job.model, {})
    levels = plain.data["levels"]
    beyond = {name: levels if value == LEVELS else value for name, value in beyond.items()}
    own = read_experiment(job.data, task, {**changes, **beyond})
    return as_large(own, count_parameters(new_model(plain)))


def _is_plus(model: str) -> bool:
    return model == PLUS or model.startswith(f"{PLUS}+")


def _beyond(data: DataName, task: str) -> dict[str, Any]:
    """In what the preset with a plus differs from the plain one."""
    plain, plus = (
        {**made.data, **made.model, **asdict(made.recipe)}
        for made in (read_experiment(name, task) for name in (data, f"{data}+"))
    )
    return {name: value for name, value in plus.items() if value != plain.get(name)}


def build(name: str, experiment: Experiment) -> nn.Module:
    """A model by its name; rivals are as large as the experiment's Mint model."""
    mint = new_model(experiment)
    if name in (MINT, PLUS, *VARIANTS):
        return mint
    torch.manual_seed(experiment.recipe.seed)
    np.random.seed(experiment.recipe.seed)
    channels, size = experiment.data["channels"], experiment.data["image_size"]
    count = count_parameters(mint)
    if name == RESNET:
        return ResNet.of_size(
            channels, experiment.model["classes"], 2 * experiment.model["pairs"], count
        )
    return PEERS[name].build((channels, size, size), count)


def entrants(name: str, data: DataName) -> list[str]:
    """The models of a contest but those that there are not, or not so small: it tells of them."""
    found = []
    contest = CONTESTS[name]
    for model in contest.models:
        try:
            job = Job(name, data, model, RATES[0], 0, contest.minutes, contest.changes)
            build(model, read(job))
        except (BudgetError, PresetError) as error:
            print(f"left out: {model}: {error}")
        else:
            found.append(model)
    return found


def run(job: Job) -> dict[str, Any]:
    """Train one model and judge it; what diverged or is not finite has no score."""
    experiment, task = read(job), CONTESTS[job.contest].task
    data = load_images(job.data, job.data_dir)
    model, recipe = build(job.model, experiment), experiment.recipe
    objective = make_objective(task, experiment.data)
    facts: dict[str, Any] = {
        "model": job.model,
        "rate": job.rate,
        "seed": job.seed,
        "parameters": count_parameters(model),
        "validation_loss": None,
        objective.metric: None,
    }
    with tempfile.TemporaryDirectory() as where:
        folder = RunFolder(Path(where))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the bars of many runs at once
                start_from_data(model, data, objective, recipe)
                train(
                    model,
                    data,
                    objective,
                    recipe,
                    folder.path,
                    {"model": job.model},
                    max_minutes=job.minutes,
                    clock=time.process_time,
                    checkpoint_every=CHECKPOINT_EVERY,
                    keep=1,
                )
        except DivergedError as error:
            # What follows is where the checkpoints were.
            return {**facts, "diverged": str(error).partition(". ")[0]}
        last = folder.load()
        facts |= {"steps": last["step"], "seconds": last["seconds"], "curve": curve(folder)}
        if not folder.best.is_file():
            return {**facts, "diverged": "never finite on the held-out images"}
        state = TrainingState.start(model, recipe)
        state.load_state_dict(folder.load("best"))
    facts |= {"best_step": state.step, "validation_loss": state.best}
    found = evaluate(state.evaluated(), data.test, objective, CONTESTS[job.contest].draws)
    if not found.loss.isfinite().all():
        wrong = int((~found.loss.isfinite()).any(0).sum())
        return {**facts, "diverged": f"not finite on {wrong} test images"}
    wanted = (objective.metric, "bits_bound", "bits_importance")
    facts |= {name: value for name, value in found.summary().items() if name in wanted}
    flow = state.evaluated()
    if isinstance(flow, MintNet) and isinstance(objective, Density):
        facts["samples"], picture = draw(flow, objective, job.seed)
        if job.pictures is not None:
            picture.savefig(
                job.pictures / f"{job.data}_{job.model}_{job.rate:g}_{job.seed}.png", dpi=150
            )
    return facts


def curve(folder: RunFolder) -> list[list[float]]:
    """Seconds, and the loss on the held-out images then: of so many looks as a picture needs."""
    seconds, looks = 0.0, []
    for row in folder.rows():
        seconds = row.get("seconds", seconds)
        if "validation_loss" in row:
            looks.append([round(seconds, 1), round(row["validation_loss"], 4)])
    return looks[:: max(1, len(looks) // POINTS)]


def draw(flow: MintNet, objective: Density, seed: int) -> tuple[dict[str, Any], Figure]:
    """Samples, each with a bound of its error: their time and worth, and a picture."""
    z = torch.randn(SAMPLES, *flow.latent_shape, generator=torch.Generator().manual_seed(seed))
    start = time.process_time()
    result = invert(flow, z, certify=True)
    seconds = time.process_time() - start
    assert result.error_bound is not None
    bounds = result.error_bound[result.error_bound.isfinite()]
    facts = {
        "number": SAMPLES,
        "converged": int(result.converged.sum()),
        "certified": len(bounds),
        "residual": float(result.residual.max()),
        "error_bound": float(bounds.max()) if len(bounds) else None,
        "seconds": seconds,
    }
    images = objective.preprocess().to_images(result.x[result.converged])
    return facts, image_grid(images, objective.levels)


def run_all(
    name: str,
    data_name: DataName,
    path: Path,
    pool: Executor,
    *,
    minutes: float | None,
    seeds: Sequence[int],
    rates: Sequence[float],
    models: Sequence[str],
    data_dir: Path | None = None,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Make the runs that the file lacks, and write it after each.

    Args:
        name: of the contest: "density", "ablation" or "classify".
        data_name: of a data set and of the preset for it.
        path: of the file.
        pool: makes the runs, several at once perhaps.
        minutes: of a core, for each run; None: as long as the preset says.
        seeds: of initial values, order and noise; all rates are tried with the first.
        rates: learning rates of Adam.
        models: by name: those of the contest, and keys of :data:`VARIANTS` for densities.
        data_dir: of the data, as ``--data-dir``; None: where they are looked for.
        pictures: a folder for samples of Mint models, DATA_MODEL_RATE_SEED.png; None: for none.

    Returns:
        What the file holds.

    Raises:
        OtherTermsError: the file is of another contest, other data, another time or recipe.
        MissingLibraryError: the library of a peer is not installed.
        ValueError: a model that takes no part in it.
    """
    variants = VARIANTS if CONTESTS[name].task == "density" else ()
    known = list(dict.fromkeys([*CONTESTS[name].models, *variants]))
    for model in models:
        if model not in known:
            raise ValueError(f"models must be among {known} for {name}, got {model!r}")
    data = load_images(data_name, data_dir)
    count = data.train.count()
    assert count is not None, "the data sets of this size are no streams"
    terms: dict[str, Any] = {
        "task": name,
        "data": data_name,
        "levels": data.levels,
        "minutes": minutes,
        "changes": {**CONTESTS[name].changes, "validation": min(count // 10, MOST_HELD_OUT)},
    }
    results: dict[str, Any] = {**terms, "torch": torch.__version__, "runs": []}
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
        for key, value in terms.items():
            if results[key] != value:
                raise OtherTermsError(f"{path} has {key}={results[key]!r}, not {value!r}")
    for folder in (path.parent, pictures):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def make(wanted: Iterable[tuple[str, float, int]]) -> None:
        known = {(made["model"], made["rate"], made["seed"]) for made in results["runs"]}
        jobs = [
            Job(name, data_name, *key, minutes, terms["changes"], data_dir, pictures)
            for key in wanted
            if key not in known
        ]
        futures = [pool.submit(run, job) for job in jobs]
        failure = None
        for future in tqdm(as_completed(futures), total=len(jobs), unit="run"):
            if future.cancelled():
                continue
            if error := future.exception():
                failure = failure or error
                for other in futures:  # those under way end, and are recorded
                    other.cancel()
                continue
            results["runs"].append(future.result())
            write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
        if failure is not None:
            raise failure

    make((model, rate, seeds[0]) for rate in rates for model in models)
    best = {model: _best_rate(_runs_of(model, results)) for model in models}
    make((model, best[model], seed) for seed in seeds[1:] for model in models)
    return results


def table(results: dict[str, Any]) -> str:
    """Each model at its best rate, mean ± standard deviation over the seeds, in Markdown."""
    metric, title, scale, less_is_better = {
        "density": ("bits_per_dim", "bits per dimension", 1, True),
        "classify": ("accuracy", "test accuracy, %", 100, False),
    }[CONTESTS[results["task"]].task]
    heads = ["model", "library", "parameters", "rate", title, "seeds", "steps", "diverged"]
    rows = []
    for model in dict.fromkeys(made["model"] for made in results["runs"]):
        made = _runs_of(model, results)
        rate = _best_rate(made)
        best = [entry for entry in made if entry["rate"] == rate]
        scores = [scale * entry[metric] for entry in best if "diverged" not in entry]
        score = steps = "-"
        place = math.inf
        if len(scores) == len(best):
            place = statistics.fmean(scores) if less_is_better else -statistics.fmean(scores)
            score = f"{statistics.fmean(scores):.3f}"
            if len(scores) > 1:
                score += f" ± {statistics.stdev(scores):.3f}"
            steps = f"{statistics.median(entry['steps'] for entry in best):.0f}"
        diverged = f"{sum('diverged' in entry for entry in made)} of {len(made)} runs"
        row = [*_names(model, results["task"]), best[0]["parameters"], f"{rate:g}", score]
        rows.append((place, [*row, len(best), steps, diverged]))
    cells = [heads, ["---"] * len(heads), *(row for _, row in sorted(rows, key=itemgetter(0)))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def bounds(results: dict[str, Any]) -> str:
    """What noise that is learnt gives, beside the exact bits of the same flows, in Markdown.

    Mean over the seeds, at the best rate; "" if no model has a dequantiser.
    """
    draws = CONTESTS[results["task"]].draws
    heads = ["model", "bits per dimension, uniform noise", "variational bound"]
    rows = [[*heads, f"importance-weighted, {draws} draws", "seeds"], ["---"] * 5]
    bounded = [made for made in results["runs"] if "bits_bound" in made]
    for model in dict.fromkeys(made["model"] for made in bounded):
        rate = _best_rate(_runs_of(model, results))
        best = [made for made in bounded if (made["model"], made["rate"]) == (model, rate)]
        scores = [
            f"{statistics.fmean(made[name] for made in best):.3f}"
            for name in ("bits_per_dim", "bits_bound", "bits_importance")
        ]
        rows.append([_names(model, results["task"])[0], *scores, str(len(best))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""


def samples(results: dict[str, Any]) -> str:
    """Of the Mint models whose samples were drawn, what is sure of them, in Markdown.

    Of each model's first run at its best rate that had some, for what diverged has none; "" if
    there is no such model. Time, with the certificates, is that of the table's first taken as 1.
    """
    heads = ["model", "samples", "converged", "with a bound", "largest residual"]
    rows = [[*heads, "largest bound of the error", "time"], ["---"] * 7]
    first = None
    for model in dict.fromkeys(made["model"] for made in results["runs"] if "samples" in made):
        rate = _best_rate(_runs_of(model, results))
        at_best = (made for made in _runs_of(model, results) if made["rate"] == rate)
        drawn = next((made["samples"] for made in at_best if "samples" in made), None)
        if drawn is None:
            continue
        first = first or drawn["seconds"]
        counts = [str(drawn[name]) for name in ("number", "converged", "certified")]
        errors = [
            "-" if drawn[name] is None else f"{drawn[name]:.0e}"
            for name in ("residual", "error_bound")
        ]
        name, _ = _names(model, results["task"])
        rows.append([name, *counts, *errors, f"{drawn['seconds'] / first:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""


def _names(model: str, task: str) -> tuple[str, str]:
    """Of a model and its library."""
    if model in PEERS:
        return PEERS[model].name, PEERS[model].library
    if model == RESNET:
        return "ResNet", "bench.peers"
    name = {"density": "MintNet", "classify": "MintClassifier"}[CONTESTS[task].task]
    if _is_plus(model):
        name += "+"
    if model in VARIANTS:
        name += ", " + ", ".join(f"`{key}={value}`" for key, value in VARIANTS[model].items())
    return name, "this one"


def _runs_of(model: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    return [made for made in results["runs"] if made["model"] == model]


def _best_rate(made: list[dict[str, Any]]) -> float:
    """By the held-out images, of the rates tried with the first seed; one that diverged is last."""
    first = [entry for entry in made if entry["seed"] == made[0]["seed"]]
    return float(min(first, key=_loss)["rate"])


def _loss(entry: dict[str, Any]) -> float:
    return math.inf if "diverged" in entry else float(entry["validation_loss"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=CONTESTS)
    parser.add_argument(
        "--data", choices=["digits", "mnist5k", "patches", "fashion"], default="digits"
    )
    parser.add_argument("--data-dir", type=Path, help="of the data, as of mintnet-triton train")
    parser.add_argument("--pictures", type=Path, help="folder for samples of Mint models")
    parser.add_argument("--minutes", type=float, help="of a core, each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--models", nargs="+", help="default: all that can be so small")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--out", type=Path, help="default: out/TASK_DATA.json")
    options = parser.parse_args(arguments)
    contest = CONTESTS[options.task]
    path = options.out or Path("out") / f"{options.task}_{options.data}.json"
    with ProcessPoolExecutor(
        options.processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        results = run_all(
            options.task,
            options.data,
            path,
            pool,
            minutes=contest.minutes if options.minutes is None else options.minutes,
            seeds=options.seeds,
            rates=options.rates,
            models=options.models or entrants(options.task, options.data),
            data_dir=options.data_dir,
            pictures=options.pictures,
        )
    print(*filter(None, (table(results), bounds(results), samples(results))), sep="\n\n")
    best = {
        _names(model, options.task)[0]: min(_runs_of(model, results), key=_loss)
        for model in dict.fromkeys(made["model"] for made in results["runs"])
    }
    figure = learning(best, "bits per dimension, held out" if contest.task == "density" else "loss")
    if figure is not None:
        figure.savefig(path.with_suffix(".png"), dpi=150)
    print(f"written to {path.resolve()}")


if __name__ == "__main__":
    main()
