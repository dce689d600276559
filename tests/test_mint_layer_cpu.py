"""The layer as numba compiles it: against the same layer in float64, in plain PyTorch."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mintnet_triton as mint
from mintnet_triton import MintLayer, frozen, use_backend
from mintnet_triton.kernels import backend, work
from mintnet_triton.kernels.activation import NAMES
from mintnet_triton.kernels.cpu import threads as cpu_threads
from mintnet_triton.kernels.reference import Structure
from tests import grid

pytest.importorskip("numba")
from numba import types

from mintnet_triton.kernels.cpu import canvas as cpu_canvas
from mintnet_triton.kernels.cpu import mint_layer as cpu_mint_layer
from mintnet_triton.kernels.cpu import tiles as cpu_tiles
from mintnet_triton.kernels.cpu.canvas import SPAN, plan
from mintnet_triton.kernels.cpu.tiles import VECTOR

#: relative, root mean square; of gradients, where a kink is on either side of a rounded number
TOLERANCE, OF_GRADIENTS = 5e-6, 2e-5


def make_layer(
    colours: int = 3, size: Any = (5, 6), hidden: int = 5, seed: int = 0, **arguments: Any
) -> MintLayer:
    """Far from the identity, with positive and negative t."""
    torch.manual_seed(seed)
    layer = MintLayer(colours, size, hidden, initialisation="classifier", **arguments)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
        layer.t.uniform_(0.3, 2).mul_(torch.randn_like(layer.t).sign())
    return layer


def gradients(layer: MintLayer, x: Tensor, upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Results and gradients by name."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, log_det = layer(x)
    torch.autograd.backward((y, log_det), upstream)
    named = {name: parameter.grad for name, parameter in layer.named_parameters()}
    found = {"y": y, "log_det": log_det, "x": x.grad, **named}
    return {name: value.detach() for name, value in found.items() if value is not None}


def assert_close(computed: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert computed.keys() == expected.keys()
    for name, value in computed.items():
        error = (value.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        tolerance = TOLERANCE if name in ("y", "log_det") else OF_GRADIENTS
        assert error < tolerance, f"{name}: {error:.1e}"


def compare(layer: MintLayer, x: Tensor) -> None:
    """Everything that a training step computes, with what float64 gives."""
    upstream = torch.randn_like(x), torch.randn(len(x))
    computed = gradients(layer, x, upstream)
    with use_backend("torch"):
        expected = gradients(
            layer.double(), x.double(), (upstream[0].double(), upstream[1].double())
        )
    assert_close(computed, expected)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of the compiled layer: a test of anything else would prove nothing."""
    calls: list[int] = []
    run = cpu_mint_layer.run_forward

    def counting(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        calls.append(len(x))
        return run(x, *arguments, **keywords)

    monkeypatch.setattr(cpu_mint_layer, "run_forward", counting)
    return calls


@grid.over(
    lambda case: grid.FULL or case.get("colours", 1) * case.get("hidden", 1) <= 1100,
    main=["colours", "hidden", "order", "triangle"],
    colours=[1, 3, 4, 12, 48],
    hidden=[1, 2, 5, 21, 45],
    order=["channel", "pixel"],
    triangle=["lower", "upper"],
    kernel_size=[3, 1, (1, 3, 5), (5, 3, 1)],
    size=[(5, 6), (1, 7), (8, 1), (2, 2)],
    batch=[3, 1, 7],
    activation=["elu", *NAMES],
)
def test_layer_and_gradients(case: dict[str, Any], compiled: list[int]) -> None:
    arguments = {name: case[name] for name in ("order", "triangle", "kernel_size", "activation")}
    layer = make_layer(case["colours"], case["size"], case["hidden"], **arguments)
    torch.manual_seed(1)
    compare(layer, torch.randn(case["batch"], case["colours"], *case["size"]))
    assert compiled


@pytest.mark.parametrize("batch", [2, 3, 5, 8, 17])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_samples_are_independent(batch: int, threads: int, compiled: list[int]) -> None:
    layer = make_layer(size=(4, 3))
    x = torch.randn(batch, 3, 4, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            y, log_det = layer(x)
            alone = [layer(one.unsqueeze(0).repeat(2, 1, 1, 1)) for one in x]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y, torch.cat([one[0][:1] for one in alone]), rtol=0, atol=0)
    torch.testing.assert_close(log_det, torch.cat([one[1][:1] for one in alone]))
    assert compiled


def test_variables_that_are_not_seen_do_not_matter() -> None:
    layer = make_layer(2, (4, 4), 9)
    weights = layer.effective_weights()
    x = torch.randn(2, 2, 4, 4)
    later = torch.zeros_like(x, dtype=torch.bool)
    later[:, 0, 2, 2:] = later[:, 0, 3] = later[:, 1] = True
    structure = Structure("channel", "lower", "elu")
    with torch.no_grad():
        results = [
            cpu_mint_layer.mint_forward(x.masked_fill(later, value), weights, structure)
            for value in (0.0, float("nan"))
        ]
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean[~later], poisoned[~later])
        assert poisoned[later].isnan().any()


def test_memory_that_is_not_cleared_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies around the lines of a canvas is written before it is read."""
    empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(float("nan"))
    )
    compare(make_layer(size=(3, 5), kernel_size=(3, 5, 3)), torch.randn(5, 3, 3, 5))


def test_recomputed_hidden_layers_are_the_same() -> None:
    layer, x = make_layer(), torch.randn(4, 3, 5, 6)
    upstream = torch.randn_like(x), torch.randn(4)
    kept = gradients(layer, x, upstream)
    layer.recompute = True
    again = gradients(layer, x, upstream)
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name


def test_frozen_weights_and_the_map_alone() -> None:
    layer, x = make_layer(), torch.randn(4, 3, 5, 6)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer.transform(x), expected[0])
        with mint.frozen(layer):
            for _ in range(2):
                for computed, value in zip(layer(x), expected, strict=True):
                    assert torch.equal(computed, value)


def test_a_negated_view_of_frozen_layers() -> None:
    layer, x = make_layer(), torch.randn(4, 3, 5, 6)
    with torch.no_grad(), mint.frozen(layer):
        assert torch.equal(layer(torch._neg_view(x))[0], layer(-x)[0])


def test_gradient_of_the_map_alone() -> None:
    layer, x = make_layer(), torch.randn(4, 3, 5, 6)
    upstream = torch.randn_like(x)
    results = []
    for dtype, name in ((torch.float32, "auto"), (torch.float64, "torch")):
        own = x.clone().to(dtype).requires_grad_()
        layer.to(dtype).zero_grad()
        with use_backend(name):
            y = layer.transform(own)
        y.backward(upstream.to(dtype))
        assert own.grad is not None
        assert layer.conv2.weight.grad is not None
        results.append({"x": own.grad, "weight": layer.conv2.weight.grad.clone()})
    assert_close(results[0], results[1])


def test_some_gradients_alone() -> None:
    layer, x = make_layer(), torch.randn(4, 3, 5, 6)
    layer.requires_grad_(False)
    own = x.clone().requires_grad_()
    layer(own)[1].sum().backward()
    layer.requires_grad_(True)
    upstream = torch.zeros_like(x), torch.ones(4)
    assert own.grad is not None
    torch.testing.assert_close(own.grad, gradients(layer, x, upstream)["x"])
    layer.zero_grad()
    layer(x)[1].sum().backward()  # x needs none
    assert layer.t.grad is not None


def test_second_derivatives() -> None:
    layer, x = make_layer(size=(3, 3), activation="tanh"), torch.randn(2, 3, 3, 3)
    upstream = torch.randn_like(x), torch.randn(2)

    def of_penalty(layer: MintLayer, x: Tensor, upstream: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        layer.zero_grad()
        first = torch.autograd.grad(layer(x), (x, layer.conv2.weight), upstream, create_graph=True)
        sum(one.square().sum() for one in first).backward()  # type: ignore[union-attr]
        named = dict(layer.named_parameters()) | {"x": x}
        found = {name: one.grad for name, one in named.items() if one.grad is not None}
        return {name: grad.clone() for name, grad in found.items() if grad.any()}

    computed = of_penalty(layer, x, upstream)
    with use_backend("torch"):
        exact = tuple(one.double() for one in upstream)
        assert_close(computed, of_penalty(layer.double(), x.double(), exact))


def test_transforms_take_the_plain_path(compiled: list[int]) -> None:
    layer, x = make_layer(), torch.randn(4, 3, 5, 6)
    by_transform = torch.func.grad(lambda x: layer(x)[1].sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        _, tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)[1])
    assert not compiled
    by_backward = gradients(layer, x, (torch.zeros_like(x), torch.ones(4)))["x"]
    torch.testing.assert_close(by_transform, by_backward)
    torch.testing.assert_close(tangent.sum(), by_backward.sum(), rtol=1e-4, atol=1e-4)
    assert compiled


def set_processor(monkeypatch: pytest.MonkeyPatch, *, vectors: bool, matrices: bool) -> None:
    """What it does in 16 bits."""
    monkeypatch.setattr(backend, "multiplies", lambda dtype: vectors)
    monkeypatch.setattr(backend, "multiplies_matrices", lambda dtype: matrices)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_autocast_in_float32_where_16_bits_are_emulated(
    half: torch.dtype, of_input: torch.dtype, of_weights: torch.dtype, name: str,
    monkeypatch: pytest.MonkeyPatch, compiled: list[int],
) -> None:  # fmt: skip
    layer = make_layer().to(of_weights)
    x = torch.randn(4, 3, 5, 6).to(of_input)
    conv, twin = layer.conv1, make_layer().float()
    twin.load_state_dict(layer.state_dict())
    upstream = torch.randn(4, 3, 5, 6), torch.randn(4)

    def step() -> dict[str, Tensor]:
        with torch.autocast("cpu", half), use_backend(name):
            inputs = x.clone().requires_grad_()
            layer.zero_grad()
            y, log_det = layer(inputs)
            of_conv, of_map = conv(x).detach(), layer.transform(x).detach()
        torch.autograd.backward((y, log_det), (upstream[0].to(y), upstream[1].to(log_det)))
        by_weights = {
            key: one.grad for key, one in layer.named_parameters() if one.grad is not None
        }
        results = {"y": y, "log_det": log_det, "conv": of_conv, "map": of_map}
        return results | {"x": inputs.grad} | by_weights

    set_processor(monkeypatch, vectors=True, matrices=True)
    plain = step()
    assert not compiled
    set_processor(monkeypatch, vectors=False, matrices=False)
    found = step()
    assert bool(compiled) == (name == "auto")
    assert {key: one.dtype for key, one in found.items()} == {
        key: one.dtype for key, one in plain.items()
    }
    with use_backend("torch"):
        exact = gradients(twin, x.float(), upstream)
        exact["conv"], exact["map"] = twin.conv1(x.float()), exact["y"]
    assert torch.equal(found["conv"], exact["conv"].to(half))  # rounded once
    for key, one in found.items():
        error = (one.detach().float() - exact[key]).norm() / exact[key].norm()
        # Only what comes and goes in 16 bits is rounded to them.
        assert error < (1e-5 if one.dtype == torch.float32 and of_input == torch.float32 else 1e-2)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_of_layers_on_vector_units(
    half: torch.dtype, monkeypatch: pytest.MonkeyPatch, compiled: list[int]
) -> None:
    """The compiled layer is as fast, a convolution alone and plain PyTorch are not."""
    layer, x = make_layer(), torch.randn(4, 3, 5, 6)
    expected = layer(x)
    compiled.clear()
    set_processor(monkeypatch, vectors=True, matrices=False)
    with torch.autocast("cpu", half), torch.no_grad():
        for one, other in zip(layer(x), expected, strict=True):
            assert torch.equal(one, other)
        with frozen(layer):
            assert torch.equal(layer(x)[0], expected[0])
        assert len(compiled) == 2
        with use_backend("torch"):
            assert not torch.allclose(layer(x)[0], expected[0], rtol=1e-5, atol=1e-6)
        rounded = layer.conv1(x)
    assert len(compiled) == 2
    assert rounded.dtype == half
    exact = layer.conv1(x)
    assert not torch.equal(rounded, exact.to(half))  # products of rounded numbers, too


def test_autocast_leaves_float64_as_it_is(
    monkeypatch: pytest.MonkeyPatch, compiled: list[int]
) -> None:
    layer, x = make_layer().double(), torch.randn(4, 3, 5, 6, dtype=torch.float64)
    set_processor(monkeypatch, vectors=False, matrices=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    for one, other in zip(found, layer(x), strict=True):
        assert one.dtype == torch.float64
        assert torch.equal(one, other)
    assert not compiled


def test_what_the_processor_multiplies() -> None:
    """As oneDNN says, which can be told of a lesser one."""
    script = """
import torch
from mintnet_triton.kernels import backend
for dtype in (torch.bfloat16, torch.float16):
    assert not backend.multiplies(dtype)
    assert not (backend.multiplies_matrices(dtype) and backend.multiplies(dtype))
"""
    lesser = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", script], env=lesser, check=True)


def test_few_samples_for_many_threads_take_the_plain_path(
    compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    with torch.no_grad():
        make_layer()(torch.randn(2, 3, 5, 6))
    assert not compiled


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_operators_are_well_formed_and_compile() -> None:
    layer, x = make_layer(), torch.randn(4, 3, 5, 6)
    weights = layer.effective_weights()
    parts = [part.detach() for part in (*weights[:6], weights.t)]
    structure = ("channel", "lower", "elu")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        cpu_mint_layer.layer_op, (x, *parts, *structure, True, True, 2), test_utils=tests
    )
    _, diagonal, h1, h2 = cpu_mint_layer.layer_op(x, *parts, *structure, True, True, 2)
    for by_weights in (True, False):
        arguments = (x, h1, h2, x, diagonal, *parts[:6:2], parts[6], *structure, by_weights, 2)
        torch.library.opcheck(cpu_mint_layer.backward_op, arguments, test_utils=tests)
    upstream = torch.randn_like(x), torch.randn(4)
    expected = gradients(layer, x, upstream)
    layer.compile(backend="aot_eager", fullgraph=True)
    for name, value in gradients(layer, x, upstream).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_graph_is_for_batches_of_many_sizes() -> None:
    layer = make_layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for batch in (4, 7, 33):
        x = torch.randn(batch, 3, 5, 6)
        torch._dynamo.mark_dynamic(x, 0)  # raises if the size becomes part of the graph
        y, log_det = compiled(x)
        torch.testing.assert_close((y, log_det), layer(x))
        torch.autograd.backward((y.sum(), log_det.sum()))


@pytest.mark.parametrize("own_threads", [False, True])
def test_sharing_work(own_threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if own_threads:
        monkeypatch.setattr(cpu_threads, "_openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    done: list[int] = []
    cpu_threads.share(range(10), done.append)
    assert sorted(done) == list(range(10))

    def fail(part: int) -> None:
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part"):
        cpu_threads.share(range(10), fail)
    compare(make_layer(), torch.randn(4, 3, 5, 6))


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize(
    ("colours", "units", "waste"), [(3, 85, 1.0), (12, 21, 1.0), (48, 5, 1.05), (16, 2, 1.1)]
)
def test_what_the_mask_hides_is_skipped(
    colours: int, units: int, waste: float, order: str, triangle: str
) -> None:
    """Multiply-adds of one pixel, of those that the mask leaves."""
    found = plan(units, units, colours, 3, order, triangle)
    assert sum(found.tiles[:, 1]) == colours * units
    exact = work.exact(units, units, colours, 3, order, triangle)
    assert exact <= found.size <= waste * exact


class Stub(types.WrapperAddressProtocol):
    """In place of an innermost loop: a Python function that gets its integers."""

    def __init__(self, arguments: int, function: Callable[..., None]) -> None:
        self.arguments = arguments
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)
        self.callback = kind(function)

    def __wrapper_address__(self) -> int:
        address = ctypes.cast(self.callback, ctypes.c_void_p).value
        assert address is not None
        return address

    def signature(self) -> Any:
        return types.void(*[types.int64] * self.arguments)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every call of the innermost loops, the multiply-adds; nothing is multiplied."""
    calls: list[int] = []

    def add(*numbers: int) -> None:
        rows, vectors, *_, runs, count = numbers
        table = (ctypes.c_int64 * (3 * count)).from_address(runs)
        calls.append(rows * vectors * VECTOR * sum(table[1::3]))

    def dot(outputs: int, inputs: int, *numbers: int) -> None:
        rows, vectors = numbers[-2:]
        calls.append(outputs * inputs * rows * vectors * VECTOR)

    loops = cpu_tiles.LOOPS._replace(add=Stub(9, add), dot=Stub(11, dot))
    monkeypatch.setattr(cpu_mint_layer, "LOOPS", loops)
    return calls


# Where nothing is multiplied, what is added up is whatever was in memory.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@grid.over(
    lambda case: True,
    main=["shape", "of_weights", "recompute"],
    shape=[(3, 5, (5, 6)), (1, 31, (1, 7)), (48, 5, (2, 3)), (2, 20, (SPAN // 16, 3))],
    of_weights=[True, False],
    recompute=[False, True],
    order=["channel", "pixel"],
    triangle=["lower", "upper"],
    kernel_size=[3, 1, (1, 3, 5), (5, 3, 1)],
    batch=[3, 1, 7],
)
def test_declared_multiply_adds_are_done(case: dict[str, Any], done: list[int]) -> None:
    colours, hidden, size = case["shape"]
    arguments = {name: case[name] for name in ("order", "triangle", "kernel_size", "recompute")}
    layer = make_layer(colours, size, hidden, **arguments).requires_grad_(case["of_weights"])
    x = torch.zeros(case["batch"], colours, *size, requires_grad=True)

    def step() -> None:
        y, log_det = layer(x)
        (y.sum() + log_det.sum()).backward()

    def y_alone() -> None:
        weights = layer.effective_weights()
        structure = Structure(case["order"], case["triangle"], "elu")
        cpu_mint_layer.mint_forward(x, weights, structure, diagonal=False)

    for work_ in (step, y_alone):
        done.clear()
        with FlopCounterMode(display=False) as counter:
            work_()
        by_operator = counter.get_flop_counts()["Global"]
        declared = [
            flops for operator, flops in by_operator.items() if "mint_layer_cpu" in str(operator)
        ]
        assert len(declared) == 1 + (work_ is step)
        assert sum(declared) == 2 * sum(done) > 0


BARE = """
from numba.core import caching

caching.CacheImpl._locator_classes = []  # as where no folder can be written to
import torch
from mintnet_triton import MintLayer, frozen, use_backend
from mintnet_triton.kernels.cpu import tiles as cpu_tiles

assert cpu_tiles.VECTOR == 4
assert "llvm.fma." not in cpu_tiles.add_products.inspect_llvm()
torch.manual_seed(0)
layer, x = MintLayer(1, (2, 3), 2, initialisation="classifier"), torch.randn(3, 1, 2, 3)
with torch.no_grad():
    computed = layer(x)
    with use_backend("torch"):
        torch.testing.assert_close(computed, layer(x))
"""


def test_any_processor_without_a_cache() -> None:
    """Vectors and multiply-adds are those of the processor that numba is told to compile for."""
    settings = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", BARE], env=os.environ | settings, check=True)


def test_what_numba_keeps_has_no_sizes_of_another_file() -> None:
    """It would not see them change."""
    functions = [one.py_func for one in vars(cpu_canvas).values() if hasattr(one, "py_func")]
    assert cpu_canvas.add_tile.py_func in functions
    for function in functions:
        assert not {"VECTOR", *map(str.upper, cpu_tiles.Loops._fields)} & set(
            function.__code__.co_names
        ), function


def test_gradients_hold_no_more_memory_than_their_own() -> None:
    layer = make_layer()
    gradients(layer, torch.randn(4, 3, 5, 6), (torch.randn(4, 3, 5, 6), torch.randn(4)))
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        assert storage.nbytes() == parameter.numel() * parameter.element_size(), name
