"""The main job end to end: train on real digits, verify, sample, invert, and draw."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch

from mintnet_triton.checkpoint import save
from mintnet_triton.flow import MintNet
from mintnet_triton.images import ImagePreprocess
from mintnet_triton.inverse import invert
from mintnet_triton.recipes.data import DataName, load_images
from mintnet_triton.recipes.figures import error_curves, image_sheet, reconstruction_errors
from mintnet_triton.recipes.training import DensityRecipe, evaluate_density, train_density
from mintnet_triton.solvers import FixedPoint, max_error
from mintnet_triton.verify import verify

SHEET_COLUMNS = 16
ALPHAS = [1.0, 0.5, 1 / 3.5]  # the last is the authors' for MNIST
ITERATIONS = [1, 2, 3, 5, 8, 12, 20, 30, 50, 80]


def demo_flow(name: DataName, side: int) -> MintNet:
    """A small flow for a data set, with the constructor's arguments spelled out."""
    if name == "digits":
        return MintNet(channels=1, image_size=side, pairs=4, hidden=32, squeezes=1)
    return MintNet(channels=1, image_size=side, pairs=3, hidden=16, squeezes=2)


def demo_recipe(name: DataName, levels: int) -> DensityRecipe:
    """How the demo trains that flow."""
    steps, logit_lambda = (800, 0.01) if name == "digits" else (600, 1e-6)
    return DensityRecipe(
        steps=steps, batch_size=64, learning_rate=2e-3, levels=levels, logit_lambda=logit_lambda
    )


def run_demo(name: DataName, folder: Path) -> bool:
    """Train, verify, sample, reconstruct; leave pictures, model and report in a folder.

    Args:
        name: "digits" or "mnist5k".
        folder: made if need be; files of an earlier demo in it are overwritten.

    Returns:
        Whether the trained flow passed :func:`mintnet_triton.verify`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = load_images(name)
    recipe = demo_recipe(name, data.levels)
    torch.manual_seed(recipe.seed)
    flow = demo_flow(name, data.train.shape[-1])
    preprocess = ImagePreprocess(recipe.levels, recipe.logit_lambda)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    print(f"{name}: {len(data.train)} training images, {parameters} parameters")

    history = train_density(flow, data.train, recipe)
    test_bpd = evaluate_density(flow, data.test, recipe)
    print(
        f"test bits per dimension: {float(test_bpd.mean()):.3f} over {len(test_bpd)} images "
        f"({math.log2(data.levels):.3f} for uniform noise)"
    )

    generator = torch.Generator().manual_seed(recipe.seed)
    x, _ = preprocess(data.test[: 4 * SHEET_COLUMNS], generator)
    report = verify(flow, x[:2])
    print(report)

    with torch.no_grad():
        z, _ = flow(x)
    reconstruction = invert(flow, z)
    latents = torch.randn(4 * SHEET_COLUMNS, *flow.latent_shape, generator=generator)
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
            "test digits": data.test[:columns],
            "reconstructions from their latents": preprocess.to_images(reconstruction.x[:columns]),
            f"samples, {float(test_bpd.mean()):.2f} bits per dimension": drawn[:columns],
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
        "train_bits_per_dim": sum(history[-50:]) / len(history[-50:]),
        "test_bits_per_dim": float(test_bpd.mean()),
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
    return report.ok
