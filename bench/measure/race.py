"""A race: the rivals of a case, each compared with float64, and then timed against each other.

Nothing that is wrong is timed. Errors are relative root mean squares.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mintnet_triton as mint
from bench.contest.cases import (
    FLOAT32,
    Case,
    Mode,
    Pass,
    WrongResultError,
    gate,
    layers_of,
    make_layer,
    random_flow,
    scale_of,
)
from bench.contest.rivals import INVERSIONS, RIVALS, Rival, Target, UnavailableError, insist
from bench.measure.ceilings import bytes_of, flops_of
from bench.measure.timing import Clock, Work, capture, energy, peak_memory
from mintnet_triton import MaskedConv2d, MintLayer, use_backend

Result = dict[str, Any]
Tensors = dict[str, Tensor]

#: an x that is further off is taken to be wrong: even in float32, a steep map leaves an error in it
INVERSE_TOLERANCE = 1e-3


class Contender(NamedTuple):
    """A rival at a problem."""

    check: Callable[[], Result]  #: raises WrongResultError, or gives the error
    parts: list[tuple[Work, float]]  #: what is timed, and how many times each counts


class Problem:
    """A module with inputs and upstream gradients, and all that is to come of them, in float64."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.mode, self.device = case, case.mode, device
        half = case.mode.dtype != torch.float32
        self.module: nn.Module
        if case.subject == "convolution":
            assert case.scale is not None
            colours, units, side = case.scale
            wide = colours * units
            ends = {"first": (colours, wide), "middle": (wide, wide), "last": (wide, colours)}
            shape: tuple[int, ...] = (ends[case.part][0], side, side)
            conv = MaskedConv2d(shape[0], ends[case.part][1], 3, colours=colours)
            self.module = conv.to(case.mode.dtype)
            self.names: tuple[str, ...] = ("out",)
        elif case.subject == "layer":
            assert case.scale is not None
            self.module = make_layer(case.scale)
            shape, self.names = (case.scale.channels, *self.module.size), ("y", "log_det")
        else:
            flow = random_flow(case.preset)
            # The errors of layers add up, at random.
            depth = len(layers_of(flow))
            self.mode = case.mode._replace(tolerance=case.mode.tolerance * depth**0.5)
            self.module, shape, self.names = flow, flow.image_shape, ("y", "log_det")
        self.autocast = half and case.subject != "convolution"
        self.module.to(device)
        dtype = next(self.module.parameters()).dtype
        self.x = torch.randn(case.batch, *shape).to(device, dtype)
        with torch.no_grad(), use_backend("torch"):
            outputs = self.named(copy.deepcopy(self.module).double()(self.x.double()))
        self.expected_forward = outputs
        self.upstream = {name: torch.randn_like(value).to(dtype) for name, value in outputs.items()}

    def named(self, outputs: Any) -> Tensors:
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(self.names, values, strict=True))

    @cached_property
    def expected_training(self) -> Tensors:
        twin = copy.deepcopy(self.module).double()
        x = self.x.double().requires_grad_()
        with use_backend("torch"):
            outputs = self.named(twin(x))
        upstream = [self.upstream[name].double() for name in outputs]
        torch.autograd.backward(list(outputs.values()), upstream)
        return collect(twin, x, outputs)

    def contender(self, pass_: Pass, name: str) -> Contender:
        """A rival, ready.

        Raises:
            UnavailableError: it cannot run here.
        """
        if pass_ == "inverse":
            return self._inversion(name)
        subject = Subject(self, RIVALS[name])
        work = subject.forward if pass_ == "forward" else subject.training
        expected = self.expected_forward if pass_ == "forward" else self.expected_training
        if not RIVALS[name].graph:
            return Contender(lambda: gate(self.mode, work(), expected), [(work, 1)])
        if self.device.type != "cuda":
            raise UnavailableError("a CUDA graph needs a GPU")
        graph, results = capture(work)

        def check() -> Result:
            graph.replay()
            return gate(self.mode, results, expected)

        return Contender(check, [(graph.replay, 1)])

    def _inversion(self, name: str) -> Contender:
        mode = self.mode._replace(tolerance=INVERSE_TOLERANCE)
        if isinstance(self.module, mint.MintNet):
            return self._model_inversion(name, mode)
        assert isinstance(self.module, MintLayer)
        z = self.expected_forward["y"].to(self.x.dtype)
        inversion = INVERSIONS[name](Target(self.module, self.x.double(), z))

        def check() -> Result:
            return gate(mode, {"x": inversion.work()}, {"x": inversion.expected})

        return Contender(check, [(inversion.work, inversion.times)])

    def _model_inversion(self, name: str, mode: Mode) -> Contender:
        """Sampling from a whole model; others than the library's, layer by layer."""
        flow = self.module
        assert isinstance(flow, mint.MintNet)
        if name != "ours":
            return layer_by_layer(flow, name, self.case.batch, self.device)

        @torch.no_grad()
        def work() -> mint.InversionResult:
            with use_backend(insist("auto", self.device)):
                result = mint.invert(flow, self.latents)
            result.raise_if_not_converged()
            return result

        def check() -> Result:
            result = work()
            return gate(mode, {"x": result.x, "log_det": result.log_det}, self.true_samples)

        return Contender(check, [(work, 1)])

    @cached_property
    def true_samples(self) -> Tensors:
        """The inverse in float64, which is taken for the truth if float64 maps it back.

        Rounded to float32 it would not be mapped back: a network of many layers magnifies that.

        Raises:
            WrongResultError: it is not mapped back.
        """
        twin = copy.deepcopy(self.module).double()
        assert isinstance(twin, mint.MintNet)
        x = mint.invert(twin, self.latents.double()).x
        with torch.no_grad(), use_backend("torch"):
            z, log_det = twin(x)
        gate(self.mode, {"z": z}, {"z": self.latents})
        return {"x": x, "log_det": -log_det}

    @cached_property
    def latents(self) -> Tensor:
        assert isinstance(self.module, mint.MintNet)
        return torch.randn(self.case.batch, *self.module.latent_shape).to(self.device)


def layer_by_layer(flow: nn.Module, name: str, batch: int, device: torch.device) -> Contender:
    """A rival's inversion of a flow: a layer of each kind is timed, and counts for all of them."""
    counts = Counter(scale_of(layer) for layer in layers_of(flow))
    checks, parts = [], []
    for scale, count in counts.items():
        case = Case("", "layer", FLOAT32, batch, ("inverse",), (), (name,), scale)
        contender = Problem(case, device).contender("inverse", name)
        checks.append(contender.check)
        parts += [(work, times * count) for work, times in contender.parts]
    return Contender(lambda: {"error": max(check()["error"] for check in checks)}, parts)


def collect(module: nn.Module, x: Tensor, outputs: Tensors) -> Tensors:
    """Results and gradients of a training step by name, out of the graph."""
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    named = {**outputs, "x": x.grad, **gradients}
    return {name: value.detach() for name, value in named.items() if value is not None}


class Subject:
    """A rival's own copy of a problem's module, with what it is timed at."""

    def __init__(self, problem: Problem, rival: Rival) -> None:
        self.problem = problem
        self.autocast = problem.autocast and rival.autocast
        self.backend = insist(rival.backend, problem.device)
        self.module = rival.prepare(copy.deepcopy(problem.module))
        layout = rival.layout
        self.module.to(memory_format=layout)  # type: ignore[call-overload]  # in no overload
        self.map = rival.wrap(self.module)
        self.input = problem.x.clone(memory_format=layout)
        self.x = self.input.clone().requires_grad_()
        self.upstream = [
            value.contiguous(memory_format=layout) if value.ndim == 4 else value
            for value in problem.upstream.values()
        ]

    def run(self, x: Tensor) -> Tensors:
        device, mode, on = self.problem.device.type, self.problem.mode, self.autocast
        with use_backend(self.backend), torch.autocast(device, mode.dtype if on else None, on):
            return self.problem.named(self.map(x))

    def forward(self) -> Tensors:
        with torch.no_grad():
            return self.run(self.input)

    def training(self) -> Tensors:
        """Forward and backward; gradients by x and by the parameters."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        outputs = self.run(self.x)
        torch.autograd.backward(list(outputs.values()), self.upstream)
        return collect(self.module, self.x, outputs)


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


def verdict(error: Exception) -> Result:
    """Why there is no time: what became of it in a word or two, and the reason in one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, WrongResultError):
        return {"status": "wrong", "reason": text}
    if isinstance(error, UnavailableError):
        return {"status": "unavailable", "reason": text}
    if isinstance(error, mint.NotConvergedError):
        return {"status": "not converged", "reason": text}
    if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in text:
        return {"status": "out of memory", "reason": text}
    return {"status": "failed", "reason": f"{type(error).__name__}: {text}"}


def measure(case: Case, clock: Clock) -> Result:
    """Every pass of a case: for each rival its times, or why there are none."""
    with precision_of(case.mode):
        problem = Problem(case, clock.device)
        passes = {pass_: _race(problem, pass_, clock) for pass_ in case.passes}
    scale = {} if case.scale is None else case.scale._asdict()
    return {"mode": case.mode.name, "batch": case.batch, **scale, "passes": passes}


def _race(problem: Problem, pass_: Pass, clock: Clock) -> Result:
    case = problem.case
    rivals: dict[str, Result] = {}
    contenders: dict[str, Contender] = {}
    for name in case.rivals_of(pass_):
        try:
            contender = problem.contender(pass_, name)
            rivals[name] = _checked(contender, counting=pass_ != "inverse" and name in COUNTED)
            contenders[name] = contender
        except Exception as error:  # whatever it is, the others are wanted
            rivals[name] = verdict(error)
    try:
        for name, times in times_of(contenders, clock, case.subject == "convolution").items():
            rivals[name]["ms"] = times
        for name, contender in contenders.items():
            if any(times != 1 for _, times in contender.parts):
                rivals[name]["extrapolated"] = True
            if case.resources and pass_ != "inverse":
                _add_resources(rivals[name], contender.parts[0][0], clock)
    except Exception as error:
        rivals |= dict.fromkeys(contenders, verdict(error))
    result: Result = {"rivals": rivals}
    if pass_ != "inverse":
        tensors = [problem.x, *problem.expected_forward.values(), *problem.module.parameters()]
        operand = problem.mode.dtype if problem.autocast else problem.x.dtype
        training = pass_ == "training"
        result["bytes"] = bytes_of(tensors, operand) * (2 if training else 1)
        # The backward pass multiplies as much again by x, and once more by the weights.
        result["flops"] = flops_of(problem.module, problem.x.shape) * (3 if training else 1)
    return result


#: rivals whose matrix products torch can count as they run, on a CPU
COUNTED = ("ours", "torch", "naive", "dense")


def _checked(contender: Contender, counting: bool) -> Result:
    """The error; with the flops that were executed, as far as torch can count them."""
    if not counting:
        return contender.check()
    with FlopCounterMode(display=False) as counter:
        found = contender.check()
    executed = counter.get_total_flops()  # 0 where operators of our own hide it
    return found | ({"executed": executed} if executed else {})


def times_of(
    contenders: dict[str, Contender], clock: Clock, cold: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of every rival, by round: its parts' times, each as often as it counts."""
    works = {
        f"{name}/{index}": work
        for name, contender in contenders.items()
        for index, (work, _) in enumerate(contender.parts)
    }
    raw = clock.race(works, cold=cold)
    times: dict[str, list[float]] = {}
    for name, contender in contenders.items():
        columns = [
            [weight * value for value in raw[f"{name}/{index}"]]
            for index, (_, weight) in enumerate(contender.parts)
        ]
        times[name] = [float(f"{sum(parts):.5g}") for parts in zip(*columns, strict=True)]
    return times


def _add_resources(found: Result, work: Work, clock: Clock) -> None:
    if clock.device.type == "cuda" and not clock.once:
        found["MiB"] = peak_memory(work, clock.device)
    joules = energy(work, clock)
    if joules is not None:
        found["joules"] = joules


#: rivals that compile kernels of their own
COMPILING = ("ours", "compiled", "wavefront", "fixed point")


def compile_kernels(case: Case, clock: Clock) -> Result:
    """Have everything compiled that a case needs, and nothing else done: others want the memory."""
    found: Result = {}
    with precision_of(case.mode):
        problem = Problem(case, clock.device)
        for pass_ in case.passes:
            for name in case.rivals_of(pass_):
                if name in COMPILING:
                    try:
                        found[f"{pass_}, {name}"] = problem.contender(pass_, name).check()
                    except Exception as error:
                        found[f"{pass_}, {name}"] = verdict(error)
    return found


def memory_of(case: Case, device: torch.device) -> Result:
    """Peaks of memory in MiB: of each rival, by pass; what cannot run is left out."""
    found: Result = {}
    with precision_of(case.mode):
        problem = Problem(case, device)
        for pass_ in case.passes:
            if pass_ == "inverse":
                continue
            for name in case.rivals_of(pass_):
                try:
                    work = problem.contender(pass_, name).parts[0][0]
                    found.setdefault(pass_, {})[name] = peak_memory(work, device)
                except Exception as error:
                    found.setdefault(pass_, {})[name] = verdict(error)["status"]
    return found
