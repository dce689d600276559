"""The kernels on a GPU at the sizes of the paper's models, and what only a GPU can show.

The tests of the kernels themselves run on a GPU, too, but on small shapes.
"""

import copy
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mintnet_triton as mint
from bench.contest.cases import CIFAR10, MNIST, Scale, make_layer, relative_rms
from bench.measure.race import collect
from bench.measure.timing import capture
from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.gpu import inversion, launching, mint_layer
from mintnet_triton.kernels.gpu.canvas import TAIL
from mintnet_triton.kernels.reference import Structure
from tests.grid import TOLERANCES, dtype_of, precision_of

pytestmark = [
    pytest.mark.gpu,
    # Inductor, CUDA graphs and torch's switches warn of what is no fault here.
    pytest.mark.filterwarnings("default"),
]

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda"
BATCH = 32
SCALES = pytest.mark.parametrize("scale", [*CIFAR10, *MNIST], ids=str)

Results = dict[str, Tensor]


def inputs(
    scale: Scale, dtype: torch.dtype, batch: int = BATCH, layout: Any = torch.contiguous_format
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x, and random upstream gradients of y and log_det."""
    shape = (batch, scale.channels, scale.size, scale.size)
    x, by_y = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    by_log_det = torch.randn(batch, device=DEVICE, dtype=exact)
    x, by_y = (one.contiguous(memory_format=layout) for one in (x, by_y))
    return x, (by_y, by_log_det)


def step(layer: mint.MintLayer, x: Tensor, upstream: tuple[Tensor, Tensor]) -> Results:
    """y, log_det, diagonal, and the gradients of everything."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y, log_det = layer(x)
    torch.autograd.backward((y, log_det), upstream)
    with torch.no_grad():
        _, diagonal = layer.forward_and_diagonal(x)
    return {**collect(layer, x, {"y": y, "log_det": log_det}), "diagonal": diagonal}


def truth(layer: mint.MintLayer, x: Tensor, upstream: tuple[Tensor, Tensor]) -> Results:
    """The same of the same weights in float64, without kernels."""
    exact = copy.deepcopy(layer).double()
    with mint.use_backend("torch"):
        return step(exact, x.double(), (upstream[0].double(), upstream[1].double()))


def assert_close(computed: Results, expected: Results, tolerance: float) -> None:
    assert computed.keys() == expected.keys()
    errors = {name: relative_rms(computed[name], expected[name]) for name in expected}
    wrong = {name: f"{error:.2e}" for name, error in errors.items() if not error <= tolerance}
    worst = max(errors.values())
    assert not wrong, f"relative errors above {tolerance:.0e}, the worst {worst:.2e}: {wrong}"


def assert_same(computed: Results, expected: Results) -> None:
    """Bit by bit."""
    assert computed.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(computed[name], expected[name])]
    assert not different


@pytest.mark.parametrize("numbers", TOLERANCES)
@SCALES
def test_step_against_float64(scale: Scale, numbers: str) -> None:
    dtype = dtype_of(numbers)
    layer = make_layer(scale).to(DEVICE, dtype)
    x, upstream = inputs(scale, dtype)
    with mint.use_backend("triton"), precision_of(numbers):
        computed = step(layer, x, upstream)
    assert_close(computed, truth(layer, x, upstream), TOLERANCES[numbers])


@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", CIFAR10, ids=str)
def test_channels_last(scale: Scale, numbers: str) -> None:
    dtype = dtype_of(numbers)
    layer = make_layer(scale, triangle="upper").to(DEVICE, dtype)
    x, upstream = inputs(scale, dtype, layout=torch.channels_last)
    with mint.use_backend("triton"):
        computed = step(layer, x, upstream)
    assert_close(computed, truth(layer, x, upstream), TOLERANCES[numbers])


def test_pixel_order() -> None:
    layer = make_layer(CIFAR10[1], order="pixel").to(DEVICE)
    x, upstream = inputs(CIFAR10[1], torch.float32)
    with mint.use_backend("triton"):
        computed = step(layer, x, upstream)
    assert_close(computed, truth(layer, x, upstream), TOLERANCES["float32"])


@pytest.mark.parametrize("scale", [CIFAR10[0], CIFAR10[2], MNIST[0]], ids=str)
def test_autocast(scale: Scale) -> None:
    layer = make_layer(scale).to(DEVICE)
    x, upstream = inputs(scale, torch.float32)
    with mint.use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
        computed = step(layer, x, upstream)
    assert computed["y"].dtype == computed["log_det"].dtype == torch.float32
    assert_close(computed, truth(layer, x, upstream), TOLERANCES["bfloat16"])


@pytest.mark.parametrize("numbers", ["float32", "float16"])
@pytest.mark.parametrize("scale", CIFAR10, ids=str)
def test_runs_are_equal(scale: Scale, numbers: str) -> None:
    dtype = dtype_of(numbers)
    layer = make_layer(scale).to(DEVICE, dtype)
    x, upstream = inputs(scale, dtype)
    with mint.use_backend("triton"):
        first, second = (step(layer, x, upstream) for _ in range(2))
    assert_same(first, second)


@pytest.mark.parametrize("numbers", TOLERANCES)
@SCALES
def test_convolution_against_float64(scale: Scale, numbers: str) -> None:
    """The middle convolution of a layer on its own."""
    dtype, channels = dtype_of(numbers), scale.channels * scale.hidden
    conv = mint.MaskedConv2d(channels, channels, 3, colours=scale.channels).to(DEVICE, dtype)
    shape = (BATCH, channels, scale.size, scale.size)
    x, by_y = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))

    def results(conv: mint.MaskedConv2d, x: Tensor, by_y: Tensor) -> Results:
        x = x.detach().requires_grad_()
        names, parameters = zip(*conv.named_parameters(), strict=True)
        y = conv(x)
        gradients = torch.autograd.grad(y, [x, *parameters], by_y)
        return {"y": y.detach(), **dict(zip(("x", *names), gradients, strict=True))}

    with mint.use_backend("triton"), precision_of(numbers):
        computed = results(conv, x, by_y)
    with mint.use_backend("torch"):
        expected = results(copy.deepcopy(conv).double(), x.double(), by_y.double())
    assert_close(computed, expected, TOLERANCES[numbers])


def gradients_of(module: nn.Module, function: Callable[[Tensor], Any], x: Tensor) -> Results:
    """Results and gradients of a whole module, of one sum of them."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y, log_det = function(x)
    (y.square().sum() / 2 - log_det.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    named = {"y": y, "log_det": log_det, "x": x.grad, **gradients}
    return {name: value.detach().clone() for name, value in named.items() if value is not None}


@pytest.mark.parametrize("kind", ["layer", "flow"])
def test_compile(kind: str) -> None:
    module: nn.Module
    if kind == "layer":
        module = make_layer(CIFAR10[1]).to(DEVICE)
        x, _ = inputs(CIFAR10[1], torch.float32)
    else:
        module = mint.MintNet(3, 16, pairs=2, hidden=16, squeezes=1).to(DEVICE)
        for name, parameter in module.named_parameters():
            if not name.endswith("t"):
                nn.init.normal_(parameter, std=0.05)  # a new flow is close to the identity
        x = torch.randn(8, 3, 16, 16, device=DEVICE)
    with mint.use_backend("triton"):
        expected = gradients_of(module, module, x)
        computed = gradients_of(module, torch.compile(module, fullgraph=True), x)
    assert_close(computed, expected, 1e-5)


@torch.no_grad()
def test_graph_of_forward() -> None:
    layer = make_layer(CIFAR10[1]).to(DEVICE)
    x, _ = inputs(CIFAR10[1], torch.float32)
    other, _ = inputs(CIFAR10[1], torch.float32)
    with mint.use_backend("triton"):
        graph, results = capture(lambda: layer(x))
        x.copy_(other)
        graph.replay()
        expected = layer(other)
    for computed, eager in zip(results, expected, strict=True):
        assert torch.equal(computed, eager)


def test_graph_of_training() -> None:
    layer = make_layer(CIFAR10[1]).to(DEVICE)
    x, upstream = inputs(CIFAR10[1], torch.float32)
    other, by_other = inputs(CIFAR10[1], torch.float32)
    with mint.use_backend("triton"):
        graph, computed = capture(lambda: step(layer, x, upstream))
        for old, new in zip((x, *upstream), (other, *by_other), strict=True):
            old.copy_(new)
        graph.replay()
        expected = step(layer, other, by_other)
    assert_same(computed, expected)


def solve(layer: mint.MintLayer, z: Tensor, iterations: int, tolerance: float) -> Any:
    """Algorithm 1 by the kernels alone."""
    weights = layer.raw_weights()
    assert layer.ordering is not None
    structure = Structure(layer.ordering.order, layer.ordering.triangle, "elu")
    packed = mint_layer.packed(weights, z.dtype, "ieee", structure)
    start = z / layer.positive_t()
    arguments = (weights, structure, 1.0, iterations, tolerance)
    return inversion.fixed_point(z, start, packed, *arguments)


@torch.no_grad()
@pytest.mark.parametrize("scale", [CIFAR10[0], MNIST[0]], ids=str)
def test_graph_of_inversion(scale: Scale) -> None:
    layer = make_layer(scale).to(DEVICE)
    with mint.use_backend("torch"):
        z, other = (layer(inputs(scale, torch.float32)[0])[0] for _ in range(2))
    graph, results = capture(lambda: solve(layer, z, 40, 1e-5))
    z.copy_(other)
    graph.replay()
    eager = solve(layer, other, 40, 1e-5)
    for computed, expected in zip(results, eager, strict=True):
        assert torch.equal(computed, expected)


@torch.no_grad()
def test_graph_of_the_inversion_of_a_network() -> None:
    net = mint.MintNet(3, 16, pairs=3, hidden=16, squeezes=1).to(DEVICE)
    solver = mint.FixedPoint(iterations=20, coarse=True)
    z, other = torch.randn(2, 8, *net.latent_shape, device=DEVICE)
    with mint.use_backend("triton"):
        graph, result = capture(lambda: mint.invert(net, z, solver))
        z.copy_(other)
        graph.replay()
        expected = mint.invert(net, other, solver)
    assert bool(expected.converged.all())
    assert torch.equal(result.x, expected.x)
    assert torch.equal(result.residual, expected.residual)


def test_another_stream() -> None:
    layer = make_layer(CIFAR10[1]).to(DEVICE)
    x, upstream = inputs(CIFAR10[1], torch.float32)
    with mint.use_backend("triton"):
        expected = step(layer, x, upstream)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            computed = step(layer, x, upstream)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
    assert_same(computed, expected)


@torch.no_grad()
def test_frozen_weights_on_two_streams() -> None:
    layer = make_layer(CIFAR10[1]).to(DEVICE)
    x, _ = inputs(CIFAR10[1], torch.float32)
    with mint.use_backend("triton"):
        expected = layer(x)
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        with mint.frozen(layer):
            torch.cuda.synchronize()
            with torch.cuda.stream(first):
                torch.cuda._sleep(200_000_000)  # cycles: the weights are packed late
                layer(x)
            with torch.cuda.stream(second):
                computed = layer(x)
            torch.cuda.synchronize()
    for one, other in zip(computed, expected, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("packed", ["before", "inside"])
def test_frozen_weights_in_a_graph(packed: str) -> None:
    layer = make_layer(CIFAR10[1]).to(DEVICE)
    x, _ = inputs(CIFAR10[1], torch.float32)
    graph = torch.cuda.CUDAGraph()
    with mint.use_backend("triton"):
        expected = layer(x)  # compiles, too
        with mint.frozen(layer):
            if packed == "before":
                layer(x)
            with torch.cuda.graph(graph):
                of_graph = layer(x)
            eager = layer(x)
            graph.replay()
    for results in (eager, of_graph):
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other)


def test_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    layer = make_layer(CIFAR10[1]).to(DEVICE)
    x, upstream = inputs(CIFAR10[1], torch.float32)
    with mint.use_backend("triton"):
        expected = step(layer, x, upstream)
        other = (upstream[0].to("cuda:1"), upstream[1].to("cuda:1"))
        computed = step(copy.deepcopy(layer).to("cuda:1"), x.to("cuda:1"), other)
    here = {name: value.to(DEVICE) for name, value in computed.items()}
    assert_close(here, expected, 1e-6)


def memory_of(work: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that remain allocated after the work while its result lives, the peak, the result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    return held, torch.cuda.max_memory_allocated() - before, result


def bytes_of_hidden(scale: Scale, batch: int) -> int:
    """Of a hidden layer in float32."""
    positions = Canvas(scale.size, scale.size, 1).positions(batch) + TAIL
    return 4 * positions * launching.padded(scale.channels * scale.hidden)


def test_memory() -> None:
    scale, batch = CIFAR10[0], 128
    layer = make_layer(scale).to(DEVICE)
    x, upstream = inputs(scale, torch.float32, batch)
    hidden = bytes_of_hidden(scale, batch)
    with mint.use_backend("triton"):
        step(layer, x, upstream)  # compiles, and allocates what stays
        layer.zero_grad()
        held, _, results = memory_of(lambda: layer(x))
        del results
        _, peak, _ = memory_of(lambda: torch.autograd.backward(layer(x), upstream))
    # Both hidden layers are kept, and backward adds a gradient and the slopes of each.
    assert held <= 2.2 * hidden
    assert peak <= 6.6 * hidden


def test_recomputation_saves_memory() -> None:
    scale, batch, depth = CIFAR10[0], 64, 4
    layers = [make_layer(scale).to(DEVICE) for _ in range(depth)]
    module = nn.ModuleList(layers)
    x, _ = inputs(scale, torch.float32, batch)
    hidden = bytes_of_hidden(scale, batch)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in layers:
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    found = []
    with mint.use_backend("triton"):
        for recompute in (False, True):
            for layer in layers:
                layer.recompute = recompute
            gradients_of(module, forward, x)
            module.zero_grad()
            _, peak, results = memory_of(lambda: gradients_of(module, forward, x))
            found.append((peak, results))
    (kept, expected), (recomputed, computed) = found
    assert_same(computed, expected)
    assert recomputed <= kept - (depth - 1) * hidden


@torch.no_grad()
def test_more_than_2_to_the_31_elements() -> None:
    scale, batch = CIFAR10[0], 8200
    stride = launching.padded(scale.channels * scale.hidden)
    assert batch * scale.size**2 * stride > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip("needs 40 GiB of free memory")
    layer = make_layer(scale).to(DEVICE, torch.float16)
    x, _ = inputs(scale, torch.float16, batch)
    with mint.use_backend("triton"):
        y, log_det = layer(x)
        for some in (slice(0, 4), slice(4094, 4098), slice(8190, 8200)):
            y_alone, log_det_alone = layer(x[some].contiguous())
            assert relative_rms(y[some], y_alone.double()) <= 1e-3
            assert relative_rms(log_det[some], log_det_alone.double()) <= 1e-5
    torch.cuda.empty_cache()


@pytest.mark.parametrize("numbers", ["float32", "float64"])
@SCALES
def test_inversion(scale: Scale, numbers: str) -> None:
    dtype = dtype_of(numbers)
    layer = make_layer(scale).to(DEVICE, dtype)
    x, _ = inputs(scale, dtype)
    exact = copy.deepcopy(layer).double()
    solver = mint.FixedPoint(iterations=100)
    with torch.no_grad(), mint.use_backend("torch"):
        z, log_det = (one.to(dtype) for one in exact(x.double()))
        reference = mint.invert(layer, z, solver)
    with mint.use_backend("triton"):
        result = mint.invert(layer, z, solver)
    assert result.converged.all()
    assert result.residual.max() <= result.tolerance
    # The residual is not only said to be small.
    with torch.no_grad(), mint.use_backend("torch"):
        back, _ = exact(result.x.double())
    scales = z.double().abs().flatten(1).amax(1).clamp(min=1)
    residual = (back - z.double()).abs().flatten(1).amax(1) / scales
    assert residual.max() <= 2 * result.tolerance
    near = 1e-3 if numbers == "float32" else 1e-10
    assert relative_rms(result.x, x.double()) <= near
    assert relative_rms(result.x, reference.x.double()) <= near
    assert relative_rms(result.log_det, -log_det.double()) <= near
    assert (result.iterations - reference.iterations).abs().max() <= 5


@torch.no_grad()
@pytest.mark.parametrize("numbers", ["float32", "float64"])
@SCALES
def test_inversions_are_equal(scale: Scale, numbers: str) -> None:
    dtype = dtype_of(numbers)
    layer = make_layer(scale).to(DEVICE, dtype)
    with mint.use_backend("torch"):
        z, _ = layer(inputs(scale, dtype)[0])
    first, second = (solve(layer, z, 40, 1e-5) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_an_inversion_in_plain_pytorch_never_takes_tensorfloat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(CIFAR10[0]).to(DEVICE)
    x, _ = inputs(CIFAR10[0], torch.float32, 4)
    solver = mint.FixedPoint(iterations=100)
    with mint.use_backend("torch"), precision_of("tf32"):
        z, _ = layer(x)
        expected = mint.invert(layer, z, solver)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        rounded, _ = layer(x)
        assert relative_rms(rounded, z.double()) > 1e-5  # else there is nothing to see
        computed = mint.invert(layer, z, solver)
    assert relative_rms(computed.x, expected.x.double()) <= 1e-6


def test_trace_of_inversion() -> None:
    layer = make_layer(MNIST[0]).to(DEVICE)
    x, _ = inputs(MNIST[0], torch.float32, 4)
    solver = mint.FixedPoint(iterations=30)
    with mint.use_backend("triton"):
        z, _ = layer(x)
        result = mint.invert(layer, z.detach(), solver, trace=True)
    assert result.trace is not None
    (trace,) = result.trace
    assert trace.shape == (30, 4)
    assert torch.equal(trace[-1], result.residual)


@torch.no_grad()
def test_inversion_does_not_wait_for_the_gpu() -> None:
    layer = make_layer(CIFAR10[1]).to(DEVICE)
    x, _ = inputs(CIFAR10[1], torch.float32)
    solver = mint.FixedPoint(iterations=inversion.STRIDE - 2, tolerance=0)
    with mint.use_backend("triton"):
        z, _ = layer(x)
        expected = layer.solve(z, solver, trace=True, reference=None)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            computed = layer.solve(z, solver, trace=True, reference=None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(computed.x, expected.x)


SANITIZED = """
import torch
import mintnet_triton as mint

torch.manual_seed(0)
with mint.use_backend("triton"):
    # A training step, and an inversion: few variants, for each takes seconds to compile.
    layer = mint.MintLayer(3, 6, 5, "lower").to("cuda", torch.float16)
    x = torch.randn(3, 3, 6, 6, device="cuda", dtype=torch.float16, requires_grad=True)
    y, log_det = layer(x)
    torch.autograd.backward((y, log_det), (torch.randn_like(y), torch.randn_like(log_det)))
    layer = mint.MintLayer(5, 3, 3, "upper").to("cuda")
    solver = mint.FixedPoint(iterations=20)
    layer.inverse(torch.randn(3, 5, 3, 3, device="cuda"), solver=solver)
torch.cuda.synchronize()
print("done")
"""


def run_within(seconds: float, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output; a status below zero and nothing if it takes longer."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the program that it runs as well
            return -signal.SIGKILL, ""
        return process.returncode, output


def test_compute_sanitizer() -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        pytest.skip("compute-sanitizer is not installed")
    # Without a cache of memory, each tensor has bounds of its own.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [sys.executable, "-c", SANITIZED]
    # First without it: kernels are compiled, and an error of the script itself shows.
    status, output = run_within(150, script, environment)
    if status < 0:
        pytest.skip("compiling takes longer than it may here")
    assert status == 0, output[-3000:]
    checked = [program, "--error-exitcode", "9", "--tool"]
    commands = [
        # But for errors of libraries that try what is not there.
        [*checked, "memcheck", "--report-api-errors", "no", *script],
        [*checked, "racecheck", *script],
    ]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda command: run_within(90, command, environment), commands))
    for status, output in results:
        if "SUMMARY" in output:
            assert status == 0, output[-3000:]
            assert "done" in output
    if not all("SUMMARY" in output for _, output in results):
        pytest.skip(f"some tools do not run here, or take too long: {results}"[-500:])
