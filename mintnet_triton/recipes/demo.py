"""The main job end to end: train on real digits, verify, sample, invert, and draw."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from mintnet_triton.checkpoint import save
from mintnet_triton.flow import MintNet
from mintnet_triton.inverse import invert
from mintnet_triton.recipes.batches import generator
from mintnet_triton.recipes.commands import ALPHAS, ITERATIONS, new_model
from mintnet_triton.recipes.data import DataName, load_images
from mintnet_triton.recipes.evaluation import evaluate
from mintnet_triton.recipes.figures import (
    error_curves,
    first_images,
    image_sheet,
    reconstruction_errors,
)
from mintnet_triton.recipes.objectives import Density
from mintnet_triton.recipes.recipe import read_experiment
from mintnet_triton.recipes.runs import RunError, RunFolder
from mintnet_triton.recipes.training import train
from mintnet_triton.scores import reconstruct
from mintnet_triton.solvers import FixedPoint, max_error
from mintnet_triton.verify import verify

SHEET_COLUMNS = 16


def run_demo(name: DataName, folder: Path) -> bool:
    """Train, verify, sample, reconstruct; leave pictures, model and report in a folder.

    Args:
        name: "digits" or "mnist5k".
        folder: made if need be; files of an earlier demo in it are overwritten.

    Returns:
        Whether the trained flow passed :func:`mintnet_triton.verify`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error}") from error
    experiment = read_experiment(name, "density")
    data, recipe = load_images(name), experiment.recipe
    objective = Density(data.levels, experiment.data["logit_lambda"])
    preprocess = objective.preprocess()
    flow = new_model(experiment)
    assert isinstance(flow, MintNet)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    print(f"{name}: {data.train.count()} training images, {parameters} parameters")

    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    train(flow, data, objective, recipe, run, {"preset": name, "model": flow.arguments})
    history = RunFolder(run).rows()
    evaluation = evaluate(flow, data.test, objective).summary()
    test_bpd = evaluation["bits_per_dim"]
    print(
        f"test bits per dimension: {test_bpd:.3f} over {evaluation['images']} images "
        f"({math.log2(data.levels):.3f} for uniform noise)"
    )

    images = first_images(data.test, 4 * SHEET_COLUMNS)
    rngs = [generator(recipe.seed, "evaluation", 0, index) for index in range(len(images))]
    x, _ = objective.logits(objective.inputs(images, rngs), next(flow.parameters()))
    report = verify(flow, x[:2])
    print(report)

    reconstruction = reconstruct(flow, x)
    noise = torch.Generator().manual_seed(recipe.seed)
    latents = torch.randn(4 * SHEET_COLUMNS, *flow.latent_shape, generator=noise)
    samples = invert(flow, latents, certify=True)
    # Algorithm 1 as the paper runs it, for comparison: far from the data it may fail.
    plain = invert(flow, latents, FixedPoint())
    for what, result in (
        ("reconstructions", reconstruction),
        ("samples", samples),
        ("samples by 100 plain iterations", plain),
    ):
        print(
            f"{what}: {int(result.converged.sum())} of {len(result.converged)} converged, worst "
            f"residual {float(result.residual.max()):.1e}"
        )
    assert samples.error_bound is not None
    print(f"samples are within {float(samples.error_bound.max()):.1e} of the exact inverse")
    drawn = preprocess.to_images(samples.x[samples.converged])
    columns = SHEET_COLUMNS
    sheet = image_sheet(
        {
            "test digits": images[:columns],
            "reconstructions from their latents": preprocess.to_images(reconstruction.x[:columns]),
            f"samples, {test_bpd:.2f} bits per dimension": drawn[:columns],
            "": drawn[columns : 2 * columns],
        },
        data.levels,
    )
    sheet.savefig(folder / "samples.png", dpi=150)
    curves = error_curves(reconstruction_errors(flow, x[:32], ALPHAS, ITERATIONS), ITERATIONS)
    curves.savefig(folder / "reconstruction_error.png", dpi=150)
    save(flow, folder / "flow.safetensors")
    summary = {
        "data": name,
        "parameters": parameters,
        "recipe": asdict(recipe),
        "train_bits_per_dim": history[-1]["bits_per_dim"],
        "test_bits_per_dim": test_bpd,
        "verified": report.ok,
        "reconstruction_error": float(max_error(reconstruction.x, x).max()),
        "reconstructions_converged": int(reconstruction.converged.sum()),
        "samples_converged": int(samples.converged.sum()),
        "samples_drawn": len(samples.converged),
        "samples_error_bound": float(samples.error_bound.max()),
        "samples_converged_by_plain_iterations": int(plain.converged.sum()),
    }
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"written to {folder.resolve()}:")
    for file in ("samples.png", "reconstruction_error.png", "flow.safetensors", "report.json"):
        print(f"  {file}")
    print(f"more pictures of this flow: python -m mintnet_triton figures {run}")
    return report.ok
