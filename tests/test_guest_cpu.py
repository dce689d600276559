"""A CPU as it is found: caches that cannot be used, a numba that does not work."""

import importlib.util
import logging
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mintnet_triton import use_backend
from mintnet_triton.kernels import backend

pytest.importorskip("numba")
import numba
from numba.core import config

from mintnet_triton.kernels.cpu import _numba

ROOT = Path(__file__).parents[1]

#: compiled in a moment
SMALL = """
from mintnet_triton.kernels.cpu._numba import called_through_pointer, compiled

@compiled
def twice(x):
    return 2 * x

@called_through_pointer(1)
def nothing(x):
    pass
"""


class Small:
    """A module of compiled functions, in a folder of its own, loaded anew as by each process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "small.py"
        self.path.write_text(SMALL)
        self.cache = folder / "cache"

    def load(self) -> ModuleType:
        backend.tell_of_compiling.cache_clear()
        _numba._warned = False
        spec = importlib.util.spec_from_file_location("small", self.path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["small"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.twice(21) == 42
        assert module.nothing.address
        return module

    def files(self, kind: str) -> list[Path]:
        found = list(self.cache.glob(f"*/*.{kind}"))
        assert len(found) == 2
        return found


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    module = Small(tmp_path)
    monkeypatch.setattr(config, "CACHE_DIR", str(module.cache))
    monkeypatch.setitem(sys.modules, "small", ModuleType("small"))  # taken away again
    monkeypatch.setattr(_numba, "_warned", False)
    return module


def is_kept(module: ModuleType) -> bool:
    """Whether all was found, and nothing compiled."""
    return (sum(module.twice.stats.cache_hits.values()), module.nothing.cache_hits) == (1, 1)


def flip(content: bytes) -> bytes:
    """One byte in the midst, where code is, and where pickle sees nothing wrong."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "garbage": lambda content: b"no pickle" * 100,
    "cut": lambda content: content[: len(content) // 2],
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_files_of_the_cache_are_renewed(small: Small, kind: str, damage: str) -> None:
    assert not is_kept(small.load())
    assert is_kept(small.load())
    for path in small.files(kind):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"compiled kernels in .*compiled anew") as warned:
        assert not is_kept(small.load())
    assert len(warned) == 1
    if (kind, damage) == ("nbc", "flipped"):  # not left to what runs into it
        assert "that is damaged" in str(warned[0].message)
    assert is_kept(small.load())


def test_a_folder_in_place_of_a_file(small: Small) -> None:
    small.load()
    for path in small.files("nbi"):
        path.unlink()
        path.mkdir()
    with pytest.warns(RuntimeWarning, match="compiled anew"):
        small.load()


def test_a_cache_of_another_version_is_replaced(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(numba, "__version__", "0.1")
        small.load()
    assert not is_kept(small.load())
    assert is_kept(small.load())


def test_code_of_another_key_is_not_taken(small: Small) -> None:
    """As two processes may leave it that write at once."""
    small.load().twice(0.5)
    one, other = sorted(small.cache.glob("*/*twice*.nbc"))
    other.write_bytes(one.read_bytes())
    assert small.load().twice(0.5) == 1.0


def test_nowhere_to_keep_anything(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    file = small.path.parent / "__pycache__"
    file.write_text("")
    monkeypatch.setattr(config, "CACHE_DIR", str(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be used") as warned:
        small.load()
    assert len(warned) == 1


def test_compiling_is_told_once_and_only_if_need_be(
    small: Small, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[int] = []
    with (
        caplog.at_level(logging.INFO, logger="mintnet_triton"),
        backend.compiling_heard(lambda: heard.append(1)),
    ):
        small.load()
        (record,) = caplog.records
        assert "numba compiles small" in record.getMessage()
        assert str(small.cache) in record.getMessage()
        small.load()
    assert len(caplog.records) == len(heard) == 1
    backend.tell_of_compiling("small", None)
    assert len(heard) == 1


def test_the_bar_of_training_says_that_kernels_are_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    from mintnet_triton.recipes.objectives import Density
    from tests.tiny_run import tiny_run

    scores = Density.scores

    def compiling(*arguments: Any) -> Any:
        backend.tell_of_compiling("of a first step", None)
        return scores(*arguments)

    backend.tell_of_compiling.cache_clear()
    monkeypatch.setattr(Density, "scores", compiling)
    with use_backend("torch"):
        tiny_run("density", tmp_path)
    shown = re.findall(r"(training|compiling kernels, once): +(\d+)%", capsys.readouterr().err)
    assert shown[0] == ("training", "0")
    assert shown[1] == ("compiling kernels, once", "0")
    assert shown[-1] == ("training", "100")


def run(script: str, **environment: str) -> str:
    """What a fresh process prints, warnings included."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "2", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_full_disk(small: Small) -> None:
    """Here, no file may grow beyond nothing."""
    printed = run(
        f"""
        import resource, sys
        import mintnet_triton.kernels.cpu._numba
        sys.path.insert(0, {str(small.path.parent)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        import small
        assert small.twice(21) == 42
        """,
        NUMBA_CACHE_DIR=str(small.cache),
    )
    assert printed.count("RuntimeWarning: the cache of compiled kernels") == 1
    assert not list(small.cache.glob("*/*"))


def test_two_processes_compile_at_once(small: Small) -> None:
    script = f"import sys; sys.path.insert(0, {str(small.path.parent)!r}); import small\n"
    script += "assert small.twice(21) == 42 and small.twice(0.5) == 1.0"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(small.cache)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert small.load().twice(0.5) == 1.0


#: a layer, its gradients and its inverse, as plain PyTorch has them; nothing is compiled
PLAIN = """
import sys
import torch
from mintnet_triton import MintLayer, use_backend

torch.manual_seed(0)
layer, x = MintLayer(2, 4, 3, initialisation="classifier"), torch.randn(4, 2, 4, 4)
for name in ("auto", "torch"):
    with use_backend(name):
        layer.zero_grad()
        y, log_det = layer(x)
        (y.square().sum() + log_det.sum()).backward()
        found = [y, log_det, layer.inverse(y.detach())[0], *(p.grad for p in layer.parameters())]
    if name == "torch":
        torch.testing.assert_close(found, before)
    before = found
torch.testing.assert_close(found[2], x, rtol=0, atol=1e-4)
cpu = [name for name in sys.modules if name.startswith("mintnet_triton.kernels.cpu.")]
assert not any("numba" in vars(sys.modules[name]) for name in cpu if "products" not in name)
assert "mintnet_triton.kernels.cpu._numba" not in sys.modules
"""


def test_numba_that_may_not_compile() -> None:
    assert "Warning" not in run(PLAIN, NUMBA_DISABLE_JIT="1")


def test_numba_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "numba").mkdir()
    text = "raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 9.')"
    (tmp_path / "numba" / "__init__.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    printed = run(PLAIN, PYTHONPATH=path)
    assert printed.count("RuntimeWarning") == 1
    assert "Got NumPy 9.): plain PyTorch computes" in printed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_shares_work_among_threads_of_its_own() -> None:
    """Those of OpenMP it would wait for without end."""
    run(
        """
        import os, signal, torch
        from mintnet_triton.kernels.cpu.threads import share

        torch.set_num_threads(2)
        done = []
        share(range(4), done.append)
        child = os.fork()
        if not child:
            signal.alarm(30)
            share(range(4), done.append)
            os._exit(len(done) - 8)
        assert os.waitpid(child, 0)[1] == 0
        """
    )
