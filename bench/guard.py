"""``python -m bench.guard``: has anything become slower, as far as can be counted without a clock?

Every case has exact counts (see :mod:`.count.counting`), which ``tests/data/counted.json`` keeps. A
test fails if one of them has become worse, until the change is meant, and written by
``python -m bench.guard --write``. If one has become better it has to be written too, so that
nothing gained is lost unnoticed.

What compilers make of the Triton kernels (registers, spills, shared memory, instructions) is kept
likewise in ``tests/data/compiled.json``, by ``python -m tests.compiled --write``: ``test_compiles``
in ``tests/test_compile.py`` fails if anything of that changes, and if it is beyond some limits, it
fails even for what is written there.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

import mintnet_triton as mint
from bench.contest.cases import CIFAR10, MNIST, Scale, make_layer
from bench.count.counting import (
    Figures,
    Work,
    count_compiled,
    count_launches,
    count_operators,
    tiles_of,
)
from mintnet_triton.kernels import backend
from mintnet_triton.kernels.gpu import configs, inversion, masked_conv, mint_layer, wavefront
from mintnet_triton.kernels.reference import Structure
from mintnet_triton.ordering import Order

FILE = Path(__file__).parent.parent / "tests" / "data" / "counted.json"

#: the models' own scales: small enough, at these batches, for a CPU
SCALES = (*CIFAR10, *MNIST)
BATCH = 2

#: that of the paper; no kernel is run
LAUNCHED_BATCH = 32

#: figures that depend on the version of torch
OF_TORCH = {
    "calls", "bytes", "allocations", "allocated bytes", "peak bytes", "torch launches",
}  # fmt: skip

Cases = dict[str, Callable[[], Figures]]


def all_cases() -> Cases:
    """What is counted, by name: in plain PyTorch, as numba compiles it, and in Triton kernels."""
    return torch_cases() | compiled_cases() | kernel_cases()


def torch_cases() -> Cases:
    cases: Cases = {}
    for scale in SCALES:
        cases[f"torch, {scale}, forward"] = partial(forward, scale)
        cases[f"torch, {scale}, training step"] = partial(train, scale)
        cases[f"torch, {scale}, 3 iterations"] = partial(iterate, scale)
    for scale in CIFAR10:
        cases[f"torch, {scale}, forward, bfloat16"] = partial(forward, scale, half=True)
        cases[f"torch, {scale}, training step, bfloat16"] = partial(train, scale, half=True)
        cases[f"torch, {scale}, convolution"] = partial(convolve, scale, "channel")
        cases[f"torch, {scale}, convolution, training step"] = partial(
            convolve, scale, "channel", backward=True
        )
    first = CIFAR10[0]
    cases[f"torch, {first}, training step, recompute"] = partial(train, first, recompute=True)
    cases[f"torch, {first}, convolution in pixel order"] = partial(convolve, first, "pixel")
    cases["torch, small flow, log_prob"] = partial(flow, backward=False)
    cases["torch, small flow, training step"] = partial(flow, backward=True)
    return cases


def compiled_cases() -> Cases:
    """What runs on a CPU unless somebody chooses a backend."""
    cases: Cases = {}
    for scale in SCALES:
        name = f"compiled, {scale}"
        cases[f"{name}, forward"] = partial(forward, scale, count=count_by_default)
        cases[f"{name}, forward, frozen"] = partial(frozen, scale)
        step = partial(train, scale, count=count_by_default)
        cases[f"{name}, training step"] = step
        cases[f"{name}, training step, recompute"] = partial(step, recompute=True)
    return cases


def kernel_cases() -> Cases:
    """Architectures with the same tiles are one case."""
    cases: Cases = {}
    for operand in configs.OPERANDS:
        alike = defaultdict(list)
        for arch, table in configs.TABLES.items():
            alike[tuple(tile[:3] for tile in table[operand])].append(arch)
        for scale in SCALES:
            for archs in alike.values():
                name = f"kernels, {scale}, {operand}, {' '.join(archs)}"
                case = partial(launch, scale, operand, archs[0])
                cases[f"{name}, training step"] = partial(case, launch_training)
                cases[f"{name}, convolution"] = partial(case, launch_convolution)
                if operand in ("ieee", "float64"):  # an inversion is never rounded
                    cases[f"{name}, 1 iteration"] = partial(case, launch_iteration)
            if operand == "float64":  # its tiles are the same everywhere
                cases[f"kernels, {scale}, wavefront"] = partial(
                    launch, scale, operand, "generic", launch_wavefront
                )
    return cases


def inputs(scale: Scale, batch: int = BATCH) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, scale.channels, scale.size, scale.size)


def count_in_torch(work: Work) -> Figures:
    """What plain PyTorch does, whatever else is installed, and what the processor multiplies."""
    everything = patch.object(backend, "multiplies", lambda dtype: True)
    with mint.use_backend("torch"), everything:
        return count_operators(work)


def count_by_default(work: Work) -> Figures:
    """What a CPU does by default."""
    with mint.use_backend("auto"):
        return count_compiled(work)


def forward(
    scale: Scale, *, half: bool = False, count: Callable[[Work], Figures] = count_in_torch
) -> Figures:
    """A layer with its log-determinant."""
    x, layer = inputs(scale), make_layer(scale)

    @torch.no_grad()
    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            layer(x)

    return count(work)


def frozen(scale: Scale) -> Figures:
    """A layer whose weights do not change from call to call."""
    x, layer = inputs(scale), make_layer(scale)

    @torch.no_grad()
    def work() -> None:
        layer(x)

    with mint.frozen(layer):
        return count_by_default(work)


def train(
    scale: Scale,
    *,
    half: bool = False,
    recompute: bool = False,
    count: Callable[[Work], Figures] = count_in_torch,
) -> Figures:
    x, layer = inputs(scale).requires_grad_(), make_layer(scale, recompute=recompute)

    def work() -> None:
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y, log_det = layer(x)
        torch.autograd.backward((y, log_det), (torch.ones_like(y), torch.ones_like(log_det)))

    return count(work)


def iterate(scale: Scale) -> Figures:
    """Algorithm 1, too short to converge, so that rounding has no say."""
    z, layer = inputs(scale), make_layer(scale)
    solver = mint.FixedPoint(iterations=3, tolerance=0)

    @torch.no_grad()
    def work() -> None:
        layer.solve(z, solver, trace=False, reference=None)

    return count_in_torch(work)


def convolve(scale: Scale, order: Order, *, backward: bool = False) -> Figures:
    """The middle convolution of a layer, alone."""
    channels = scale.channels * scale.hidden
    conv = mint.MaskedConv2d(channels, channels, 3, colours=scale.channels, order=order)
    x = torch.randn(BATCH, channels, scale.size, scale.size, requires_grad=backward)

    def work() -> None:
        conv.zero_grad()
        x.grad = None
        with torch.set_grad_enabled(backward):
            y = conv(x)
        if backward:
            y.backward(torch.ones_like(y))

    return count_in_torch(work)


def flow(*, backward: bool) -> Figures:
    """A whole network with images of 8 x 8, three scales and six layers."""
    torch.manual_seed(0)
    model = mint.MintNet(3, 8, pairs=3, hidden=16, squeezes=2)
    images = torch.randint(0, 256, (BATCH, 3, 8, 8))
    x = torch.randn(BATCH, 3, 8, 8)

    def work() -> None:
        if backward:
            model.zero_grad()
            mint.bits_per_dim(model, images, levels=256, logit_lambda=0.05).mean().backward()
        else:
            with torch.no_grad():
                model.log_prob(x)

    return count_in_torch(work)


def launch(scale: Scale, operand: str, arch: str, work: Callable[[Scale, str], object]) -> Figures:
    """The launches of some work, with an architecture's tables."""
    with tiles_of(arch, operand):
        return count_launches(partial(work, scale, operand))


def dtype_of(operand: str) -> torch.dtype:
    return torch.float64 if operand == "float64" else torch.float32


STRUCTURE = Structure("channel", "lower", "elu")


def launch_training(scale: Scale, operand: str) -> None:
    dtype = dtype_of(operand)
    x = inputs(scale, LAUNCHED_BATCH).to(dtype).requires_grad_()
    weights = make_layer(scale).to(dtype).raw_weights()
    with torch.autocast("cpu", torch.bfloat16, enabled=operand == "half"):
        y, _, log_det = mint_layer.mint_forward(x, weights, STRUCTURE)
    torch.autograd.backward((y, log_det), (y.detach(), log_det.detach()))


def launch_convolution(scale: Scale, operand: str) -> None:
    channels, dtype = scale.channels * scale.hidden, dtype_of(operand)
    x = torch.zeros(LAUNCHED_BATCH, channels, scale.size, scale.size, dtype=dtype)
    weight = torch.zeros(channels, channels, 3, 3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=operand == "half"):
        masked_conv.masked_conv2d(x, weight, None, scale.channels, *STRUCTURE[:2])


@torch.no_grad()
def launch_iteration(scale: Scale, operand: str) -> None:
    """An iteration of Algorithm 1, and the evaluation that precedes it."""
    dtype = dtype_of(operand)
    z = inputs(scale, LAUNCHED_BATCH).to(dtype)
    weights = make_layer(scale).to(dtype).raw_weights()
    packed = mint_layer.packed(weights, dtype, "ieee", STRUCTURE)
    inversion.fixed_point(z, z, packed, weights, STRUCTURE, 1.0, 1, 1e-5)


@torch.no_grad()
def launch_wavefront(scale: Scale, operand: str) -> None:
    layer = make_layer(scale).to(dtype_of(operand))
    z = inputs(scale, LAUNCHED_BATCH).to(dtype_of(operand))
    weights = layer.effective_weights()
    wavefront.wavefront(z, weights, layer.activation, *STRUCTURE[:2])


class Difference(NamedTuple):
    """A figure that is not as committed; None where there is none."""

    case: str
    figure: str
    committed: int | None
    now: int | None

    @property
    def verdict(self) -> str:
        """One of "worse", "better", "new" or "gone"."""
        if self.committed is None:
            return "new"
        if self.now is None:
            return "gone"
        return "worse" if self.now > self.committed else "better"

    def __str__(self) -> str:
        change = ""
        if self.committed and self.now is not None:
            change = f"{self.now / self.committed - 1:+.2%}"
        numbers = ("" if one is None else f"{one:,}" for one in (self.committed, self.now))
        return "| " + " | ".join([self.verdict, self.case, self.figure, *numbers, change]) + " |"


def torch_version() -> str:
    """Without the part that tells builds of it apart."""
    return torch.__version__.partition("+")[0]


def committed() -> tuple[str, dict[str, Figures]]:
    """The version of torch that was counted with, and all figures."""
    report = json.loads(FILE.read_text())
    return report["torch"], report["cases"]


def write(cases: dict[str, Figures]) -> None:
    """JSON, one case a line."""
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in cases.items()
    )
    FILE.write_text(f'{{"torch": "{torch_version()}", "cases": {{\n{lines}\n}}}}\n')


def differences(now: dict[str, Figures], before: dict[str, Figures]) -> list[Difference]:
    """What differs, the worst kind first."""
    rows = []
    for case in before | now:
        old, new = before.get(case, {}), now.get(case, {})
        rows += [
            Difference(case, figure, old.get(figure), new.get(figure))
            for figure in old | new
            if old.get(figure) != new.get(figure)
        ]
    order = ("worse", "gone", "new", "better")
    return sorted(rows, key=lambda row: order.index(row.verdict))


def portable(cases: dict[str, Figures]) -> dict[str, Figures]:
    """Only the figures that no other version of torch changes."""
    return {
        case: {name: count for name, count in figures.items() if name not in OF_TORCH}
        for case, figures in cases.items()
    }


def table(rows: Sequence[Difference]) -> str:
    """In Markdown."""
    head = [
        "| | case | figure | committed | now | change |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *map(str, rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing is worse or gone, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} anew")
    options = parser.parse_args(arguments)
    now = {name: case() for name, case in all_cases().items()}
    if options.write:
        write(now)
        return 0
    version, before = committed()
    if version != torch_version():
        print(
            f"{FILE.name} is of torch {version}, and this is {torch_version()}: "
            f"{', '.join(sorted(OF_TORCH))} are not compared"
        )
        now, before = portable(now), portable(before)
    rows = differences(now, before)
    figures = sum(map(len, now.values()))
    if not rows:
        print(f"all {figures} figures of {len(now)} cases are as committed")
        return 0
    print(table(rows))
    verdicts = [row.verdict for row in rows]
    print(", ".join(f"{verdicts.count(kind)} {kind}" for kind in dict.fromkeys(verdicts)))
    print(f"of {figures} figures; if the change is meant: python -m bench.guard --write")
    return int("worse" in verdicts or "gone" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
