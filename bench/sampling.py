"""Sampling, every solver beside the paper's: ``python -m bench.sampling [--out DIR]``.

Three networks are inverted: the paper's MNIST and CIFAR-10 models with random weights far from the
identity, for speed, and a trained one, whose samples defeat plain iterations, for convergence. The
paper's inversion, Algorithm 1 with T = 100 on the literal layer, takes so long that its first
iterations are timed, each layer's, and the time of all is extrapolated.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mintnet_triton as mint
from bench.cases import PAPER_ITERATIONS, random_flow, time_paper
from mintnet_triton.solvers import max_error

DATA = Path(__file__).parents[1] / "tests" / "data"

#: measurements of the speed
PAIRS = 5
#: of the curves
ITERATIONS = (1, 2, 4, 8, 16, 32, 64, 100)
#: a layer of the trained network at which Algorithm 1 falls into a cycle
HARD_LAYER = "layers.4.0"

SOLVERS: dict[str, mint.Solver] = {
    "Auto": mint.Auto(),
    "FixedPoint(alpha=1), T = 100": mint.FixedPoint(),
    "FixedPoint(alpha=1, safeguard), T = 100": mint.FixedPoint(safeguard=True),
    "FixedPoint(alpha=1/3.5), T = 100": mint.FixedPoint(alpha=1 / 3.5),
}
CURVES: dict[str, Callable[[int], mint.Solver]] = {
    "α = 1": lambda count: mint.FixedPoint(1.0, count, tolerance=0),
    "α = 1/3.5": lambda count: mint.FixedPoint(1 / 3.5, count, tolerance=0),
    "α = 1, safeguard": lambda count: mint.FixedPoint(1.0, count, tolerance=0, safeguard=True),
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def paper_seconds(flow: mint.MintNet, samples: int) -> float:
    """What the paper's inversion takes."""
    return time_paper(flow, samples, lambda work: min(timed(work)[0] for _ in range(2)))


def facts(result: mint.InversionResult) -> dict[str, Any]:
    """What a row of the table says of a result; a residual that is not finite is None."""
    worst = float(result.layer_residuals.max())
    return {
        "worst_residual": worst if math.isfinite(worst) else None,
        "not_converged": int((~result.converged).sum()),
        "samples": len(result.converged),
    }


def measure_speed(preset: str, samples: int) -> dict[str, Any]:
    """Sampling from a model of the paper, against the paper's way."""
    flow = random_flow(preset)
    z = torch.randn(samples, *flow.latent_shape)
    result = mint.invert(flow, z)  # compiles, too
    # Pair by pair, for the machine may be busier at one time than at another.
    pairs = [
        (timed(lambda: mint.invert(flow, z))[0], paper_seconds(flow, samples)) for _ in range(PAIRS)
    ]
    return {
        "seconds": [ours for ours, _ in pairs],
        "paper_seconds": [paper for _, paper in pairs],
        "speed": statistics.median(paper / ours for ours, paper in pairs),
        **facts(result),
    }


def trained() -> tuple[mint.MintNet, Tensor]:
    """The trained network, and latents that its second half has drawn from a normal density."""
    flow = mint.load_authors_checkpoint(DATA / "mnist5k_checkpoint.pth")
    assert isinstance(flow, mint.MintNet)
    with np.load(DATA / "mnist5k_expected.npz") as arrays:
        z = torch.from_numpy(arrays["prior_z"]).float().view(-1, *flow.latent_shape)
    return flow, z


def measure_solvers(flow: mint.MintNet, z: Tensor) -> dict[str, Any]:
    """Every solver on the trained network, in float32."""
    rows: dict[str, Any] = {}
    # It iterates to the end, and the layer's implementation does not matter for what comes of it.
    paper = facts(mint.invert(flow, z, mint.FixedPoint(1 / 3.5, PAPER_ITERATIONS)))
    rows["the paper's: α = 1/3.5, T = 100, literal layer"] = {
        "seconds": paper_seconds(flow, len(z)),
        **paper,
    }
    for name, solver in SOLVERS.items():
        runs = [timed(lambda: mint.invert(flow, z, solver)) for _ in range(3)]  # noqa: B023
        seconds = statistics.median(seconds for seconds, _ in runs)
        rows[name] = {"seconds": seconds, **facts(runs[0][1])}
    return rows


def measure_curves(module: mint.Invertible, z: Tensor) -> dict[str, Any]:
    """Reconstruction error against iterations and time; the truth is the inverse in float64."""
    truth = mint.invert(copy.deepcopy(module).double(), z.double()).x
    curves: dict[str, Any] = {}
    for name, solver_of in CURVES.items():
        points = []
        for count in ITERATIONS:
            seconds, result = timed(lambda: mint.invert(module, z, solver_of(count)))  # noqa: B023
            errors = max_error(result.x.double(), truth)
            points.append({"iterations": count, "seconds": seconds, "errors": errors.tolist()})
        curves[name] = points
    seconds, result = timed(lambda: mint.invert(module, z))
    errors = max_error(result.x.double(), truth)
    curves["Auto"] = [{"iterations": None, "seconds": seconds, "errors": errors.tolist()}]
    return curves


def run(quick: bool) -> dict[str, Any]:
    """Everything, as it is written to the file."""
    flow, z = trained()
    z = z[:2] if quick else z
    # What the hard layer is given when the network is inverted.
    names = [name for name, _ in flow.stages()]
    after = [stage for _, stage in flow.stages()][names.index(HARD_LAYER) + 1 :]
    target = z
    for stage in reversed(after):
        target = mint.invert(stage, target).x
    hard = dict(flow.stages())[HARD_LAYER]
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": version("numba"),
        },
        "speed": {}
        if quick
        else {
            "MNIST model, 64 samples": measure_speed("mnist", 64),
            "CIFAR-10 model, 4 samples": measure_speed("cifar10", 4),
        },
        "solvers": measure_solvers(flow, z),
        "curves": {
            "one layer": measure_curves(hard, target),
            "whole network": measure_curves(flow, z),
        },
    }


def table(results: dict[str, Any]) -> str:
    """Times relative to the paper's way, and what became of the samples, in Markdown."""
    lines = ["| network | speed against the paper's inversion | worst residual | not converged |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    for name, row in results["speed"].items():
        lines.append(f"| {name} | {row['speed']:.0f}x | {_residual(row)} | {_failed(row)} |")
    rows = results["solvers"]
    naive = next(iter(rows.values()))["seconds"]
    lines += ["", "| solver, on a trained network | time, of the paper's | worst residual "
              "| not converged |", "| --- | --- | --- | --- |"]  # fmt: skip
    lines += [
        f"| {name} | {row['seconds'] / naive:.3f} | {_residual(row)} | {_failed(row)} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def _residual(row: dict[str, Any]) -> str:
    worst = row["worst_residual"]
    return "not finite" if worst is None else f"{worst:.0e}"


def _failed(row: dict[str, Any]) -> str:
    return f"{row['not_converged']} of {row['samples']}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sampling", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of sampling.json")
    parser.add_argument("--quick", action="store_true", help="two samples, to try this script")
    options = parser.parse_args()
    results = run(options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sampling.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    print(f"written to {path.resolve()}")


if __name__ == "__main__":
    main()
