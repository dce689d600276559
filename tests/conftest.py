"""Settings shared by all tests."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# Without a GPU, kernels run in Triton's interpreter, which has to be said before they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Workers side by side, each with threads of its own, would fight for the cores.
# The tables alone: no tiles that were tuned on this machine.
os.environ["MINTNET_TRITON_CACHE"] = os.devnull

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="tests marked full, too, and every case of the grids"
    )


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("triton"):
        from tests import grid, interpreter  # not before the interpreter is chosen

        grid.FULL = bool(config.getoption("full"))
        interpreter.quicken()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tensorfloat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch is what kernels are compared with; on a GPU its convolutions round float32 to
    TensorFloat-32, unless they are told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """torch compiles a function for so many cases only, of all the tests of a process."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(params=["auto", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Inside each backend that a CPU has."""
    from mintnet_triton import use_backend

    with use_backend(request.param):
        yield request.param


@pytest.fixture(
    params=[("auto", torch.float32), ("auto", torch.float64), ("torch", torch.float32)],
    ids=["auto-float32", "auto-float64", "torch-float32"],
)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Inside what is compiled for float32 and for float64, and inside plain PyTorch."""
    from mintnet_triton import use_backend

    backend, dtype = request.param
    with use_backend(backend):
        yield dtype


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the Hugging Face hub for anything."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # It waits seconds for threads of pyarrow after each pass through shuffled shards.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    for item in items:
        if not torch.cuda.is_available():
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif item.path.name.endswith("_kernels.py"):  # where there is a GPU, they run on it
            item.add_marker("gpu")
