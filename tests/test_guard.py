"""Nothing gets slower as far as it can be counted, and what is wrong does not pass for fast."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry

import mintnet_triton as mint

pytest.importorskip("triton")
pytest.importorskip("numba")

import triton

from bench import guard
from bench.contest import cases
from bench.count.counting import Counter, Figures, count_launches, count_operators
from mintnet_triton.kernels import backend, dispatch, mint_forward, work
from mintnet_triton.kernels.cpu import canvas as cpu_canvas
from mintnet_triton.kernels.cpu import mint_layer as cpu_mint_layer
from mintnet_triton.kernels.gpu import configs, launching, mint_layer
from mintnet_triton.kernels.gpu.convolution import output_kernel
from mintnet_triton.kernels.reference import Structure
from tests import test_compile
from tests.compiled import REPORT

ROOT = Path(__file__).parents[1]
VERSION, COMMITTED = guard.committed()


def compare(case: str) -> list[guard.Difference]:
    """What of a case differs from what is committed, as far as this version of torch tells."""
    now, before = {case: guard.all_cases()[case]()}, {case: COMMITTED.get(case, {})}
    if guard.torch_version() != VERSION:
        now, before = guard.portable(now), guard.portable(before)
    return guard.differences(now, before)


@pytest.mark.parametrize("case", guard.all_cases())
def test_no_count_has_changed(case: str) -> None:
    rows = compare(case)
    verdicts = {row.verdict for row in rows}
    assert not verdicts & {"worse", "gone"}, (
        f"slower than before:\n{guard.table(rows)}\n"
        "if the change is meant: python -m bench.guard --write"
    )
    assert not rows, (
        "better than before, or new: renew the figures by python -m bench.guard --write\n"
        f"{guard.table(rows)}"
    )
    if guard.torch_version() != VERSION and COMMITTED[case].keys() & guard.OF_TORCH:
        pytest.skip(f"multiply-adds are as committed; all else was counted with torch {VERSION}")


def test_no_case_is_gone() -> None:
    assert COMMITTED.keys() <= guard.all_cases().keys(), "python -m bench.guard --write"


def test_the_figures_are_of_the_pinned_torch() -> None:
    # Else all but multiply-adds would be skipped wherever that torch is installed.
    assert f"torch=={VERSION}" in (ROOT / "requirements.txt").read_text().split()


@pytest.mark.parametrize("scale", guard.SCALES, ids=str)
def test_nothing_is_hidden_from_the_count(scale: cases.Scale) -> None:
    """No middle convolution multiplies less than the mask leaves, unless it does so unseen."""
    colours, units, size = scale
    structure = (units, units, colours, 3, "channel", "lower", size, size)
    middle = guard.BATCH * work.exact_of_image(*structure)
    assert COMMITTED[f"torch, {scale}, forward"]["multiply-adds"] >= middle
    assert COMMITTED[f"compiled, {scale}, forward, frozen"]["compiled"] >= middle
    # The gradients by its inputs and by its weights take as much each.
    assert COMMITTED[f"torch, {scale}, training step"]["multiply-adds"] >= 3 * middle
    assert COMMITTED[f"compiled, {scale}, training step"]["compiled"] >= 3 * middle


@pytest.mark.parametrize("case", guard.compiled_cases())
def test_operators_declare_what_is_compiled(case: str) -> None:
    figures = COMMITTED[case]
    declared = 0 if case.endswith("frozen") else figures["compiled"]
    assert figures["multiply-adds"] == declared


@pytest.mark.parametrize("case", guard.compiled_cases())
def test_counts_do_not_depend_on_the_machine(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VECTOR": 4, "MOST": 6, "OUTPUTS": 3}.items():
        monkeypatch.setattr(cpu_mint_layer, name, value)
    assert not compare(case)


class Product(torch.autograd.Function):
    """A product whose backward pass is written by hand, and into memory at hand."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        by_b = torch.empty_like(b)
        torch.mm(a.mT, gradient, out=by_b)
        return gradient @ b.mT, by_b


def of_products(*shapes: tuple[int, ...], product: Callable[..., Tensor]) -> int:
    tensors = [torch.ones(shape) for shape in shapes]
    return count_operators(lambda: product(*tensors))["multiply-adds"]


def test_every_kind_of_product_is_counted() -> None:
    m, k, n, batch = 2, 3, 5, 7
    left, right, image = (m, k), (k, n), (batch, k, 4, 6)
    many = ((batch, m, k), (batch, k, n))
    out, outs = torch.empty(m, n), torch.empty(batch, m, n)
    product = m * k * n
    assert of_products(left, right, product=torch.mm) == product
    assert of_products(left, right, product=lambda a, b: torch.mm(a, b, out=out)) == product
    assert of_products((n,), left, right, product=torch.addmm) == product
    added = of_products(left, right, product=lambda a, b: torch.addmm(out, a, b, out=out))
    assert added == product
    assert of_products((m, n), left, right, product=lambda c, a, b: c.addmm_(a, b)) == product
    assert of_products(*many, product=torch.bmm) == batch * product
    assert of_products(*many, product=lambda a, b: torch.bmm(a, b, out=outs)) == batch * product
    assert of_products((m, n), *many, product=torch.baddbmm) == batch * product
    assert of_products((m, n), *many, product=torch.addbmm) == batch * product
    assert of_products(left, (k,), product=torch.mv) == m * k
    assert of_products((m,), left, (k,), product=torch.addmv) == m * k
    assert of_products((k,), (k,), product=torch.dot) == k
    assert of_products((m,), (n,), product=torch.outer) == 0  # it adds nothing up
    assert of_products((m, n), (m,), (n,), product=torch.addr) == m * n
    assert of_products(left, right, product=lambda a, b: torch.einsum("mk,kn", a, b)) == product
    assert of_products(left, (n, k), (n,), product=F.linear) == product
    conv = of_products(image, (n, k, 3, 3), product=lambda x, w: F.conv2d(x, w, padding="same"))
    assert conv == batch * 4 * 6 * 9 * k * n


def test_backward_passes_are_counted() -> None:
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    x, w = torch.ones(7, 3, 4, 6, requires_grad=True), torch.ones(5, 3, 3, 3, requires_grad=True)

    def by_hand() -> None:
        Product.apply(a, b).sum().backward()  # type: ignore[no-untyped-call]

    def convolution() -> None:
        F.conv2d(x, w, padding="same").sum().backward()

    def by_weights_alone() -> None:
        F.conv2d(x.detach(), w, padding="same").sum().backward()

    conv = 7 * 4 * 6 * 9 * 3 * 5
    assert count_operators(by_hand)["multiply-adds"] == 3 * 30
    assert count_operators(convolution)["multiply-adds"] == 3 * conv
    assert count_operators(by_weights_alone)["multiply-adds"] == 2 * conv


def test_bytes_allocations_and_peak_are_exact() -> None:
    x, y = torch.ones(10, 4), torch.ones(4)
    kilobyte = torch.Size([256])

    def add() -> None:
        torch.add(x, y.expand(10, 4))  # 160 and 16 bytes in, 160 out

    def view() -> None:
        x.view(4, 10).mT[1:].detach()

    def lives() -> None:
        first = torch.empty(kilobyte)
        second = torch.zeros(kilobyte)
        part = second[:1]  # keeps all of the second
        del first, second
        torch.empty(kilobyte)
        torch.empty(kilobyte)
        part.zero_()

    added, viewed, lived = (count_operators(one) for one in (add, view, lives))
    assert (added["bytes"], added["allocations"], added["peak bytes"]) == (336, 1, 160)
    assert (viewed["bytes"], viewed["allocations"], viewed["calls"]) == (0, 0, 4)
    assert lived["bytes"] == 1024 + 4  # the zeros, and the one that is set to zero
    assert (lived["allocations"], lived["allocated bytes"]) == (4, 4096)
    assert lived["peak bytes"] == 2048


def test_peak_holds_what_the_backward_pass_needs() -> None:
    x = torch.ones(256, requires_grad=True)

    def work(forget: bool) -> Tensor:
        y = x.exp().exp().exp()
        return y.detach() if forget else y

    assert count_operators(lambda: work(False))["peak bytes"] == 3 * 1024
    with torch.no_grad():
        assert count_operators(lambda: work(True))["peak bytes"] == 2 * 1024


def test_an_own_operator_has_to_declare_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    library = torch.library.Library("mintnet_triton", "FRAGMENT")
    library.define("hidden_product(Tensor a, Tensor b) -> (Tensor, Tensor)")
    library.impl("hidden_product", lambda a, b: (a @ b).unbind(), "CPU")
    operator = torch.ops.mintnet_triton.hidden_product
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"hidden_product.* give it a formula"), Counter():
        operator(a, b)

    def formula(a: Tensor, b: Tensor, **_: Any) -> int:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]

    monkeypatch.setitem(flop_registry, operator, formula)
    figures = count_operators(lambda: operator(a, b))
    assert figures["multiply-adds"] == 30
    assert figures["allocations"] == 1  # both rows are in the same memory


@pytest.mark.parametrize("threads", [1, 2])
def test_counts_do_not_depend_on_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    try:
        assert not compare(f"torch, {cases.MNIST[1]}, training step")
    finally:
        monkeypatch.undo()
        torch.set_num_threads(before)


def worse(case: str) -> set[str]:
    """The figures of a case that are worse than committed."""
    return {row.figure for row in compare(case) if row.verdict == "worse"}


ON_PINNED_TORCH = pytest.mark.skipif(
    guard.torch_version() != VERSION, reason=f"these figures are of torch {VERSION}"
)


@ON_PINNED_TORCH
def test_an_extra_copy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def copying(x: Tensor, *rest: Any) -> Any:
        return mint_forward(x.clone(), *rest)

    monkeypatch.setattr("mintnet_triton.mint.mint_forward", copying)
    caught = worse(f"torch, {cases.MNIST[1]}, forward")
    assert caught >= {"calls", "bytes", "allocations", "allocated bytes"}
    assert "multiply-adds" not in caught


def test_a_dense_convolution_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        return F.conv2d(x, weight, bias, padding="same")

    case = f"torch, {cases.CIFAR10[2]}, convolution"
    assert not worse(case)
    monkeypatch.setattr("mintnet_triton.conv.masked_conv2d", dense)
    assert "multiply-adds" in worse(case)


@pytest.fixture
def anew() -> Iterator[None]:
    """Plans of the layer for CPUs are not remembered."""
    cpu_canvas.plan.cache_clear()
    yield
    cpu_canvas.plan.cache_clear()


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("work_", ["forward", "forward, frozen", "training step"])
def test_a_plan_that_hides_nothing_is_caught(work_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(first: int, last: int, units: int, colours: int, *_: Any) -> tuple[int, int]:
        return 0, units * colours

    monkeypatch.setattr(cpu_canvas, "seen_inputs", everything)
    caught = worse(f"compiled, {cases.CIFAR10[2]}, {work_}")
    assert caught == {"compiled"} | ({"multiply-adds"} if work_ != "forward, frozen" else set())


@pytest.mark.usefixtures("anew")
def test_gradients_that_skip_nothing_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """By weights alone, whose tiles are smaller."""
    plan = cpu_canvas.plan

    def dense(*arguments: Any) -> cpu_canvas.Plan:
        found = plan(*arguments)
        if arguments[-1] == 5:
            found.taps[:, 2], found.taps[:, 3] = 0, arguments[1] * arguments[2]
        return found

    monkeypatch.setattr(cpu_mint_layer, "plan", dense)
    assert "compiled" in worse(f"compiled, {cases.CIFAR10[2]}, training step")
    assert not compare(f"compiled, {cases.CIFAR10[2]}, forward")


def test_a_layer_computed_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case, layer_op = f"compiled, {cases.MNIST[1]}, training step", cpu_mint_layer.layer_op
    run = cpu_mint_layer.run_forward

    def called_twice(*arguments: Any) -> Any:
        layer_op(*arguments)
        return layer_op(*arguments)

    def run_twice(*arguments: Any, **keywords: Any) -> Any:
        run(*arguments, **keywords)
        return run(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(cpu_mint_layer, "layer_op", called_twice)
        assert worse(case) >= {"multiply-adds", "compiled"}
    with monkeypatch.context() as patch:
        patch.setattr(cpu_mint_layer, "run_forward", run_twice)
        assert worse(case) == {"compiled"}  # no operator tells
    assert not compare(case)


@pytest.mark.parametrize("case", guard.compiled_cases())
def test_the_plain_path_is_caught(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "use_numba_layer", lambda *_: False)
    rows = {row.figure: row for row in compare(case)}
    assert rows["multiply-adds"].verdict == "worse"
    assert rows["compiled"].now == 0
    if guard.torch_version() == VERSION:
        assert rows["calls"].verdict == "worse"


def test_a_dropped_out_is_caught() -> None:
    a, b, out = torch.ones(8, 8), torch.ones(8, 8), torch.empty(8, 8)
    into = count_operators(lambda: torch.mm(a, b, out=out))
    copied = count_operators(lambda: out.copy_(torch.mm(a, b)))
    assert (into["bytes"], copied["bytes"]) == (3 * 256, 5 * 256)
    rows = guard.differences({"mm": copied}, {"mm": into})
    assert {row.verdict for row in rows} == {"worse"}
    assert {row.figure for row in rows} == guard.OF_TORCH - {"torch launches"}


def of_kernels(scale: cases.Scale, operand: str, what: str) -> str:
    """The name of a case of the kernels, with some architecture's tables."""
    start = f"kernels, {scale}, {operand}, "
    return next(one for one in COMMITTED if one.startswith(start) and one.endswith(what))


def test_an_extra_launch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launching.launch

    def twice(kernel: Any, *arguments: Any, **constants: Any) -> None:
        for _ in range(1 + (kernel is output_kernel)):
            launch(kernel, *arguments, **constants)

    monkeypatch.setattr(launching, "launch", twice)
    caught = worse(of_kernels(cases.MNIST[2], "half", "training step"))
    assert "output launches" in caught
    assert "hidden launches" not in caught


def test_wasteful_tiles_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_tile = configs.hidden_tile

    def wide(*arguments: Any) -> configs.Launch:
        tile = hidden_tile(*arguments)
        return tile._replace(blocks=tile.blocks._replace(outputs=128))

    monkeypatch.setattr(configs, "hidden_tile", wide)
    caught = worse(of_kernels(cases.CIFAR10[2], "ieee", "training step"))
    assert "hidden scheduled" in caught
    assert "weight_gradient scheduled" not in caught


@pytest.mark.skipif(
    not backend.INTERPRETED, reason="multiplications are counted in the interpreter"
)
@pytest.mark.parametrize(
    ("colours", "units", "kernels", "order", "triangle", "half"),
    [
        (3, 21, (3, 3, 3), "channel", "lower", True),
        (3, 21, (3, 3, 1), "pixel", "upper", False),
        (17, 2, (1, 3, 1), "channel", "upper", True),
    ],
)
def test_kernels_multiply_what_is_counted_as_scheduled(
    colours: int,
    units: int,
    kernels: tuple[int, int, int],
    order: str,
    triangle: str,
    half: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    weights = mint.MintLayer(colours, (3, 4), units, kernel_size=kernels).raw_weights()
    x = torch.randn(2, colours, 3, 4, requires_grad=True)
    # Blocks of the incoming channels, which are few, differ from those of hidden ones.
    tile = configs.Tile(64, 16, 32, 4, 2)

    def train() -> None:
        structure = Structure(order, triangle, "elu")
        with configs.using("sm_90", "half", colours, units, tile):
            with torch.autocast("cpu", torch.float16, enabled=half):
                y, _, log_det = mint_layer.mint_forward(x, weights, structure)
            (y.sum() + log_det.sum()).backward(retain_graph=True)

    done = 0
    create_dot = InterpreterBuilder.create_dot

    def count(self: object, a: Any, b: Any, *rest: object) -> object:
        nonlocal done
        (m, k), (_, n) = a.data.shape, b.data.shape
        done += m * n * k
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    figures = count_launches(train)
    assert done == 0  # launches are noted, not run
    train()
    assert done == sum(count for name, count in figures.items() if name.endswith("scheduled"))


def test_verdicts() -> None:
    before: dict[str, Figures] = {"a": {"calls": 2, "bytes": 2, "launches": 2}, "b": {"calls": 1}}
    now: dict[str, Figures] = {"a": {"calls": 3, "bytes": 1, "launches": 2}, "c": {"calls": 1}}
    rows = guard.differences(now, before)
    assert [(row.verdict, row.case, row.figure) for row in rows] == [
        ("worse", "a", "calls"),
        ("gone", "b", "calls"),
        ("new", "c", "calls"),
        ("better", "a", "bytes"),
    ]
    assert guard.table(rows).splitlines()[2] == "| worse | a | calls | 2 | 3 | +50.00% |"
    assert guard.portable(before) == {"a": {"launches": 2}, "b": {}}


def test_command_compares_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"multiply-adds": 4, "calls": 4}
    monkeypatch.setattr(guard, "FILE", tmp_path / "counted.json")
    monkeypatch.setattr(guard, "all_cases", lambda: {"a": lambda: dict(counts)})
    assert guard.main(["--write"]) == 0
    assert guard.main([]) == 0
    assert "as committed" in capsys.readouterr().out
    counts["calls"] = 5
    assert guard.main([]) == 1
    assert "| worse | a | calls | 4 | 5 | +25.00% |" in capsys.readouterr().out
    counts["calls"] = 3
    assert guard.main([]) == 0
    assert "| better | a | calls | 4 | 3 | -25.00% |" in capsys.readouterr().out

    # Another torch decides all but multiply-adds in its own way.
    monkeypatch.setattr(torch, "__version__", "9.9.9+cpu")
    assert guard.main([]) == 0
    assert "as committed" in capsys.readouterr().out
    counts["multiply-adds"] = 5
    assert guard.main([]) == 1
    monkeypatch.setattr(guard, "all_cases", dict)
    assert guard.main([]) == 1
    assert "gone" in capsys.readouterr().out


@pytest.mark.skipif(
    json.loads(REPORT.read_text())["triton"] != triton.__version__,
    reason="compiled resources are compared for one version of Triton",
)
@pytest.mark.parametrize(
    ("resource", "more", "message"),
    [
        ("registers", 8, "if the change is meant"),
        ("registers", -8, "if the change is meant"),
        ("shared", 1024, "if the change is meant"),
        ("stack", 8, "if the change is meant"),
        ("stack", 1024, "registers spilled"),
        ("spills_in_loops", 1, "registers spilled"),
        ("resident", -15, "too few warps on a core"),
        ("serialised", 1, "waited for at once"),
        ("shared", 2**20, "too much shared memory"),
    ],
)
def test_worse_resources_of_a_kernel_are_caught(
    resource: str, more: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads(REPORT.read_text())
    records = [one for one in report["records"] if one["operand"] == "half"]
    monkeypatch.setattr(test_compile, "compile_elsewhere", lambda *_: records)
    test_compile.test_compiles("sm_90", "half", brief=True)
    index = next(index for index, one in enumerate(records) if one["matrix"])
    records[index] = records[index] | {resource: records[index][resource] + more}
    with pytest.raises(AssertionError, match=message):
        test_compile.test_compiles("sm_90", "half", brief=True)


#: numbers as the benchmarks compare them
FLOAT32 = cases.Mode("float32", torch.float32, "highest", 1e-4)


@pytest.mark.parametrize("value", [1.01, float("nan"), float("inf")])
def test_a_wrong_result_does_not_pass_the_gate(value: float) -> None:
    one = torch.ones(3)
    cases.gate(FLOAT32, {"y": one}, {"y": one})
    with pytest.raises(cases.WrongResultError, match="y"):
        cases.gate(FLOAT32, {"y": one * value}, {"y": one})


def test_a_wrong_layer_does_not_pass_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = cases.MNIST[2]
    layer, truth = cases.make_layer(scale), cases.make_layer(scale)
    truth.load_state_dict(layer.state_dict())
    x = torch.randn(2, scale.channels, scale.size, scale.size)
    expected = dict(zip(("y", "log_det"), truth.double()(x.double()), strict=True))

    def checked() -> None:
        cases.gate(FLOAT32, dict(zip(("y", "log_det"), layer(x), strict=True)), expected)

    checked()

    def wrong(x: Tensor, *rest: Any) -> Any:
        y, diagonal, log_det = mint_forward(x, *rest)
        return y, diagonal, log_det * 1.001

    monkeypatch.setattr("mintnet_triton.mint.mint_forward", wrong)
    with pytest.raises(cases.WrongResultError, match="log_det"):
        checked()
