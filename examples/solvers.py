"""Which solver for which layer? Errors against iterations: ``python -m examples.solvers``.

On an easy layer, Algorithm 1 needs a few iterations; on steeper ones many, or more than there are,
and brackets that keep it from cycling do not make it fast. The wavefront takes the variables in
their order, and has no iterations to count: its error is a level, in ``out/solvers.png``.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import mintnet_triton as mint

SOLVERS = {
    "α = 1": mint.FixedPoint(1.0),
    "α = 1/3.5": mint.FixedPoint(1 / 3.5),
    "α = 1, safeguarded": mint.FixedPoint(1.0, safeguard=True),
}


def layer(steepness: float, size: int) -> mint.MintLayer:
    made = mint.MintLayer(1, size, hidden=8).double()
    for conv in (made.conv1, made.conv2, made.conv3):
        nn.init.normal_(conv.weight, std=steepness)
    return made


def main(size: int = 12, out: Path = Path("out/solvers.png")) -> dict[str, list[int]]:
    """Draw, and return how many of 16 samples each solver has solved: easy, harder, steep."""
    torch.manual_seed(0)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    solved: dict[str, list[int]] = {name: [] for name in (*SOLVERS, "wavefront")}
    for axis, steepness in zip(axes, (0.05, 0.4, 1.0), strict=True):
        hard, x = layer(steepness, size), torch.randn(16, 1, size, size, dtype=torch.float64)
        with torch.no_grad():
            z, _ = hard(x)
        for name, solver in SOLVERS.items():
            result = mint.invert(hard, z, solver, trace=True, reference=x)
            assert result.error_trace is not None
            axis.semilogy(result.error_trace[0].median(1).values.clamp(min=1e-17), label=name)
            solved[name].append(int(result.converged.sum()))
        exact = mint.invert(hard, z, mint.Wavefront())
        error = (exact.x - x).abs().flatten(1).amax(1).median()
        axis.axhline(max(float(error), 1e-17), color="grey", label="wavefront")
        axis.set(title=f"weights of {steepness}", xlabel="iterations", ylim=(1e-17, 1e6))
        solved["wavefront"].append(int(exact.converged.sum()))
    axes[0].set_ylabel("median error of x")
    axes[-1].legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print("\n".join(f"{name:20} {counts} of 16 samples solved" for name, counts in solved.items()))
    return solved


if __name__ == "__main__":
    main()
