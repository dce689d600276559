"""What the command line does: train, evaluate, sample, figures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mintnet_triton.checkpoint import save
from mintnet_triton.checks import check_integer
from mintnet_triton.classifier import MintClassifier
from mintnet_triton.flow import MintNet
from mintnet_triton.inverse import invert
from mintnet_triton.recipes import figures
from mintnet_triton.recipes.batches import evaluation_batches
from mintnet_triton.recipes.data import DataName, ImageData, load_images, reduced
from mintnet_triton.recipes.evaluation import (
    as_json,
    as_table,
    classify_by_density,
    evaluate,
    evaluate_inversion,
    evaluate_outliers,
)
from mintnet_triton.recipes.objectives import Density, Objective, make_objective, metric_of
from mintnet_triton.recipes.processes import Processes, joined
from mintnet_triton.recipes.recipe import Experiment, read_experiment
from mintnet_triton.recipes.runs import RunError, RunFolder
from mintnet_triton.recipes.training import TrainingResult, start_from_data, train

ALPHAS = [1.0, 0.5, 1 / 3.5]  # the last is the paper's for MNIST
ITERATIONS = [1, 2, 3, 5, 8, 12, 20, 30, 50, 80]
OUTLIERS = 1000  # of each kind, at most, that a flow is to tell from its test images
_MODELS: dict[str, type[MintNet] | type[MintClassifier]] = {
    "density": MintNet,
    "classify": MintClassifier,
}


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def train_preset(
    task: str,
    preset: str,
    data_name: DataName,
    out: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    data_folder: Path | None = None,
    device: str | None = None,
    **options: Any,
) -> TrainingResult:
    """Train a preset's model, and leave the run, with ``model.safetensors``, in a folder.

    Under ``torchrun``, each process takes its share of every batch.

    Args:
        task: "density" or "classify".
        preset: by name.
        data_name: of a data set of the preset's shape.
        out: folder of the run.
        changes: of the preset, as :func:`.read_experiment` takes them.
        data_folder: as :func:`.load_images` takes it.
        device: as torch names it; a GPU if there is one.
        options: further arguments of :func:`.train`.

    Raises:
        ValueError: the data do not fit the preset; and all that :func:`.train` raises.
    """
    asked = read_experiment(preset, task, changes)
    with joined(device or default_device()) as place:
        labelled = task == "classify" or asked.condition
        data = load_images(data_name, data_folder, labelled=labelled)
        experiment = asked.for_classes(data.classes)
        _check_fits(experiment, data, preset)
        model = new_model(experiment).to(place)
        objective = make_objective(task, experiment.data)
        start_from_data(model, data, objective, experiment.recipe)
        description = {"preset": preset, "model": model.arguments}
        first = Processes.current().first
        if first:
            _announce(experiment, data, model, out)
        result = train(model, data, objective, experiment.recipe, out, description, **options)
        if first:
            save(load_run(out).model, out / "model.safetensors")
    return result


def _announce(experiment: Experiment, data: ImageData, model: nn.Module, out: Path) -> None:
    recipe, images = experiment.recipe, data.train.count()
    print(
        f"{type(model).__name__} of {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{'a stream' if images is None else f'{images:,}'} of images of {data.name}; "
        f"{f'{recipe.epochs} epochs' if recipe.epochs else f'{recipe.steps:,} steps'} at batch "
        f"{recipe.batch_size}, on {next(model.parameters()).device}; the run is in {out}"
    )


def new_model(experiment: Experiment) -> MintNet | MintClassifier:
    """The experiment's model with its initial values, which its seed fixes."""
    torch.manual_seed(experiment.recipe.seed)
    return _MODELS[experiment.task](**experiment.model)


@dataclass(frozen=True)
class Run:
    """A trained model, and what it was trained for."""

    model: MintNet | MintClassifier  #: in evaluation mode; the moving average, if there is one
    objective: Objective
    data: DataName
    step: int


def load_run(folder: Path, checkpoint: str = "last", device: str = "cpu") -> Run:
    """Read a run that :func:`train_preset` left.

    Args:
        folder: of the run.
        checkpoint: "last", "best", or a file name.
        device: to put the model on.

    Raises:
        RunError, CheckpointError: there is no such run or checkpoint, or it is damaged.
    """
    run = RunFolder(folder)
    description, state = run.description(), run.load(checkpoint)
    try:
        values = dict(description["objective"])
        task, data = values.pop("task"), description["data"]["name"]
        model = _MODELS[task](**description["model"])
        objective = make_objective(task, values)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / 'run.json'} does not describe a run: {error!r}") from error
    weights = state["model"]
    if "average" in state:
        prefix = "module."
        weights = {
            name.removeprefix(prefix): value
            for name, value in state["average"].items()
            if name.startswith(prefix)
        }
    with run.fitting(checkpoint):
        model.load_state_dict(weights)
    return Run(model.to(device).eval(), objective, data, state["step"])


def evaluate_run(
    folder: Path,
    checkpoint: str = "last",
    draws: int = 5,
    inversions: int = 64,
    data_folder: Path | None = None,
    device: str | None = None,
    outliers: DataName | None = None,
    background: Path | None = None,
) -> dict[str, Any]:
    """Judge a run on the whole test split; writes ``evaluation.json`` and ``evaluation.md``.

    Args:
        folder: of the run.
        checkpoint: as :func:`load_run` takes it.
        draws: of the dequantisation noise; a classifier needs one. A density for each class is
            judged as a classifier, too (:func:`.classify_by_density`).
        inversions: test images that a flow maps to latents and back.
        data_folder: as :func:`.load_images` takes it.
        device: a GPU if there is one.
        outliers: a data set whose test images, reduced to the run's shape and levels, the flow is
            to tell from its own, and noise as well.
        background: folder of a run of the same data with ``replaced`` in its recipe, for a
            likelihood ratio.

    Returns:
        What the files hold.

    Raises:
        ValueError: outliers that cannot be reduced to the run's images, or a background that is of
            other data, or without outliers; either of them for a classifier.
    """
    inversions = check_integer("inversions", inversions, least=0)
    device = device or default_device()
    run = load_run(folder, checkpoint, device)
    flow = isinstance(run.objective, Density)
    if background is not None and outliers is None:
        raise ValueError("background is for telling outliers: give outliers, too")
    labelled = not isinstance(run.objective, Density) or run.objective.classes is not None
    data = load_images(run.data, data_folder, labelled=labelled)
    test = data.test
    evaluation = evaluate(run.model, test, run.objective, draws if flow else 1)
    report = {
        "data": run.data,
        "checkpoint": checkpoint,
        "step": run.step,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "test": evaluation.summary(),
    }
    if isinstance(run.objective, Density) and isinstance(run.model, MintNet) and inversions:
        images, labels, _ = next(evaluation_batches(test, inversions))
        report["inversion"] = evaluate_inversion(run.model, images, run.objective, labels=labels)
    if isinstance(run.objective, Density) and run.objective.classes is not None:
        report["classification"] = classify_by_density(run.model, test, run.objective, draws)
    if outliers is not None:
        other = None if background is None else load_run(background, device=device)
        report["outliers_auroc"] = _tell_outliers(run, data, load_images(outliers), other)
    (folder / "evaluation.json").write_text(
        json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8"
    )
    (folder / "evaluation.md").write_text(as_table(report), encoding="utf-8")
    return report


def _tell_outliers(
    run: Run, data: ImageData, foreign: ImageData, background: Run | None
) -> dict[str, float]:
    flow, objective = _flow_of(run)
    if background is not None and (background.data, background.objective) != (run.data, objective):
        raise ValueError(
            f"the background must be of {run.data} and {objective}, got {background.data} and "
            f"{background.objective}"
        )
    theirs = figures.first_images(foreign.test, OUTLIERS)
    noise = np.random.default_rng(0).integers(0, data.levels, size=(len(theirs), *data.shape))
    return evaluate_outliers(
        flow,
        data,
        {
            foreign.name: reduced(theirs, foreign.levels, data.shape, data.levels),
            "noise": torch.from_numpy(noise.astype(np.uint8)),
        },
        objective,
        None if background is None else _flow_of(background)[0],
        most=OUTLIERS,
    )


def sample_run(
    folder: Path,
    checkpoint: str = "last",
    number: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    device: str | None = None,
) -> tuple[int, float]:
    """Draw images; writes ``samples.npy`` (n, C, H, W), int64, and ``samples.png``.

    Only samples whose inversion converged are written. Where there is a density for each class, all
    have as many samples, to within one, in rows of the picture, and ``labels.npy`` (n,), int64, has
    the classes.

    Returns:
        How many converged, and the largest residual.

    Raises:
        ValueError: the run is of a classifier, or number is below 1.
    """
    run = load_run(folder, checkpoint, device or default_device())
    flow, objective = _flow_of(run)
    number = check_integer("number", number, least=1)
    generator = torch.Generator().manual_seed(seed)
    z = temperature * torch.randn(number, *flow.latent_shape, generator=generator)
    like, labels = next(flow.parameters()), objective.labels(number)
    context = None if labels is None else objective.context(labels, like)
    result = invert(flow, z.to(like.device), context=context)
    preprocess, found = objective.preprocess(), result.converged.cpu()
    images = preprocess.to_images(result.x.cpu()[found])
    np.save(folder / "samples.npy", images.numpy())
    if labels is not None:
        labels = labels[found]
        np.save(folder / "labels.npy", labels.numpy())
    figures.sample_sheet(images, labels, objective).savefig(folder / "samples.png", dpi=150)
    return len(images), float(result.residual.max())


def draw_run(
    folder: Path,
    checkpoint: str = "last",
    data_folder: Path | None = None,
    device: str | None = None,
) -> list[Path]:
    """Draw the paper's figures of a run; a classifier has a learning curve alone.

    Returns:
        Paths of what was drawn: ``learning_curve.png``; ``samples.png`` (Figure 3),
        ``reconstruction_error.png`` and ``reconstructions.png`` (Figure 4), and
        ``interpolation.png`` (Figure 5).
    """
    run = load_run(folder, checkpoint, device or default_device())
    drawn = {
        "learning_curve": figures.learning_curve(
            RunFolder(folder).rows(), metric_of(run.objective, run.model)
        )
    }
    if isinstance(run.model, MintNet):
        flow, objective = _flow_of(run)
        conditional = objective.classes is not None
        test = load_images(run.data, data_folder, labelled=conditional).test
        images, labels, _ = next(evaluation_batches(test, 16))
        given = labels if conditional else None
        drawn |= figures.paper_figures(flow, objective, images, ALPHAS, ITERATIONS, given)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _flow_of(run: Run) -> tuple[MintNet, Density]:
    if not isinstance(run.model, MintNet) or not isinstance(run.objective, Density):
        raise ValueError("the run is of a classifier, which has no samples and no density")
    return run.model, run.objective


def _check_fits(experiment: Experiment, data: ImageData, preset: str) -> None:
    wanted = experiment.data
    size = wanted["image_size"]
    ours = (wanted["channels"], size, size, wanted["levels"])
    if ours != (*data.shape, data.levels):
        raise ValueError(
            f"preset {preset!r} is for images of {ours[:3]} (C, H, W) and {ours[3]} levels, and "
            f"{data.name} has {data.shape} and {data.levels}"
        )
    classes = experiment.model.get("classes", data.classes)
    if classes != data.classes:
        raise ValueError(f"{data.name} has {data.classes} classes: --set classes={data.classes}")
