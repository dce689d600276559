"""What is measured on a GPU: the shapes, the numbers, the rivals, and the work that is timed.

Every result is first compared with the same in float64, and nothing that is wrong is timed. Errors
are relative root mean squares.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import mintnet_triton as mint
from bench.naive import NaiveMintLayer
from mintnet_triton import FixedPoint, MaskedConv2d, MintLayer, use_backend
from mintnet_triton.kernels import _configs, masked_conv, mint_layer
from mintnet_triton.kernels.mint_layer import Structure, as_image, new_hidden
from mintnet_triton.kernels.reference import join_centres
from mintnet_triton.kernels.weights import pack
from mintnet_triton.kernels.work import dense, exact_of_image

Work = Callable[[], Any]
Result = dict[str, Any]


class Scale(NamedTuple):
    """A layer of one scale of a model: colours, hidden units of each, side of the image."""

    channels: int
    hidden: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} K{self.hidden}"


CIFAR10 = (Scale(3, 85, 32), Scale(12, 21, 16), Scale(48, 5, 8))
MNIST = (Scale(1, 45, 28), Scale(4, 11, 14), Scale(16, 2, 7))
TINY = (Scale(2, 2, 3),)


class Mode(NamedTuple):
    """How numbers are multiplied; in 16 bits, a layer is under autocast."""

    name: str
    dtype: torch.dtype  # of a product's operands
    precision: str  # of float32 products, as torch calls it
    tolerance: float  # a result further off is taken to be wrong

    @property
    def kernels(self) -> str:
        """The precision as the kernels call it."""
        return "ieee" if self.precision == "highest" else "tf32"


MODES = (
    Mode("float32", torch.float32, "highest", 1e-4),
    Mode("tf32", torch.float32, "high", 1e-2),
    Mode("bfloat16", torch.bfloat16, "highest", 5e-2),
)
FLOAT16 = Mode("float16", torch.float16, "highest", 1e-2)

#: tiles that the middle kernel is timed with, on top of those that the library itself tries
MORE_TILES = tuple(
    _configs.Tile(*numbers)
    for numbers in (
        (128, 64, 64, 4, 3),
        (64, 64, 64, 4, 4),
        (256, 64, 32, 8, 3),
        (64, 32, 32, 4, 4),
        (128, 32, 16, 4, 4),
    )
)


class WrongResultError(AssertionError):
    """A result is too far from that in float64."""


class Case(NamedTuple):
    """Something to measure; ``run`` gives numbers and texts by name."""

    section: str
    name: str
    run: Callable[["Clock"], Result]
    compiles: bool = False  # worth running before, so that nothing is compiled while time is short


class Clock:
    """Median times of calls, in milliseconds.

    Args:
        device: of the work.
        once: call once and measure nothing, to compile.
        seconds: about as long as the calls of one measurement may take.
    """

    def __init__(self, device: torch.device, *, once: bool = False, seconds: float = 0.3) -> None:
        self.device, self.once, self.seconds = device, once, seconds
        self._flush: Tensor | None = None

    def __call__(self, work: Work, *, cold: bool = False) -> float:
        """Time some work.

        Args:
            cold: empty the cache before every call; it also keeps the GPU busy until the launches
                are queued, so that a kernel is timed alone.
        """
        if self.once or self.device.type == "cpu":
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        estimate = time.perf_counter() - start
        repetitions = min(100, max(10, int(self.seconds / max(estimate, 1e-6))))
        pairs = []
        for _ in range(repetitions):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if cold:
                self._empty_cache()
            begin.record()
            work()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(float(begin.elapsed_time(end)) for begin, end in pairs)

    def _empty_cache(self) -> None:
        if self._flush is None:
            self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        for _ in range(3):
            self._flush.zero_()


@contextmanager
def precision_of(mode: Mode) -> Iterator[None]:
    """Multiply float32 as the mode says, in cuDNN too, which may try what is fastest."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    torch.set_float32_matmul_precision(mode.precision)
    cudnn.allow_tf32, cudnn.benchmark = mode.precision != "highest", True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]


def relative_rms(computed: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected values."""
    expected = expected.detach().double()
    difference = computed.detach().double() - expected
    return float(difference.norm() / expected.norm().clamp(min=1e-300))


def gate(mode: Mode, computed: dict[str, Tensor], expected: dict[str, Tensor]) -> Result:
    """The largest errors, unless one of them means that something is wrong.

    Raises:
        WrongResultError: naming the worst.
    """
    errors = {name: relative_rms(value, expected[name]) for name, value in computed.items()}
    for name, error in errors.items():
        if not error <= mode.tolerance:  # NaN too
            raise WrongResultError(f"wrong: {name} has a relative error of {error:.2e}")
    return {"error": max(errors.values())}


def attempt(work: Callable[[], Any]) -> Any:
    """What the work gives, or a text that says why there is nothing."""
    try:
        return work()
    except Exception as error:  # whatever it is, the other numbers are wanted
        return explain(error)


def explain(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def capture(work: Work) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the work, and what the work returned: it changes when the graph is replayed.

    The work runs thrice before, so that all is compiled.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


def make_layer(scale: Scale, kind: type[MintLayer] = MintLayer, **arguments: Any) -> MintLayer:
    """A layer far from the identity, which Algorithm 1 still inverts."""
    layer = kind(scale.channels, scale.size, scale.hidden, initialisation="classifier", **arguments)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "t":
                parameter.uniform_(0.5, 2)
            else:
                parameter.mul_(2)
    return layer


def random_flow(preset: str | None) -> mint.MintNet:
    """A model of the paper, its layers as :func:`make_layer` makes them; None is a tiny one."""
    torch.manual_seed(0)
    if preset is None:
        flow = mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1)
    else:
        flow = mint.MintNet.from_preset(preset)
    for layer in layers_of(flow):
        layer.load_state_dict(make_layer(scale_of(layer)).state_dict())
    return flow


def layers_of(flow: mint.MintNet) -> list[MintLayer]:
    return [stage for _, stage in flow.stages() if isinstance(stage, MintLayer)]


def scale_of(layer: MintLayer) -> Scale:
    return Scale(layer.channels, layer.hidden, layer.size[0])


#: iterations of a layer in the paper's inversion, and how many of them are timed
PAPER_ITERATIONS, TIMED_ITERATIONS = 100, 2


@torch.no_grad()
def time_paper(flow: mint.MintNet, samples: int, clock: Callable[[Work], float]) -> float:
    """What the paper's inversion takes on the literal layer, in the clock's unit.

    The first iterations are timed, on one layer of each kind, and the time of all is extrapolated:
    every iteration evaluates the layer once, and one evaluation precedes them.
    """
    kinds: dict[Scale, list[MintLayer]] = {}
    for layer in layers_of(flow):
        kinds.setdefault(scale_of(layer), []).append(layer)
    solver = FixedPoint(iterations=TIMED_ITERATIONS, tolerance=0)
    total = 0.0
    for scale, alike in kinds.items():
        like = alike[0].t
        naive = NaiveMintLayer(scale.channels, scale.size, scale.hidden).to(like.device)
        naive.load_state_dict(alike[0].state_dict())
        z = torch.randn(samples, *like.shape, device=like.device)
        work = partial(naive.solve, z, solver, trace=False, reference=None)
        evaluation = clock(work) / (TIMED_ITERATIONS + 1)
        total += len(alike) * evaluation * (PAPER_ITERATIONS + 1)
    return total


class Problem:
    """A layer with inputs and upstream gradients, and all that is to come of them, in float64."""

    def __init__(self, scale: Scale, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.layer = make_layer(scale).to(device)
        shape = (batch, scale.channels, scale.size, scale.size)
        self.x = torch.randn(shape, device=device)
        self.upstream = (torch.randn_like(self.x), torch.randn(batch, device=device))
        truth = make_layer(scale).to(device)
        truth.load_state_dict(self.layer.state_dict())
        x = self.x.double().requires_grad_()
        with use_backend("torch"):
            y, log_det = truth.double()(x)
        torch.autograd.backward((y, log_det), [one.double() for one in self.upstream])
        self.expected = collect(truth, x, y, log_det)


@lru_cache(maxsize=1)
def problem(scale: Scale, batch: int, device: torch.device) -> Problem:
    """The last problem is kept: rivals come one after the other."""
    return Problem(scale, batch, device)


def collect(layer: MintLayer, x: Tensor, y: Tensor, log_det: Tensor) -> dict[str, Tensor]:
    """Results and gradients of a training step by name, out of the graph."""
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    named = {"y": y, "log_det": log_det, "x": x.grad, **gradients}
    return {name: value.detach() for name, value in named.items() if value is not None}


class Subject:
    """One rival in one mode, with what it is timed at.

    Rivals: "ours", the kernels; "torch", the library without them; "compiled", the same under
    ``torch.compile``; "naive", the paper's formulas read literally.
    """

    def __init__(self, given: Problem, rival: str, mode: Mode) -> None:
        self.given, self.mode = given, mode
        self.device = given.x.device
        self.backend = "triton" if rival == "ours" else "torch"
        self.layer = given.layer
        self.map: Callable[[Tensor], tuple[Tensor, Tensor]] = given.layer
        self.x = given.x.clone().requires_grad_()
        if rival == "naive":
            sizes = (self.layer.channels, self.layer.size, self.layer.hidden)
            self.layer = NaiveMintLayer(*sizes).to(self.device)
            self.layer.load_state_dict(given.layer.state_dict())
            self.map = self._literally
        elif rival == "compiled":
            torch.compiler.reset()
            tool = "inductor" if self.device.type == "cuda" else "aot_eager"
            self.map = torch.compile(self.layer, backend=tool, fullgraph=True, dynamic=False)

    def _literally(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Not by the layer's own call, which waits for the GPU to look for zeros.
        y, diagonal = self.layer.evaluator()(x)
        return y, diagonal.log().flatten(1).sum(1)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = self.mode.dtype != torch.float32
        autocast = torch.autocast(self.device.type, self.mode.dtype if half else None, half)
        with use_backend(self.backend), autocast:
            return self.map(x)

    def forward(self) -> dict[str, Tensor]:
        with torch.no_grad():
            y, log_det = self.run(self.given.x)
        return {"y": y, "log_det": log_det}

    def train(self) -> dict[str, Tensor]:
        self.clear()
        y, log_det = self.run(self.x)
        torch.autograd.backward((y, log_det), self.given.upstream)
        return collect(self.layer, self.x, y, log_det)

    def clear(self) -> None:
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = None

    def invert(self, iterations: int) -> Tensor:
        solver = FixedPoint(iterations=iterations, tolerance=0)
        z = self.given.expected["y"].float()
        with torch.no_grad(), use_backend(self.backend):
            return self.layer.solve(z, solver, trace=False, reference=None).x

    def check(self, results: dict[str, Tensor]) -> Result:
        return gate(self.mode, results, self.given.expected)

    def peak(self) -> float:
        """Memory that a training step takes on top of what is there before, in MiB."""
        self.clear()
        if self.device.type == "cpu":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.train()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_conv(
    scale: Scale, batch: int, mode: Mode, device: torch.device, clock: Clock
) -> Result:
    """The middle convolution alone: ours against cuDNN with the masked weight as a dense one.

    "ours" is the kernel on rows padded to a multiple of 16 channels, as inside a layer; "op" is the
    operator on the very tensors that cuDNN gets; cuDNN also gets padded channels.
    """
    torch.manual_seed(0)
    colours, units, size = scale
    channels, dtype = colours * units, mode.dtype
    conv = MaskedConv2d(channels, channels, 3, colours=colours).to(device, dtype)
    weight = conv.masked_weight().detach()
    assert conv.bias is not None
    bias = conv.bias.detach()
    x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
    expected = {"out": F.conv2d(x.double(), weight.double(), bias.double(), padding=1)}
    packed = pack(weight, dtype)
    spare = packed.shape[2] - channels
    structure = (units, colours, "channel", "lower", "identity")
    rows = F.pad(x.permute(0, 2, 3, 1), (0, spare)).contiguous()
    out = torch.empty_like(rows)

    def ours() -> Tensor:
        masked_conv.run_conv(as_image(out), as_image(rows), packed, bias, *structure, mode.kernels)
        return as_image(out)[:, :channels]

    def best(work: Callable[..., Tensor], *arguments: Tensor) -> Result:
        times = {}
        for name, layout in (
            ("nhwc", torch.channels_last),
            ("nchw", torch.contiguous_format),
        ):
            tensors = [
                one.contiguous(memory_format=layout) if one.ndim == 4 else one for one in arguments
            ]
            gate(mode, {"out": work(*tensors)[:, :channels]}, expected)
            times[name] = clock(partial(work, *tensors), cold=True)
        fastest = min(times, key=lambda name: times[name])
        return {"ms": times[fastest], "layout": fastest}

    def op(x: Tensor) -> Tensor:
        result: Tensor = masked_conv.conv_op(x, packed, bias, *structure)
        return result

    def cudnn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def timed_ours() -> Result:
        found = gate(mode, {"out": ours()}, expected)
        return {"ms": clock(ours, cold=True), **found}

    with precision_of(mode), torch.no_grad():
        result: Result = {
            "ours": attempt(timed_ours),
            "op": attempt(partial(best, op, x)),
            "cudnn": attempt(partial(best, cudnn, x, weight, bias)),
            "cudnn padded": attempt(
                partial(
                    best,
                    cudnn,
                    F.pad(x, (0, 0, 0, 0, 0, spare)),
                    F.pad(weight, (0, 0, 0, 0, 0, spare, 0, spare)),
                    F.pad(bias, (0, spare)),
                )
            ),
        }
    counts = {
        "exact": 2 * batch * products(scale),
        "dense": 2 * batch * size**2 * dense(units, units, colours, 3),
    }
    for rival in list(result.values()):
        if isinstance(rival, dict):
            for name, count in counts.items():
                rival[f"TFLOP/s {name}"] = count / rival["ms"] / 1e9
    return result


def products(scale: Scale) -> int:
    """Multiply-adds of the middle convolution of an image: what the mask leaves."""
    colours, units, size = scale
    return exact_of_image(units, units, colours, 3, "channel", "lower", size, size)


def measure_layer(
    scale: Scale, batch: int, rival: str, mode: Mode, device: torch.device, clock: Clock
) -> Result:
    """Forward with log-det, a training step with its memory, and in float32 the inversion."""
    given = problem(scale, batch, device)
    with precision_of(mode):
        subject = Subject(given, rival, mode)

        def forward() -> Result:
            found = subject.check(subject.forward())
            return {"ms": clock(subject.forward), **found}

        def train() -> Result:
            found = subject.check(subject.train())
            return {"ms": clock(subject.train), "MiB": subject.peak(), **found}

        def invert() -> Result:
            iterations = 20 if device.type == "cuda" else 2
            work = partial(subject.invert, iterations)
            x = {"x": work()}
            # Even in float32, a steep map leaves an error in x.
            loose = mode._replace(tolerance=1e-3 if iterations == 20 else 1)
            found = gate(loose, x, {"x": given.x.double()})
            return {"ms": clock(work), **found}

        result = {"forward": attempt(forward), "training": attempt(train)}
        if mode.name == "float32" and rival != "compiled":
            result["inversion"] = attempt(invert)
        subject.clear()
    return result


def measure_graph(
    scale: Scale, batch: int, rival: str, mode: Mode, device: torch.device, clock: Clock
) -> Result:
    """Forward and training step as CUDA graphs: without the time that launches take."""
    given = problem(scale, batch, device)
    with precision_of(mode):
        subject = Subject(given, rival, mode)

        def replay(work: Callable[[], dict[str, Tensor]]) -> Result:
            if device.type == "cpu":
                return {"ms": clock(work), **subject.check(work())}
            graph, results = capture(work)
            graph.replay()
            return {"ms": clock(graph.replay), **subject.check(results)}

        result = {
            "forward": attempt(partial(replay, subject.forward)),
            "training": attempt(partial(replay, subject.train)),
        }
        subject.clear()
    return result


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


def measure_kernels(
    scale: Scale, batch: int, mode: Mode, device: torch.device, clock: Clock
) -> Result:
    """Where the time of our training step goes: by kernel, in microseconds, and by operation."""
    given = problem(scale, batch, device)
    with precision_of(mode):
        subject = Subject(given, "ours", mode)
        found = subject.check(subject.train())
        result = {
            "profile": attempt(partial(profile, subject)),
            "operations": attempt(partial(time_operations, subject, clock)),
            **found,
        }
        subject.clear()
    return result


def profile(subject: Subject, steps: int = 5) -> Result:
    """Median time of each kernel over some steps; all that is not ours under "rest"."""
    if subject.device.type == "cpu":
        steps = 1
    else:
        subject.train()
    activity = getattr(torch.profiler.ProfilerActivity, subject.device.type.upper())
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            subject.train()
        if subject.device.type == "cuda":
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
        layer, mode, given = subject.layer, subject.mode, subject.given
        self.x, self.by_y = given.x, given.upstream[0]
        self.given, self.mode, self.precision = given, mode, mode.kernels
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
        gate(self.mode, {"y": self.y, "log_det": log_det}, self.given.expected)
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
    tile: _configs.Tile | None,
    device: torch.device,
    clock: Clock,
) -> Result:
    """The middle kernel with another tile; None is the library's own choice."""

    def skip(*_: Any) -> None: ...

    given = problem(scale, batch, device)
    arch, operand = _configs.architecture(device), _configs.operand(mode.dtype, mode.kernels)
    shape = (arch, operand, scale.channels, scale.hidden)
    with precision_of(mode), _configs.using(*shape, tile) if tile else nullcontext():
        subject = Subject(given, "ours", mode)
        launches = Launches(subject)
        launches.check()
        used = mint_layer.middle_tile(launches.packed, scale.channels, launches.precision)
        with mock.patch.object(mint_layer, "run_conv", skip):
            elapsed = clock(launches.hidden, cold=True)
    return {
        "ms": elapsed,
        "TFLOP/s exact": 2 * batch * products(scale) / elapsed / 1e9,
        "tile": list(used),
    }


@torch.no_grad()
def measure_sampling(
    preset: str | None, samples: int, solver: mint.Solver, device: torch.device, clock: Clock
) -> Result:
    """Sampling from a whole model, beside the paper's inversion of the same latents."""
    flow = random_flow(preset).to(device)
    z = torch.randn(samples, *flow.latent_shape, device=device)
    with use_backend("triton"), mint.frozen(flow):
        result = mint.invert(flow, z, solver)
        if not bool(result.converged.all()) and not isinstance(solver, FixedPoint):
            raise WrongResultError(f"wrong: {result}")
        elapsed = clock(partial(mint.invert, flow, z, solver))
    with use_backend("torch"):
        paper = time_paper(flow, samples, clock)
    return {
        "ms": elapsed,
        "ms of the paper's": paper,
        "residual": float(result.residual.max()),
        "not converged": int((~result.converged).sum()),
        "by wavefront": float(result.layer_wavefront.double().mean()),
    }


def all_cases(device: torch.device, *, tiny: bool = False) -> list[Case]:
    """Every case, the most important first.

    Args:
        tiny: on shapes that the interpreter can do, one of each kind.
    """
    cifar, mnist, small, large = (TINY, (), 2, None) if tiny else (CIFAR10, MNIST, 32, 128)
    # The interpreter cannot multiply bfloat16.
    modes, half = ((FLOAT16, MODES[0]), FLOAT16) if tiny else (MODES, MODES[2])
    few = modes[:1] if tiny else modes
    cases: list[Case] = []

    def add(section: str, parts: Sequence[object], compiles: bool, work: Any, *more: Any) -> None:
        run = partial(work, *more, device)
        cases.append(Case(section, ", ".join(str(part) for part in parts), run, compiles))

    def conv(scales: Sequence[Scale], batch: int) -> None:
        for scale in scales:
            for mode in (FLOAT16,) if tiny else (half, FLOAT16, MODES[1], MODES[0]):
                parts = (scale, batch, mode.name)
                add("conv2", parts, batch == small, measure_conv, scale, batch, mode)

    def kernels(scales: Sequence[Scale], batch: int) -> None:
        for scale in scales:
            for mode in few:
                parts = (scale, batch, mode.name)
                add("kernels", parts, batch == small, measure_kernels, scale, batch, mode)

    def rivals(
        section: str, work: Any, scales: Sequence[Scale], batch: int, names: Sequence[str]
    ) -> None:
        for scale in scales:
            for mode in modes if section == "layer" else few:
                for rival in names:
                    compiles = section == "layer" and (
                        rival == "compiled" or (rival == "ours" and batch == small)
                    )
                    parts = (scale, batch, mode.name, rival)
                    add(section, parts, compiles, work, scale, batch, rival, mode)

    def layers(scales: Sequence[Scale], batch: int, *names: str) -> None:
        rivals("layer", measure_layer, scales, batch, names)

    def graphs(scales: Sequence[Scale], batch: int, *names: str) -> None:
        rivals("graph", measure_graph, scales, batch, names)

    def tiling(scales: Sequence[Scale], batch: int) -> None:
        for scale in scales:
            for mode in (FLOAT16,) if tiny else (half, MODES[1]):
                operand = _configs.operand(mode.dtype, mode.kernels)
                tiles = dict.fromkeys([*_configs.CANDIDATES[operand], *MORE_TILES])
                for tile in (None, *list(tiles)[: 1 if tiny else None]):
                    label = "own" if tile is None else "x".join(str(number) for number in tile)
                    parts = (scale, batch, mode.name, label)
                    add("tiles", parts, True, measure_tile, scale, batch, mode, tile)

    def sampling(preset: str | None, samples: int) -> None:
        for solver in (mint.Auto(), mint.Wavefront(), FixedPoint()):
            parts = (preset or "tiny", samples, type(solver).__name__)
            add("sampling", parts, True, measure_sampling, preset, samples, solver)

    conv(cifar, small)
    kernels(cifar, small)
    layers(cifar, small, "ours", "torch", "naive")
    sampling(None if tiny else "cifar10", 2 if tiny else 64)
    graphs(cifar, small, "ours")
    tiling(cifar, small)
    layers(cifar, small, "compiled")
    layers(mnist, small, "ours", "torch", "naive")
    if large is not None:
        sampling("mnist", 64)
        layers(cifar, large, "ours", "torch", "naive")
        conv(cifar, large)
        layers(cifar, large, "compiled")
        graphs(mnist, small, "ours")
        graphs(cifar, small, "torch")
        kernels(mnist, small)
        conv(mnist, small)
        layers(mnist, small, "compiled")
        kernels(cifar, large)
        layers(mnist, large, "ours", "torch", "naive", "compiled")
        conv(mnist, large)
    return cases
