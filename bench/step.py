"""``python -m bench.step``: one training step of a whole model, with its peak of memory.

The literal model takes a minute a step at the paper's batch, and several gigabytes, so this is no
part of a run. Each rival has a process of its own, for the sake of the peak; the processes take
turns. Before it is timed, a step is compared with the others': log-density and every gradient.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mintnet_triton as mint
from bench.contest.cases import random_flow, relative_rms
from bench.contest.naive import literally
from bench.measure import machine
from bench.measure.memory import ENVIRONMENT
from bench.measure.timing import peak_memory, ratio, spread
from bench.show.result import write

#: "recomputed" keeps no hidden layers for the backward pass
RIVALS = ("naive", "ours", "ours, recomputed")
#: gradients of rivals may differ so much: rounding, magnified by many layers
TOLERANCE = 1e-2


def measure(rival: str, preset: str | None, batch: int, gradients: Path) -> dict[str, Any]:
    """Seconds of the second step, and MiB that it has taken at most; in a fresh process."""
    torch.manual_seed(0)
    flow: Any = random_flow(preset)
    if rival == "naive":
        flow = literally(flow)
    for layer in flow.modules():
        if isinstance(layer, mint.MintLayer):
            layer.recompute = rival == "ours, recomputed"
    x = torch.randn(batch, *flow.image_shape)

    seconds: list[float] = []

    def step() -> None:
        flow.zero_grad()
        start = time.perf_counter()
        (-flow.log_prob(x).mean()).backward()
        seconds.append(time.perf_counter() - start)

    peak = peak_memory(step, torch.device("cpu"))
    found = torch.cat([parameter.grad.flatten() for parameter in flow.parameters()])
    torch.save(found, gradients)
    return {"seconds": seconds[-1], "MiB": peak}


def run(preset: str | None, batch: int, rounds: int, out: Path) -> dict[str, Any]:
    """Every rival once a round, and what became of it.

    Raises:
        ArithmeticError: gradients differ.
    """
    result: dict[str, Any] = {
        "machine": machine.describe(torch.device("cpu")),
        "preset": preset,
        "batch": batch,
        "rivals": {rival: {"seconds": [], "MiB": []} for rival in RIVALS},
    }
    expected = torch.empty(0)
    for rival in tqdm(RIVALS * rounds):
        file = out / f"{rival}.part"
        command = [sys.executable, "-m", "bench.step", "--preset", str(preset)]
        command += ["--batch", str(batch), "--rival", rival, "--gradients", str(file)]
        done = subprocess.run(
            command, cwd=machine.ROOT, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE,
            text=True, check=True,
        )  # fmt: skip
        for name, value in json.loads(done.stdout).items():
            result["rivals"][rival][name].append(value)
        found = torch.load(file)
        expected = found if rival == RIVALS[0] else expected
        file.unlink()
        error = relative_rms(found, expected)
        if not error < TOLERANCE:
            raise ArithmeticError(f"{rival}: gradients have a relative error of {error:.1e}")
        result["rivals"][rival]["error"] = error
    write(out / "step.json", result)
    return result


def table(result: dict[str, Any]) -> str:
    """Speeds and memory against the literal model, in Markdown."""
    rivals = result["rivals"]
    naive = rivals[RIVALS[0]]
    rows = []
    for rival, found in rivals.items():
        speed = ratio(naive["seconds"], found["seconds"]).median
        row = f"| {rival} | {speed:.1f}x |"
        if None not in found["MiB"]:  # where the system tells
            memory = spread(found["MiB"]).median
            row += f" {memory:.0f} | {spread(naive['MiB']).median / memory:.1f}x less |"
        rows.append(row)
    heads = ["| training step | speed | peak memory, MiB | of the literal model's |"]
    return "\n".join([*heads, "| --- | --- | --- | --- |", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--preset", default="cifar10", help="of a model of the paper")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of step.json")
    # The processes that this one starts:
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    preset = None if options.preset == "None" else options.preset
    if options.rival:
        print(json.dumps(measure(options.rival, preset, options.batch, options.gradients)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    print(table(run(preset, options.batch, options.rounds, options.out)))
    print(f"written to {(options.out / 'step.json').resolve()}")


if __name__ == "__main__":
    main()
