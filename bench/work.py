"""How long the kernels of a layer should take, predicted without a clock: ``python -m bench.work``.

The kernels are compiled for sm_90, and what they do is counted (:mod:`.count.launched`). A launch
takes as long as what it needs most of: products of the matrix unit, bytes from L2 or from memory,
or instructions issued. The last of its waves takes as long as the others. That is a prediction, and
no result: who has a GPU measures.

    python -m bench.work --scale 3x85x32 --operand half    # to standard output
    python -m bench.work --out bench/results               # all of it: work.md and work.json
"""

import argparse
import json
import math
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

import mintnet_triton as mint
from bench.contest.cases import CIFAR10, MNIST, Scale
from bench.count.launched import CORES, Cost, costs
from mintnet_triton.kernels.gpu import inversion, mint_layer
from mintnet_triton.kernels.reference import Structure

#: TFLOP/s, dense, of each kind of operands; float32 has no matrix unit
PEAK = {"half": 989.0, "tf32": 494.5, "ieee": 67.0}

#: TB/s from L2; warp instructions that a core issues in a second
L2, ISSUE = 5.5, 4 * 1.83e9

#: of a training step
BATCH = 32

#: what is committed: predictions of all scales
RESULTS, TABLES, COUNTED = Path(__file__).parent / "results", "work.md", "work.json"

#: of an inversion of the CIFAR-10 model: samples, layers of a scale, and iterations of each; two
#: in float32, for what float16 leaves is within reach of one update
SAMPLES, LAYERS, ITERATIONS = 64, 14, {"half": 18, "ieee": 2}


class Device(NamedTuple):
    """What tells the devices apart."""

    name: str
    memory: float  # TB/s


DEVICES = H100, H200 = Device("H100", 3.35), Device("H200", 4.8)


class Prediction(NamedTuple):
    """Of a launch."""

    microseconds: float
    bound: str
    of_peak: float  # exact flops a second over the most


def predict(cost: Cost, operand: str, device: Device) -> Prediction:
    """The largest of the times that each part of a device needs."""
    times = {
        "matrix": cost.flops / PEAK[operand] / 1e6,
        "L2": cost.l2 / L2 / 1e6,
        "memory": cost.memory / device.memory / 1e6,
        "issue": cost.instructions / (CORES * ISSUE) * 1e6,
    }
    bound = max(times, key=lambda name: times[name])
    time = times[bound] * math.ceil(cost.waves) / cost.waves
    return Prediction(time, bound, cost.exact / PEAK[operand] / 1e6 / time)


# What is launched.


@contextmanager
def using(operand: str) -> Iterator[None]:
    """Within the block, layers multiply such operands, in kernels."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if operand == "tf32" else "highest")
    half = torch.autocast("cpu", torch.bfloat16, enabled=operand == "half")
    try:
        with mint.use_backend("triton"), half:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def name_of(kernel: str, values: dict[str, Any]) -> str:
    """What a launch is for."""
    if kernel == "hidden":
        if values["own"] is None:
            return "first" if values["diagonal"].slopes is None else "middle"
        return "gradient by h1" if values["slopes"] is None else "gradient by h2"
    if kernel == "output":
        return "gradient by x" if values["shares"] is None else "last"
    if kernel == "weight_gradient":
        return "gradients by W1, W3" if values["slopes"] is None else "gradient by W2"
    return "pack transposed" if kernel == "pack" and values["TRANSPOSED"] else kernel


#: of a step, the launches of its forward pass
FORWARD = ("pack", "columns", "first", "middle", "last")


def step(scale: Scale, operand: str, wanted: str = "") -> list[Cost]:
    """Launches of a layer's training step, in their order, as many as are wanted by name."""
    layer = mint.MintLayer(scale.channels, scale.size, scale.hidden)
    x = torch.zeros(BATCH, scale.channels, scale.size, scale.size, requires_grad=True)
    with costs(name_of, wanted) as found, using(operand):
        y, log_det = layer(x)
        torch.autograd.backward((y, log_det), (torch.ones_like(y), torch.ones_like(log_det)))
    return list(found.values())


def iteration(scale: Scale, operand: str) -> list[Cost]:
    """Launches of an iteration of Algorithm 1, after those of what precedes it."""
    weights = mint.MintLayer(scale.channels, scale.size, scale.hidden).raw_weights()
    structure = Structure("channel", "lower", "elu")
    z = torch.zeros(SAMPLES, scale.channels, scale.size, scale.size)
    with costs(name_of) as found, using(operand), torch.no_grad():
        dtype = torch.float16 if operand == "half" else z.dtype
        packed = mint_layer.packed(weights, dtype, "ieee", structure)
        inversion.fixed_point(z, z, packed, weights, structure, 1.0, 1, 1e-5)
    return list(found.values())


class Counted(NamedTuple):
    """Launches of one kind of work."""

    work: str  # "step" or "iteration"
    scale: Scale
    operand: str
    launches: list[Cost]


def count(work: str, scale: Scale, operand: str) -> Counted:
    torch.set_num_threads(1)
    launches = step(scale, operand) if work == "step" else iteration(scale, operand)
    return Counted(work, scale, operand, launches)


def count_all(scales: Sequence[Scale], operands: Sequence[str]) -> list[Counted]:
    """Steps of all of them, and of the scales of CIFAR-10 the iterations; by all cores."""
    jobs = [("step", *one) for one in product(scales, operands)]
    jobs += [
        ("iteration", *one)
        for one in product(scales, operands)
        if one[0] in CIFAR10 and one[1] in ITERATIONS
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(count, *job) for job in jobs]]


# What is written.


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def launch_row(counted: Counted, cost: Cost) -> list[object]:
    on = [predict(cost, counted.operand, device) for device in DEVICES]
    return [
        counted.scale, counted.operand, cost.kernel, f"{cost.exact / 1e9:.2f}",
        f"{cost.flops / 1e9:.2f}", f"{cost.l2 / 1e6:.1f}", f"{cost.memory / 1e6:.1f}",
        f"{cost.instructions / 1e6:.2f}", cost.in_loops or "", cost.registers, cost.resident,
        f"{cost.waves:.2f}",
        *(
            text
            for one in on
            for text in (f"{one.microseconds:.1f}", one.bound, f"{one.of_peak:.0%}")
        ),
    ]  # fmt: skip


def microseconds(counted: Counted, device: Device, names: Container[str] | None = None) -> float:
    """Of launches one after the other, all of them or some."""
    return sum(
        predict(cost, counted.operand, device).microseconds
        for cost in counted.launches
        if names is None or cost.kernel in names
    )


def step_row(counted: Counted) -> list[object]:
    row: list[object] = [counted.scale, counted.operand]
    for device in DEVICES:
        forward, both = (microseconds(counted, device, names) for names in (FORWARD, None))
        row += [f"{forward:.0f}", f"{both - forward:.0f}", f"{both:.0f}"]
    return row


class Target(NamedTuple):
    """On an H100."""

    what: str
    figure: float
    most: float


def targets(all_counted: Sequence[Counted]) -> list[Target]:
    """As many as have been counted."""
    found = {one[:3]: one for one in all_counted}
    rows: list[Target] = []
    first = found.get(("step", CIFAR10[0], "half"))
    if first:
        launches = {cost.kernel: cost for cost in first.launches}
        middle = launches["middle"]
        rows += [
            Target("middle, MB from L2", middle.l2 / 1e6, 300),
            Target("middle, instructions of loops for each m64n128k16", middle.in_loops, 25),
            *(
                Target(f"{name}, us", predict(launches[name], "half", H100).microseconds, most)
                for name, most in (("middle", 55), ("gradient by h1", 55), ("gradient by W2", 70))
            ),
            Target("step, us", microseconds(first, H100), 350),
        ]
    iterations = [
        (times, found[key])
        for (operand, times), scale in product(ITERATIONS.items(), CIFAR10)
        if (key := ("iteration", scale, operand)) in found
    ]
    if len(iterations) == len(CIFAR10) * len(ITERATIONS):
        time = sum(
            LAYERS * (microseconds(one, H100) + (times - 1) * microseconds(one, H100, FORWARD[1:]))
            for times, one in iterations
        )
        rows.append(Target(f"inversion of {SAMPLES} samples, ms", time / 1e3, 100))
    return rows


def report(all_counted: Sequence[Counted]) -> str:
    """Of Markdown: targets, steps, launches."""
    steps = [one for one in all_counted if one.work == "step"]
    devices = [device.name for device in DEVICES]
    return "\n".join(
        [
            "Predictions for GPUs, made without one: see `bench/work.py`. Times are microseconds.",
            "",
            f"Aims at the first scale of CIFAR-10 in bfloat16, batch {BATCH}, on an H100:",
            "",
            *table(
                ("what", "predicted", "at most"),
                ((one.what, f"{one.figure:.1f}", one.most) for one in targets(all_counted)),
            ),
            "",
            f"A layer's training step, batch {BATCH}:",
            "",
            *table(
                (
                    "layer", "operands",
                    *(
                        f"{name} {part}"
                        for name in devices
                        for part in ("forward", "backward", "step")
                    ),
                ),
                map(step_row, steps),
            ),
            "",
            "Launches:",
            "",
            *table(
                (
                    "layer", "operands", "launch", "exact GFLOP", "executed", "MB from L2",
                    "from memory", "instructions, millions", "in loops", "registers",
                    "blocks a core", "waves",
                    *(text for name in devices for text in (name, "bound", "of peak")),
                ),
                (launch_row(one, cost) for one in steps for cost in one.launches),
            ),
            "",
        ]
    )  # fmt: skip


def as_json(all_counted: Sequence[Counted]) -> str:
    """What has been counted, a launch a line."""
    lines = [
        json.dumps({"work": one.work, "scale": one.scale, "operand": one.operand} | cost._asdict())
        for one in all_counted
        for cost in one.launches
    ]
    text = ",\n".join(lines)
    return f'{{"triton": "{triton.__version__}", "launches": [\n{text}\n]}}\n'


def from_json(text: str) -> tuple[str, list[Counted]]:
    """The version of Triton, and what has been counted with it."""
    content = json.loads(text)
    found: dict[tuple[str, Scale, str], list[Cost]] = {}
    for line in content["launches"]:
        key = line.pop("work"), Scale(*line.pop("scale")), line.pop("operand")
        found.setdefault(key, []).append(Cost(**line | {"grid": tuple(line["grid"])}))
    return content["triton"], [Counted(*key, launches) for key, launches in found.items()]


def read_scale(text: str) -> Scale:
    """ "3x85x32": colours, hidden units of each, side of the image."""
    return Scale(*map(int, text.split("x")))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", nargs="+", type=read_scale, default=[*CIFAR10, *MNIST],
                        help="colours x hidden units x side of an image, as 3x85x32")  # fmt: skip
    parser.add_argument("--operand", nargs="+", choices=PEAK, default=list(PEAK))
    parser.add_argument("--out", type=Path, help="a folder for work.md and work.json")
    options = parser.parse_args(arguments)
    counted = count_all(options.scale, options.operand)
    if options.out is None:
        print(report(counted))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / TABLES).write_text(report(counted))
    (options.out / COUNTED).write_text(as_json(counted))


if __name__ == "__main__":
    main()
