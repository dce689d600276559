"""How fast and how surely every solver samples from a trained network.

Its samples defeat plain iterations; networks of random weights, which are timed as all other cases
are, do not show that.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mintnet_triton as mint
from bench.measure.race import layer_by_layer, times_of
from bench.measure.timing import Clock, Work, spread
from mintnet_triton.solvers import max_error

DATA = Path(__file__).parents[2] / "tests" / "data"

#: of the curves
ITERATIONS = (1, 2, 4, 8, 16, 32, 64, 100)
#: a layer of the trained network at which Algorithm 1 falls into a cycle
HARD_LAYER = "layers.4.0"

PAPER = "the paper's: α = 1/3.5, T = 100, literal layer"
SAME_AS_PAPER = "FixedPoint(alpha=1/3.5), T = 100"
SOLVERS: dict[str, mint.Solver] = {
    "Auto()": mint.Auto(),
    "FixedPoint(), T = 100": mint.FixedPoint(),
    "FixedPoint(safeguard=True), T = 100": mint.FixedPoint(safeguard=True),
    SAME_AS_PAPER: mint.FixedPoint(alpha=1 / 3.5),
}
CURVES: dict[str, Callable[[int], mint.Solver]] = {
    "α = 1": lambda count: mint.FixedPoint(1.0, count, tolerance=0),
    "α = 1/3.5": lambda count: mint.FixedPoint(1 / 3.5, count, tolerance=0),
    "α = 1, safeguard": lambda count: mint.FixedPoint(1.0, count, tolerance=0, safeguard=True),
}


def trained(device: torch.device, samples: int) -> tuple[mint.MintNet, Tensor]:
    """The trained network, and latents that its second half has drawn from a normal density."""
    flow = mint.load_authors_checkpoint(DATA / "mnist5k_checkpoint.pth")
    assert isinstance(flow, mint.MintNet)
    with np.load(DATA / "mnist5k_expected.npz") as arrays:
        z = torch.from_numpy(arrays["prior_z"]).float().view(-1, *flow.latent_shape)
    return flow.to(device), z[:samples].to(device)


def facts(result: mint.InversionResult) -> dict[str, Any]:
    """What a row of the table says of a result; a residual that is not finite is None."""
    worst = float(result.layer_residuals.max())
    return {
        "worst residual": worst if math.isfinite(worst) else None,
        "not converged": int((~result.converged).sum()),
        "samples": len(result.converged),
    }


def measure_solvers(samples: int, clock: Clock) -> dict[str, Any]:
    """Every solver on the trained network, in float32: times by round, and what came of it.

    The paper's iterates to the end, and the layer's implementation does not matter for what comes
    of it: the library does that, and the literal layer is timed.
    """
    flow, z = trained(clock.device, samples)
    found = {name: facts(mint.invert(flow, z, solver)) for name, solver in SOLVERS.items()}
    rows = {PAPER: dict(found[SAME_AS_PAPER]), **found}
    paper = layer_by_layer(flow, "paper", len(z), clock.device)
    paper.check()
    works = {name: _inversion(flow, z, solver) for name, solver in SOLVERS.items()}
    few = Clock(clock.device, seconds=clock.seconds, rounds=(3, clock.rounds[1]))
    times = few.race(works) | times_of({PAPER: paper}, few)
    for name, row in rows.items():
        row["ms"] = times[name]
    return {"solvers": rows}


def measure_curves(layer: bool, samples: int, clock: Clock) -> dict[str, Any]:
    """Reconstruction error against iterations and time; the truth is the inverse in float64.

    Args:
        layer: of the hard layer alone, given what it is given when the network is inverted.
    """
    flow, z = trained(clock.device, samples)
    module: mint.Invertible = flow
    if layer:
        stages = dict(flow.stages())
        after = list(stages).index(HARD_LAYER) + 1
        for stage in reversed(list(stages.values())[after:]):
            z = mint.invert(stage, z).x
        module = stages[HARD_LAYER]
    truth = mint.invert(copy.deepcopy(module).double(), z.double()).x
    once = Clock(clock.device, once=True)  # there are many points, on axes of powers of ten
    curves: dict[str, Any] = {}
    solvers: dict[str, list[tuple[int | None, mint.Solver]]] = {
        name: [(count, solver_of(count)) for count in ITERATIONS]
        for name, solver_of in CURVES.items()
    }
    for name, points in (solvers | {"Auto": [(None, mint.Auto())]}).items():
        mint.invert(module, z, points[0][1])  # to warm up
        curves[name] = []
        for count, solver in points:
            found: list[mint.InversionResult] = []
            seconds = once(lambda: found.append(mint.invert(module, z, solver))) / 1e3  # noqa: B023
            errors = max_error(found[0].x.double(), truth).tolist()
            curves[name].append({"iterations": count, "seconds": seconds, "errors": errors})
    return {"curves": curves, "paper seconds": _paper_seconds(module, len(z), clock)}


def _paper_seconds(module: nn.Module, samples: int, clock: Clock) -> float:
    contender = layer_by_layer(module, "paper", samples, clock.device)
    return spread(times_of({PAPER: contender}, clock)[PAPER]).median / 1e3


def _inversion(module: mint.Invertible, z: Tensor, solver: mint.Solver) -> Work:
    return lambda: mint.invert(module, z, solver)
