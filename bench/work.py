"""How much the kernels multiply, beside what the mask leaves: ``python -m bench.work``."""

from mintnet_triton.kernels import work
from mintnet_triton.kernels.gpu import configs
from mintnet_triton.kernels.gpu.launching import padded

#: colours, hidden units and side of an image at the scales of the CIFAR-10 and MNIST models
SCALES = [(3, 85, 32), (12, 21, 16), (48, 5, 8), (1, 45, 28), (4, 11, 14), (16, 2, 7)]


def table() -> str:
    """Multiply-adds of the schedule over the exact ones, in Markdown, for sm_90, channel order."""
    lines = [
        "| layer | operands | tile | conv1 | conv2 | conv3 | diagonal | conv2 without a mask |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for colours, units, side in SCALES:
        width = padded(colours * units)
        for operand in ("half", "ieee"):
            middle = configs.hidden_tile("sm_90", operand, colours, units, width)
            first = configs.hidden_tile("sm_90", operand, colours, units, colours)
            last = configs.output_tile("sm_90", operand, colours, side**2)
            ratios = [
                _ratio(units, 1, colours, 3, "channel", first),
                _ratio(units, units, colours, 3, "channel", middle),
                _ratio(1, units, colours, 3, "channel", last),
                _ratio(units, units, colours, 1, "own", middle),
                work.dense(units, units, colours, 3)
                / work.exact(units, units, colours, 3, "channel", "lower"),
            ]
            lines.append(
                f"| {colours}x{side}x{side} K{units} | {operand} "
                f"| {middle.block_m}x{middle.block_n}x{middle.block_k} | "
                + " | ".join(f"{ratio:.2f}" for ratio in ratios)
                + " |"
            )
    return "\n".join(lines)


def _ratio(
    units_out: int, units_in: int, colours: int, kernel: int, order: str, tile: configs.Tile
) -> float:
    """The worse of the two triangles."""
    return max(
        work.scheduled(*structure, tile.block_n, tile.block_k) / work.exact(*structure)
        for structure in (
            (units_out, units_in, colours, kernel, order, triangle)
            for triangle in ("lower", "upper")
        )
    )


if __name__ == "__main__":
    print(table())
