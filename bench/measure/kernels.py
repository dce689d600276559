"""Inside the kernels of a layer, on a GPU: where a step spends its time, and other tiles."""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest.cases import (
    BFLOAT16,
    CIFAR10,
    FLOAT16,
    FLOAT32,
    MNIST,
    TF32,
    TINY,
    Case,
    Mode,
    Scale,
    gate,
)
from bench.contest.rivals import RIVALS
from bench.measure.ceilings import flops_of
from bench.measure.race import Problem, Result, Subject, precision_of
from bench.measure.timing import Clock, Work, spread
from mintnet_triton import MaskedConv2d
from mintnet_triton.kernels.gpu import configs, launching, masked_conv

#: tiles that the middle kernel is timed with, on top of those that the library itself tries
MORE_TILES = tuple(
    configs.Tile(*numbers)
    for numbers in (
        (128, 64, 64, 4, 3),
        (64, 64, 64, 4, 4),
        (256, 64, 32, 8, 3),
        (64, 32, 32, 4, 4),
        (128, 32, 16, 4, 4),
    )
)


#: the kernels of a training step, in the order of their launches
STEP = (
    ("pack_kernel", "weights"),
    ("columns_kernel", "x"),
    ("hidden_kernel", "first"),
    ("hidden_kernel", "middle"),
    ("output_kernel", "output"),
    ("pack_kernel", "weights, transposed"),
    ("upstream_kernel", "upstream"),
    ("hidden_kernel", "gradient by a2"),
    ("hidden_kernel", "gradient by a1"),
    ("output_kernel", "gradient by x"),
    ("weight_gradient_kernel", "gradient by W2"),
    ("weight_gradient_kernel", "gradients by W1, W3"),
    ("finish_kernel", "gradients by parameters"),
)


def step_of(scale: Scale, batch: int, mode: Mode, device: torch.device) -> tuple[Problem, Subject]:
    """A layer and our training step at it."""
    case = Case("kernels", "layer", mode, batch, ("training",), ("ours",), scale=scale)
    problem = Problem(case, device)
    return problem, Subject(problem, RIVALS["ours"])


def measure_kernels(
    scale: Scale, batch: int, mode: Mode, device: torch.device, clock: Clock
) -> Result:
    """Where the time of our training step goes: by kernel, in microseconds, and by operation."""
    with precision_of(mode):
        problem, subject = step_of(scale, batch, mode, device)
        found = gate(mode, subject.training(), problem.expected_training)
        profiled = {} if clock.once else profile(subject)
        return {"profile": profiled, "operations": time_operations(subject, clock), **found}


def profile(subject: Subject, steps: int = 5) -> Result:
    """Median time of each kernel over some steps; all that is not ours under "rest"."""
    device = subject.problem.device.type
    if device == "cpu":
        steps = 1
    else:
        subject.training()
    activity = getattr(torch.profiler.ProfilerActivity, device.upper())
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            subject.training()
        if device == "cuda":
            torch.cuda.synchronize()
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    names = {name for name, _ in STEP}
    own = [event for event in events if event.name in names]
    found: Result = {}
    if [event.name for event in own] == [name for name, _ in STEP] * steps:
        for index, (_, label) in enumerate(STEP):
            times = [event.time_range.elapsed_us() for event in own[index :: len(STEP)]]
            found[label] = statistics.median(times)
    else:
        for event in own:
            found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / steps
    rest: dict[str, float] = {}
    for event in events:
        if event.name not in names:
            rest[event.name] = rest.get(event.name, 0.0) + event.time_range.elapsed_us() / steps
    largest = sorted(rest, key=lambda name: -rest[name])[:8]
    found["rest"] = sum(rest.values())
    found["of the rest"] = {name[:100]: rest[name] for name in largest}
    return found


def launches_of(work: Work) -> list[tuple[str, Work]]:
    """The launches of some work, each with the name of its kernel, to be done again one by one.

    None of them reads what it writes, so that each does the same again.
    """
    found: list[tuple[str, Work]] = []
    launch = launching.launch

    def note(kernel: Any, *arguments: Any, **constants: Any) -> None:
        found.append((kernel.fn.__name__, partial(launch, kernel, *arguments, **constants)))
        launch(kernel, *arguments, **constants)

    with mock.patch.object(launching, "launch", note):
        work()
    return found


def launches_of_step(subject: Subject) -> dict[str, Work]:
    """Those of a training step, by what they compute."""
    found = launches_of(subject.training)
    assert [name for name, _ in found] == [name for name, _ in STEP]
    return {label: launch for (_, label), (_, launch) in zip(STEP, found, strict=True)}


def time_operations(subject: Subject, clock: Clock) -> Result:
    """Times of the launches of a step, and of the whole with all that surrounds it, in ms."""
    launches = launches_of_step(subject)
    times = {name: clock(launch, cold=True) for name, launch in launches.items()}
    whole = {"forward": subject.forward, "step": subject.training}
    return times | {name: clock(work, cold=True) for name, work in whole.items()}


def measure_tile(
    scale: Scale,
    batch: int,
    mode: Mode,
    tile: configs.Tile | None,
    device: torch.device,
    clock: Clock,
) -> Result:
    """The middle kernel with another tile; None is the library's own choice."""
    arch, operand = configs.architecture(device), configs.operand(mode.dtype, mode.kernels)
    shape = (arch, operand, scale.channels, scale.hidden)
    with precision_of(mode), configs.using(*shape, tile) if tile else nullcontext():
        problem, subject = step_of(scale, batch, mode, device)
        middle = launches_of_step(subject)["middle"]
        gate(mode, subject.forward(), problem.expected_forward)
    assert isinstance(middle, partial)
    constants = middle.keywords
    used = [*constants["BLOCKS"], constants["num_warps"], constants["num_stages"]]
    elapsed = clock(middle, cold=True)
    conv = MaskedConv2d(*2 * (scale.channels * scale.hidden,), 3, colours=scale.channels)
    flops = flops_of(conv, (batch, 0, scale.size, scale.size))
    return {"ms": elapsed, "TFLOP/s exact": flops / elapsed / 1e9, "tile": [int(n) for n in used]}


def densely(what: str, by_y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """A 3 x 3 convolution in torch, or its gradient by "x" or "W"."""
    if not what:
        return F.conv2d(x, weight, padding=1)
    wanted = [what == "x", what == "W", False]
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        by_y, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )
    return gradients[wanted.index(True)]


@torch.no_grad()
def measure_rows(
    scale: Scale, batch: int, mode: Mode, device: torch.device, clock: Clock
) -> Result:
    """The middle convolution alone, and its gradients by x and by its weight (W).

    "kernel" is the launch that multiplies, between canvases; "operator" is the same between images,
    of weights as a module has them; and both rivals are cuDNN's dense convolution, channels last,
    one of them with channels padded as in a canvas.
    """
    torch.manual_seed(0)
    colours, units, size = scale
    channels, dtype = colours * units, mode.dtype
    conv = MaskedConv2d(channels, channels, 3, colours=colours).to(device, dtype)
    weight = conv.masked_weight()
    x, by_y = (
        torch.randn(batch, channels, size, size, device=device, dtype=dtype).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    structure: Any = (colours, ["channel", "lower"])
    spare = launching.padded(channels) - channels

    def operator(what: str) -> Tensor:
        if what == "W":
            found = masked_conv.weight_gradient_op(by_y, x, colours, 3, structure[1], dtype)
            return cast(Tensor, found)
        image = by_y if what == "x" else x
        return cast(
            Tensor, masked_conv.conv_op(image, weight, None, *structure, dtype, what == "x")
        )

    def dense(what: str, spare: int) -> Work:
        given = (by_y, x, weight)
        widths = ((0, 0, 0, 0, 0, spare), (0, 0, 0, 0, 0, spare), (0, 0, 0, 0, 0, spare, 0, spare))
        by_out, image, kernel = (
            F.pad(one, width).contiguous(memory_format=torch.channels_last)
            for one, width in zip(given, widths, strict=True)
        )
        return partial(densely, what, by_out, image, kernel)

    with precision_of(mode):
        works: dict[str, Work] = {}
        errors = {}
        for what in ("", "x", "W"):
            by = f" by {what}" if what else ""
            rivals: dict[str, Any] = {
                f"operator{by}": partial(operator, what),
                f"dense{by}": dense(what, 0),
                f"padded{by}": dense(what, spare),
            }
            expected = densely(what, by_y.double(), x.double(), weight.double())
            # What the mask hides of a gradient means nothing.
            left = conv.mask.repeat_interleave(units, 0).repeat_interleave(units, 1)
            seen = left if what == "W" else slice(None)
            for name, work in rivals.items():
                found = work()[: len(expected), :channels]
                errors[name] = gate(mode, {"out": found[seen]}, {"out": expected[seen]})["error"]
            multiplying = ("hidden_kernel", "weight_gradient_kernel")
            (kernel,) = (
                launch
                for name, launch in launches_of(partial(operator, what))
                if name in multiplying
            )
            works |= {f"kernel{by}": kernel} | rivals
        times = clock.race(works, cold=True)
    return {"ms": {name: spread(times[name]).median for name in works}, "errors": errors}


def all_parts(
    device: torch.device, *, tiny: bool
) -> list[tuple[str, str, Callable[[Clock], Result], int]]:
    """Section, name and work of everything in here, with its priority (see :class:`Case`)."""
    parts: list[tuple[str, str, Callable[[Clock], Result], int]] = []
    scales, batch = ((TINY,), 2) if tiny else ((*CIFAR10, *MNIST), 32)
    # The interpreter cannot multiply bfloat16.
    half = FLOAT16 if tiny else BFLOAT16
    for scale in scales:
        later = 2 if scale in MNIST else 0
        for mode in (half,) if tiny else (half, TF32, FLOAT32):
            name, given = f"{scale}, batch {batch}, {mode.name}", (scale, batch, mode, device)
            parts.append(("kernels", name, partial(measure_kernels, *given), later))
            parts.append(("rows", name, partial(measure_rows, *given), later))
            if mode is FLOAT32 or later:
                continue
            operand = configs.operand(mode.dtype, mode.kernels)
            tiles = dict.fromkeys([*configs.CANDIDATES[operand], *MORE_TILES])
            for tile in (None, *list(tiles)[: 1 if tiny else None]):
                label = "own" if tile is None else "x".join(map(str, tile))
                work = partial(measure_tile, scale, batch, mode, tile, device)
                parts.append(("tiles", f"{name}, {label}", work, 1))
    return parts
