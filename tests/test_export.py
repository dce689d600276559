"""Graphs of networks: compiled once for all batches, and exported to run without this package."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import mintnet_triton as mint

#: no size is that of a batch below, for torch takes sizes that are equal at first for the same one
SHAPE = (3, 8, 4)
KINDS = ("layer", "pair", "flow")
Module = TypeVar("Module", bound=nn.Module)
Graphed = tuple[Tensor, ...]


def mostly_full(*kept: str) -> list[Any]:
    """Kinds of module, most of them in full runs alone."""
    kinds = (*KINDS, "log_prob")
    return [kind if kind in kept else pytest.param(kind, marks=pytest.mark.full) for kind in kinds]


def make(kind: str, shape: tuple[int, int, int] = SHAPE) -> mint.Invertible:
    channels, *size = shape
    makers: dict[str, Callable[[], mint.Invertible]] = {
        "layer": lambda: mint.MintLayer(channels, size, 4),
        "pair": lambda: mint.MintPair(channels, size, 4),
        "flow": lambda: mint.MintNet(channels, size, pairs=2, hidden=4, squeezes=1),
    }
    return moved(makers[kind]())


def moved(module: Module) -> Module:
    """Far from the identity, so that no log-determinant is nearly zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 3), std=0.2)
    return module


class LogProb(nn.Module):
    """Of a flow of two layers, for a graph takes seconds to make."""

    def __init__(self) -> None:
        super().__init__()
        channels, *size = SHAPE
        self.flow = moved(mint.MintNet(channels, size, pairs=1, hidden=4, squeezes=0))

    def forward(self, x: Tensor) -> Graphed:
        return (self.flow.log_prob(x),)


# ---------------------------------------------------------------- compiled


#: what torch's compiler does itself to a function with a gradient of its own
TORCHS_OWN = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@TORCHS_OWN
@pytest.mark.parametrize(
    ("kind", "training"),
    [(kind, True) for kind in ("layer", "log_prob")]
    + [("layer", False)]
    + [
        pytest.param(kind, training, marks=pytest.mark.full)
        for kind, training in (("pair", True), ("flow", True), ("pair", False), ("log_prob", False))
    ],
)
def test_one_graph_for_all_batches_and_one_for_a_single_sample(kind: str, training: bool) -> None:
    module = LogProb() if kind == "log_prob" else make(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for batch, graphs in ((2, 1), (17, 1), (64, 1), (1, 2), (5, 2)):
        x = torch.randn(batch, *SHAPE, requires_grad=training)
        with torch.set_grad_enabled(training):
            found, expected = compiled(x), module(x)
        torch.testing.assert_close(found, expected)
        if training:
            weights = [torch.randn_like(one) for one in expected]
            tensors = [x, *module.parameters()]
            by_found, by_expected = (
                torch.autograd.grad(results, tensors, weights) for results in (found, expected)
            )
            torch.testing.assert_close(by_found, by_expected, rtol=1e-4, atol=1e-4)
        # Where torch thinks again of a number, it begins anew and leaves an empty graph behind.
        whole = [graph for graph in counter.graphs if len(graph.graph.nodes)]
        assert len(whole) == graphs, f"a batch of {batch}"


@TORCHS_OWN
def test_a_compiled_layer_under_checkpointing() -> None:
    layer = make("layer")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 17):
        x = torch.randn(batch, *SHAPE, requires_grad=True)
        results = checkpoint(compiled, x, use_reentrant=False)
        torch.testing.assert_close(results, layer(x))
        found, expected = (torch.autograd.grad(y.sin().sum(), x) for y in (results[0], layer(x)[0]))
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- exported


def exported(
    kind: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, torch.export.ExportedProgram]:
    module: nn.Module = LogProb() if kind == "log_prob" else make(kind)
    module = module.to(dtype)
    batch = torch.export.Dim("batch", min=1, max=1024)
    x = torch.randn(3, *SHAPE, dtype=dtype)
    return module, torch.export.export(module, (x,), dynamic_shapes=({0: batch},))


IN_A_FRESH_PROCESS = """
import sys
for name in ("mintnet_triton", "numba", "triton", "safetensors"):
    sys.modules[name] = None
import pathlib
import torch
files = sorted(pathlib.Path(sys.argv[1]).glob("*.pt2"))
for file in files:
    program = torch.export.load(file).module()
    cases = torch.load(file.with_suffix(".pt"))
    for x, expected in cases:
        torch.testing.assert_close(tuple(program(x)), expected)
    try:
        program(torch.randn(2, 3, 8, 5, dtype=x.dtype))
    except (AssertionError, RuntimeError) as error:
        assert "size()[3] == 4" in str(error), error
    else:
        raise SystemExit("another width was taken")
print(len(files))
"""


def test_exported_programs_run_where_this_package_is_not(tmp_path: Path) -> None:
    kinds = {"layer": torch.float64, "log_prob": torch.float32}
    for kind, dtype in kinds.items():
        module, program = exported(kind, dtype)
        file = tmp_path / f"{kind}.pt2"
        torch.export.save(program, file)
        inputs = [torch.randn(batch, *SHAPE, dtype=dtype) for batch in (1, 2, 7)]
        with torch.no_grad():
            torch.save([(x, module(x)) for x in inputs], file.with_suffix(".pt"))
    run = subprocess.run(
        [sys.executable, "-I", "-c", IN_A_FRESH_PROCESS, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "2"


#: of torch's exporter, of its own doing
EXPORTERS_OWN = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


@EXPORTERS_OWN
@pytest.mark.parametrize("kind", mostly_full("layer"))
def test_an_exported_program_decomposes_into_functions(kind: str) -> None:
    """As compilers for other machines want it: torch's core operators, none of which writes."""
    module, program = exported(kind)
    functional = program.run_decompositions()
    operators = [node.target for node in functional.graph.nodes if node.op == "call_function"]
    for operator in operators:
        if isinstance(operator, torch._ops.OpOverload):
            assert operator.namespace == "aten", operator
            assert not operator._schema.is_mutable, operator
            # It stands for writing into a part of a tensor, which ONNX has no word for.
            assert "diagonal_scatter" not in operator.name()
    x = torch.randn(5, *SHAPE)
    torch.testing.assert_close(tuple(functional.module()(x)), tuple(module(x)))


@EXPORTERS_OWN
@pytest.mark.parametrize("kind", mostly_full("log_prob"))
def test_onnx(kind: str, tmp_path: Path) -> None:
    """The exporter's graph, computed by the reference implementation of the standard."""
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    module, program = exported(kind)
    onnx = torch.onnx.export(program, (), dynamo=True, verbose=False)
    assert onnx is not None
    onnx.save(tmp_path / "model.onnx")
    evaluator = reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    (name,) = evaluator.input_names
    for batch in (1, 2, 7):
        x = torch.randn(batch, *SHAPE)
        found = tuple(torch.from_numpy(one) for one in evaluator.run(None, {name: x.numpy()}))
        with torch.no_grad():
            torch.testing.assert_close(found, tuple(module(x)), rtol=1e-4, atol=1e-4)


@TORCHS_OWN
@EXPORTERS_OWN
def test_a_layer_with_a_context() -> None:
    layer = moved(mint.MintLayer(SHAPE[0], SHAPE[1:], 4, context=5))

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, *SHAPE), torch.randn(batch, 5)

    any_batch = ({0: torch.export.Dim("batch")},) * 2
    program = torch.export.export(layer, inputs(2), dynamic_shapes=any_batch)
    functional = program.run_decompositions().module()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for batch, graphs in ((2, 1), (17, 1), (1, 2)):
        given = inputs(batch)
        expected = layer(*given)
        torch.testing.assert_close(tuple(functional(*given)), expected)
        torch.testing.assert_close(compiled(*given), expected)
        assert counter.frame_count == graphs


# ---------------------------------------------------------------- transformed


@pytest.mark.parametrize("kind", KINDS)
def test_jacobians_of_a_network_and_its_inverse(kind: str) -> None:
    """By torch.func, forwards and backwards, against each other and the log-determinant."""
    module = make(kind, (2, 4, 2)).double()
    x = torch.randn(1, *(2, 4, 2), dtype=torch.float64)
    y, log_det = (one.detach() for one in module(x))

    def jacobian(
        transform: Callable[..., Callable[[Tensor], Tensor]],
        function: Callable[[Tensor], Graphed],
        at: Tensor,
    ) -> Any:
        matrix = transform(lambda v: function(v)[0])(at)
        return torch.as_tensor(matrix).reshape(16, 16)

    backward = jacobian(torch.func.jacrev, module, x)
    torch.testing.assert_close(jacobian(torch.func.jacfwd, module, x), backward)
    torch.testing.assert_close(torch.linalg.slogdet(backward)[1], log_det[0])
    identity = torch.eye(16, dtype=torch.float64)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        inverse = jacobian(transform, module.inverse, y)
        torch.testing.assert_close(inverse @ backward, identity, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_parameters_and_inputs_by_functions(kind: str) -> None:
    module = make(kind, (2, 4, 2)).double()
    x = torch.randn(3, *(2, 4, 2), dtype=torch.float64)
    parameters = {name: one.detach() for name, one in module.named_parameters()}
    weight = torch.randn_like(module(x)[0])

    def loss(named: dict[str, Tensor], v: Tensor) -> Tensor:
        y, log_det = torch.func.functional_call(module, named, (v,))
        return torch.as_tensor((weight * y).sum() + log_det.square().sum())

    by_parameters, by_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(
        loss(dict(module.named_parameters()), leaf), [*module.parameters(), leaf]
    )
    torch.testing.assert_close([*by_parameters.values(), by_x], list(expected))

    def inverse_loss(z: Tensor) -> Tensor:
        again, log_det = module.inverse(z)
        return again.sin().sum() + log_det.square().sum()

    z = module(x)[0].detach()
    by_z = torch.func.grad(inverse_loss)(z)
    leaf = z.clone().requires_grad_()
    torch.testing.assert_close(by_z, torch.autograd.grad(inverse_loss(leaf), leaf)[0])
