"""The layer's arithmetic on a CPU, run as plain Python, with every access to memory checked."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")
from mintnet_triton.kernels.cpu import canvas as cpu_canvas
from mintnet_triton.kernels.cpu import mint_layer as cpu_mint_layer
from mintnet_triton.kernels.cpu.tiles import Loops
from tests.test_mint_layer_cpu import compare, make_layer

Array = np.ndarray[Any, Any]


class Checked(Array):
    """An array that has no elements before its first, and whose slices are never cut short."""

    def _check(self, key: Any) -> None:
        for one, size in zip(key if isinstance(key, tuple) else (key,), self.shape, strict=False):
            start, stop = one, one + 1 if not isinstance(one, slice) else 0
            if isinstance(one, slice):
                start = one.start or 0
                stop = size if one.stop is None else one.stop
            if not 0 <= start <= stop <= size:
                raise IndexError(f"{key} of {self.shape}")

    def __getitem__(self, key: Any) -> Any:
        self._check(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._check(key)
        super().__setitem__(key, value)


class Place:
    """An address that knows its array."""

    def __init__(self, values: Array, place: int) -> None:
        self.values, self.place = values, place

    def take(self, distance: int, count: int) -> Any:
        start = self.place + distance
        return self.values[start:][:count]


def checked(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return values.view(Checked)
    return tuple(map(checked, values)) if type(values) is tuple else values


def empty(*arguments: Any) -> Any:
    """What is read before it is written spoils the results, or is no place."""
    made = np.empty(*arguments)
    made[...] = np.nan if made.dtype.kind == "f" else -(2**40)
    return checked(made)


def loops_of(vector: int, most: int, few: int, outputs: int) -> Loops:
    """The loops of :mod:`kernels.cpu.tiles`, for tiles of other sizes."""

    def add(
        rows: int, vectors: int, sums: Place, stride: int, weights: Place, source: Place,
        distance: int, runs: Place, count: int,
    ) -> None:  # fmt: skip
        assert rows <= (few if vectors == 4 else most)
        length = vectors * vector
        for run in range(count):
            begin, inputs, begin_weights = runs.take(3 * run, 3)
            for k in range(inputs):
                factors = weights.take(begin_weights + k * rows, rows)
                line = source.take(begin + k * distance, length)
                for m in range(rows):
                    sums.take(m * stride, length)[:] += factors[m] * line

    def dot(
        rows: int, columns: int, sums: Place, left: Place, line_left: int, row_left: int,
        right: Place, line_right: int, row_right: int, lines: int, vectors: int,
    ) -> None:  # fmt: skip
        assert max(rows, columns) <= outputs
        length = vectors * vector
        sums.take(0, -(-rows * columns // vector) * vector)[:] = 0
        for m in range(rows):
            for k in range(columns):
                for y in range(lines):
                    ours = left.take(m * line_left + y * row_left, length)
                    theirs = right.take(k * line_right + y * row_right, length)
                    sums.take(m * columns + k, 1)[0] += (ours * theirs).sum()

    return Loops(add, dot, vector, most, few, outputs, outputs)


@pytest.fixture
def nan_where_empty() -> Iterator[None]:
    """Of torch's tensors, as of :func:`empty`'s arrays."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(0).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[(16, 14, 6, 5), (8, 6, 2, 3), (4, 6, 2, 3)])
def in_python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled; sizes are those of AVX-512, AVX and SSE."""
    loops = loops_of(*request.param)
    for name, value in list(vars(cpu_canvas).items()):
        if hasattr(value, "py_func"):
            monkeypatch.setattr(cpu_canvas, name, value.py_func)
    numpy = {**vars(np), "empty": empty, "zeros": lambda *a: checked(np.zeros(*a))}
    monkeypatch.setattr(cpu_canvas, "np", SimpleNamespace(**numpy))
    monkeypatch.setattr(cpu_canvas, "address", Place)

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(*map(checked, arguments))

    replaced: dict[str, Any] = {"LOOPS": loops, "VECTOR": loops.vector}
    replaced |= {"MOST": loops.most, "OUTPUTS": loops.outputs}
    for name in ("fill", "forward_groups", "backward_groups"):
        replaced[name] = run(getattr(cpu_canvas, name))
    for name, value in replaced.items():
        monkeypatch.setattr(cpu_mint_layer, name, value)


@pytest.mark.usefixtures("in_python", "nan_where_empty")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of exp, where none is used
@pytest.mark.parametrize(
    ("colours", "size", "hidden", "kernel_size", "batch", "triangle"),
    [
        (1, (1, 1), 1, (7, 1, 3), 3, "lower"),  # kernels wider than images
        (2, (5, 1), 3, (3, 5, 7), 5, "lower"),  # groups that are not full
        (1, (2, 65), 2, (5, 3, 1), 1, "upper"),  # a line of one image, more than whole vectors
        (16, (1, 2), 1, 1, 3, "upper"),  # tiles of several colours
        (1, (2, 3), 16, (3, 1, 3), 7, "lower"),  # several tiles of a colour
        (1, (70, 16), 1, 3, 4, "upper"),  # rows in several parts
        (2, (9,), 3, (3, 5, 7), 3, "lower"),
        (2, (3, 2, 4), 3, (3, 1, 5), 3, "upper"),
    ],
)
def test_no_access_beyond_an_array(
    colours: int, size: Any, hidden: int, kernel_size: Any, batch: int, triangle: str
) -> None:
    arguments = {"order": "pixel", "triangle": triangle, "kernel_size": kernel_size}
    layer = make_layer(colours, size, hidden, **arguments)
    compare(layer, torch.randn(batch, colours, *size))
