"""Inside the kernels of a layer, on a GPU: where a step spends its time, and other tiles."""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
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
from bench.ceilings import flops_of
from bench.race import Problem, Result, Subject, precision_of
from bench.rivals import RIVALS
from bench.timing import Clock, Work, spread
from mintnet_triton import MaskedConv2d, MintLayer
from mintnet_triton.kernels.gpu import configs, masked_conv, mint_layer
from mintnet_triton.kernels.gpu.mint_layer import as_image, new_hidden
from mintnet_triton.kernels.gpu.weights import pack
from mintnet_triton.kernels.reference import Structure, join_centres

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
    ("masked_conv_kernel", "conv1"),
    ("middle_kernel", "middle"),
    ("output_kernel", "output"),
    ("hidden_gradient_kernel", "gradient by a2"),
    ("hidden_gradient_kernel", "gradient by a1"),
    ("output_kernel", "gradient by x"),
    ("weight_gradient_kernel", "gradient by W1"),
    ("weight_gradient_kernel", "gradient by W2"),
    ("weight_gradient_kernel", "gradient by W3"),
    ("weight_gradient_kernel", "gradient by centres"),
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


class Launches:
    """The kernels of a layer one by one, on tensors of their own."""

    def __init__(self, subject: Subject) -> None:
        layer, mode, problem = subject.module, subject.problem.mode, subject.problem
        assert isinstance(layer, MintLayer)
        self.x, self.by_y = problem.x, problem.upstream["y"]
        self.problem, self.mode, self.precision = problem, mode, mode.kernels
        with torch.no_grad():
            self.weights = layer.effective_weights()
            self.packed = mint_layer.pack_layer(self.weights, mode.dtype)
        assert layer.ordering is not None
        self.structure = Structure(layer.ordering.order, layer.ordering.triangle, "elu")
        self.h1, self.h2 = new_hidden(self.x, self.packed), new_hidden(self.x, self.packed)
        self.y, self.diagonal = torch.empty_like(self.x), torch.empty_like(self.x)
        self.by_diagonal = torch.randn_like(self.x)

    def conv1(self) -> None:
        masked_conv.run_conv(
            as_image(self.h1), self.x, self.packed.weight1, self.packed.bias1, 1,
            self.x.shape[1], *self.structure, self.precision,
        )  # fmt: skip

    def hidden(self) -> Tensor:
        return mint_layer.run_hidden(
            self.x, self.h1, self.h2, self.packed, self.structure, self.precision
        )

    def output(self, parts: Tensor) -> Tensor:
        return mint_layer.run_output(
            self.y, self.diagonal, self.x, self.h2, parts, self.packed, self.structure,
            self.precision,
        )  # fmt: skip

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.weights
        results: tuple[Tensor, Tensor, Tensor] = mint_layer.backward_op(
            self.x, self.h1, self.h2, self.by_y, self.by_diagonal, weights.weight1,
            weights.weight2, weights.weight3, join_centres(weights), weights.t,
            *self.structure,
        )  # fmt: skip
        return results

    def weight_gradients(self, by_a1: Tensor, by_a2: Tensor) -> Any:
        return mint_layer.weight_gradients_op(
            self.x, self.h1, self.h2, self.by_y, by_a1, by_a2, self.by_diagonal,
            self.weights.centre1.shape[1], [3, 3, 3], *self.structure,
        )  # fmt: skip

    def check(self) -> Tensor:
        """Run forward, compare, and return the parts of the diagonal."""
        parts = self.hidden()
        log_det = self.output(parts)
        gate(self.mode, {"y": self.y, "log_det": log_det}, self.problem.expected_forward)
        return parts


@torch.no_grad()
def time_operations(subject: Subject, clock: Clock) -> Result:
    """Times of the launches with what surrounds them, in milliseconds."""
    launches = Launches(subject)
    parts = launches.check()
    _, by_a1, by_a2 = launches.backward()
    work: dict[str, Work] = {
        "conv1": launches.conv1,
        "conv1, middle": launches.hidden,
        "output": partial(launches.output, parts),
        "gradients by a2, a1, x": launches.backward,
        "gradients by weights": partial(launches.weight_gradients, by_a1, by_a2),
    }
    return {name: clock(one, cold=True) for name, one in work.items()}


@torch.no_grad()
def measure_tile(
    scale: Scale,
    batch: int,
    mode: Mode,
    tile: configs.Tile | None,
    device: torch.device,
    clock: Clock,
) -> Result:
    """The middle kernel with another tile; None is the library's own choice."""

    def skip(*_: Any) -> None: ...

    arch, operand = configs.architecture(device), configs.operand(mode.dtype, mode.kernels)
    shape = (arch, operand, scale.channels, scale.hidden)
    with precision_of(mode), configs.using(*shape, tile) if tile else nullcontext():
        _, subject = step_of(scale, batch, mode, device)
        launches = Launches(subject)
        launches.check()
        used = mint_layer.middle_tile(launches.packed, scale.channels, launches.precision)
        with mock.patch.object(mint_layer, "run_conv", skip):
            elapsed = clock(launches.hidden, cold=True)
    middle = MaskedConv2d(*2 * (scale.channels * scale.hidden,), 3, colours=scale.channels)
    flops = flops_of(middle, (batch, 0, scale.size, scale.size))
    return {"ms": elapsed, "TFLOP/s exact": flops / elapsed / 1e9, "tile": list(used)}


@torch.no_grad()
def measure_rows(
    scale: Scale, batch: int, mode: Mode, device: torch.device, clock: Clock
) -> Result:
    """The middle convolution alone, on rows padded to a multiple of 16 channels, as in a layer.

    "kernel" is what a layer launches; "operator" is the same on images; and both rivals are
    cuDNN's dense convolution, channels last, one of them with padded channels.
    """
    torch.manual_seed(0)
    colours, units, size = scale
    channels, dtype = colours * units, mode.dtype
    conv = MaskedConv2d(channels, channels, 3, colours=colours).to(device, dtype)
    weight = conv.masked_weight()
    assert conv.bias is not None
    bias = conv.bias
    x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = {"out": F.conv2d(x.double(), weight.double(), bias.double(), padding=1)}
    packed = pack(weight, dtype)
    spare = packed.shape[2] - channels
    structure = (units, colours, "channel", "lower", "identity")
    rows = F.pad(x.permute(0, 2, 3, 1), (0, spare)).contiguous()
    out = torch.empty_like(rows)

    def kernel() -> Tensor:
        masked_conv.run_conv(as_image(out), as_image(rows), packed, bias, *structure, mode.kernels)
        return as_image(out)

    def operator() -> Tensor:
        result: Tensor = masked_conv.conv_op(x, packed, bias, *structure)
        return result

    def dense(spare: int) -> Callable[[], Tensor]:
        arguments = (
            as_image(F.pad(x.permute(0, 2, 3, 1), (0, spare)).contiguous()),
            F.pad(weight, (0, 0, 0, 0, 0, spare, 0, spare)),
        )
        image, kernel = (one.contiguous(memory_format=torch.channels_last) for one in arguments)
        padded_bias = F.pad(bias, (0, spare))
        return lambda: F.conv2d(image, kernel, padded_bias, padding=1)

    works = {"kernel": kernel, "operator": operator, "dense": dense(0), "padded": dense(spare)}
    with precision_of(mode):
        errors = {
            name: gate(mode, {"out": work()[:, :channels]}, expected)["error"]
            for name, work in works.items()
        }
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
