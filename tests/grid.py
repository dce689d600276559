"""What the tests of the kernels share: grids of cases, tolerances, layouts, guarded launches."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.contest.cases import relative_rms
from mintnet_triton.kernels.gpu import launching

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: whether grids run in full (``pytest --full``) or in a pairwise subset
FULL = False

Case = dict[str, Any]

#: largest relative RMS error of a kernel, by the name of its numbers
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 2e-2}

#: the largest error may be this many times the tolerance, relative to the largest value
PEAK = 10

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


def over(
    allowed: Callable[[Case], bool],
    main: Sequence[str],
    costly: Callable[[Case], bool] = lambda case: False,
    **values: Sequence[Any],
) -> pytest.MarkDecorator:
    """Parametrize a test by ``case``: a pairwise subset of all combinations, or the full grid.

    ``allowed`` may be asked about incomplete cases: it is to use ``case.get``. The full grid has
    every combination of the ``main`` parameters, each with some values of the others. What is
    ``costly`` is left to it.
    """
    if FULL:
        cases = full(allowed, main, **values)
    else:
        cases = [case for case in pairwise(allowed, **values) if not costly(case)]
    return pytest.mark.parametrize("case", cases, ids=_name)


def thinned(every: Iterable[tuple[Any, ...]], kept: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Arguments of a test: every case, of which those that are not kept run in full alone."""
    return [one if one in kept else pytest.param(*one, marks=pytest.mark.full) for one in every]


def _name(case: Case) -> str:
    values = [value if isinstance(value, tuple) else (value,) for value in case.values()]
    return "-".join(",".join(map(str, value)) for value in values)


def full(
    allowed: Callable[[Case], bool], main: Sequence[str], **values: Sequence[Any]
) -> list[Case]:
    """Every allowed combination of the main parameters, with the others drawn by lot."""
    lot = random.Random(0)
    rows = itertools.product(*(values[name] for name in main))
    every = (
        {name: lot.choice(choices) for name, choices in values.items()}
        | dict(zip(main, row, strict=True))
        for row in rows
    )
    return [case for case in every if allowed(case)]


def pairwise(allowed: Callable[[Case], bool], **values: Sequence[Any]) -> list[Case]:
    """Cases in which any two values of two parameters meet, if they are allowed to: greedily."""
    missing = [
        {one: first, other: second}
        for one, other in itertools.combinations(values, 2)
        for first, second in itertools.product(values[one], values[other])
        if allowed({one: first, other: second})
    ]
    cases = []
    while missing:
        case = dict(missing[0])
        for name in [name for name in values if name not in case]:
            options = [case | {name: value} for value in values[name]]
            options = [option for option in options if allowed(option)]
            case = max(
                options, key=lambda option: sum(p.items() <= option.items() for p in missing)
            )
        missing = [pair for pair in missing if not pair.items() <= case.items()]
        cases.append({name: case[name] for name in values})
    return cases


def dtype_of(numbers: str) -> torch.dtype:
    """The dtype of "float64", "float32", "tf32", "float16" or "bfloat16"."""
    dtype = getattr(torch, "float32" if numbers == "tf32" else numbers)
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextmanager
def precision_of(numbers: str) -> Iterator[None]:
    """Let float32 be multiplied in TensorFloat-32 inside, if that is what the numbers are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if numbers == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def assert_near(name: str, computed: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare with float64 values: RMS and largest error, both relative."""
    assert computed.shape == expected.shape, name
    if computed.numel() == 0:
        return
    assert bool(computed.isfinite().all()), f"{name} is not finite"
    rms = relative_rms(computed, expected)
    error = (computed.detach().double() - expected.detach().double()).abs().max()
    peak = float(error / expected.detach().double().abs().max().clamp(min=1e-300))
    assert rms <= tolerance, f"{name}: relative RMS error {rms:.3g}, tolerance {tolerance:.3g}"
    assert peak <= PEAK * tolerance, f"{name}: largest error {peak:.3g}, {PEAK} x {tolerance:.3g}"


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x (B, C, H, W) with other strides; what lies between its elements is NaN.

    Expanded, all samples and columns are the first one.
    """
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return x[:1, :, :, :1].contiguous().expand(x.shape)
    if layout == "sliced":
        parent = x.new_full([2 * size + 1 for size in x.shape], float("nan"))
        return parent[1::2, 1::2, 1::2, 1::2].copy_(x)
    assert layout == "contiguous"
    return x.contiguous()


#: elements on either side of a guarded tensor
BAND = 4096


def _guard(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a tensor's storage, as far as it reaches, between two bands, and the copy alone."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    span = last + 1 if tensor.numel() else 0
    # Compiled kernels take pointers to be as aligned as they were.
    first = BAND + tensor.data_ptr() % 64 // tensor.element_size()
    sentinel = float("nan") if tensor.is_floating_point() else -7
    storage = tensor.new_full((first + span + BAND,), sentinel)
    storage[first : first + span] = tensor.as_strided((span,), (1,))
    return storage, storage.as_strided(tensor.shape, tensor.stride(), first)


def _check_bands(storage: Tensor, inside: Tensor, span: int) -> None:
    first = inside.storage_offset()
    bands = torch.cat([storage[:first], storage[first + span :]])
    intact = bands.isnan() if bands.is_floating_point() else bands == -7
    assert bool(intact.all()), "a kernel wrote out of bounds"


def _inside(argument: Any, guards: list[tuple[Tensor, Tensor, Tensor]]) -> Any:
    """An argument of a launch, perhaps a tuple, with guarded copies of its tensors.

    ``guards`` gets each tensor, the storage of its copy, and the copy.
    """
    if isinstance(argument, tuple):
        parts = [_inside(one, guards) for one in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if not isinstance(argument, Tensor):
        return argument
    storage, inside = _guard(argument)
    guards.append((argument, storage, inside))
    return inside


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, every kernel runs on tensors between bands of NaN, and new tensors hold NaN.

    So a read out of bounds that is used, and an output that is not written, give NaN; a write out
    of bounds is an error. Yields the names of the kernels launched.
    """
    launched: list[str] = []
    launch = launching.launch

    def guarded_launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.__name__)
        guards: list[tuple[Tensor, Tensor, Tensor]] = []
        launch(kernel, grid, *(_inside(one, guards) for one in arguments), **constants)
        for original, storage, inside in guards:
            span = len(storage) - BAND - int(inside.storage_offset())
            _check_bands(storage, inside, span)
            flat = inside.as_strided((span,), (1,))
            original.data.as_strided((span,), (1,)).copy_(flat)  # of which autograd need not know

    deterministic = torch.are_deterministic_algorithms_enabled()
    # Only this lets torch.empty and its like be filled.
    torch.use_deterministic_algorithms(True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(launching, "launch", guarded_launch)
            yield launched
    finally:
        torch.use_deterministic_algorithms(deterministic)
