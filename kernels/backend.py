"""Which implementation computes the operations of this package."""

import importlib.util
import logging
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mintnet_triton.kernels.activation import Activation, is_known

_LOG = logging.getLogger("mintnet_triton")

_NAMES = ("auto", "torch", "triton")
#: for what is of the process, and blocks of several threads set
_settings = Lock()
#: of the blocks that have been entered, by whatever thread; the last one holds
_choices = ["auto"]

#: most pixels in a batch: kernels count in 32 bits, and around small images more zeros than pixels
MOST_PIXELS = 2**26

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
NUMBA_INSTALLED = importlib.util.find_spec("numba") is not None

#: whether kernels run in Triton's interpreter, on a CPU: it has to be said before they are defined
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class BackendError(RuntimeError):
    """The chosen backend cannot run here."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation for the calls inside the ``with`` block, in the whole process.

    Args:
        name: ``"auto"``, the default: Triton kernels where they can run; on a CPU, what numba
            compiles, where that is installed (layers in float32, the wavefront); else plain
            PyTorch. Autocast on a CPU computes in float32 where 16 bits would be slower: where the
            processor cannot multiply them, and layers that numba compiles also where it has no
            instruction for matrices of them (AMX, BFMMLA); dtypes of results are the same;
            ``"torch"``, plain PyTorch on any device; or ``"triton"``, whose calls raise
            :class:`BackendError` where the kernels cannot run. They run on a GPU of compute
            capability 8.0 or above (or an AMD one), and on a CPU in Triton's interpreter (with
            TRITON_INTERPRET=1 set before this package is imported; for tests, for it is slow). They
            know this package's own activations alone, and their gradients cannot be differentiated
            again.

    Raises:
        ValueError: ``name`` is none of the three.
        BackendError: ``"triton"``, and Triton is not installed.
    """
    if name not in _NAMES:
        raise ValueError(f"name must be 'auto', 'torch' or 'triton', got {name!r}")
    if name == "triton" and not TRITON_INSTALLED:
        raise BackendError("Triton is not installed; use 'auto' or 'torch'")
    with _settings:
        _choices.append(name)
    try:
        yield
    finally:
        with _settings:
            # Its own, though another thread may have entered a block since.
            del _choices[len(_choices) - 1 - _choices[::-1].index(name)]


_full, _before = 0, ("highest", False)


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block, float32 is not multiplied in TensorFloat-32, by any backend.

    These are settings of the process: they come back when the last thread has left its block.
    """
    global _full, _before
    with _settings:
        if not _full:
            _before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        _full += 1
    try:
        yield
    finally:
        with _settings:
            _full -= 1
            if not _full:
                torch.set_float32_matmul_precision(_before[0])
                torch.backends.cudnn.allow_tf32 = _before[1]


def use_triton(x: Tensor, activation: Activation | None = None, watched: bool = False) -> bool:
    """Whether a call with this input is to run Triton kernels.

    Args:
        watched: whether hooks look at convolutions, which have to be computed one by one then.

    Raises:
        BackendError: the chosen backend is ``"triton"``, and the kernels cannot run; or they can,
            but ``x`` has more pixels than they can count.
    """
    if _choices[-1] == "torch" or is_exported():
        return False
    if _choices[-1] == "auto" and not x.is_cuda:
        return False
    obstacle = "hooks look at its convolutions" if watched else _obstacle(x, activation)
    if obstacle and _choices[-1] == "triton":
        raise BackendError(f"the Triton kernels cannot run: {obstacle}; use 'auto' or 'torch'")
    if not obstacle:
        check_pixels(x)
    return not obstacle


def use_numba(x: Tensor, hidden: object, dtype: torch.dtype) -> bool:
    """Whether a call with this input is to run as compiled by numba: on a CPU, in that dtype.

    The layer is compiled for float32, the wavefront for float64.
    """
    known = not isinstance(hidden, Activation) or is_known(hidden)
    suits = x.device.type == "cpu" and x.dtype == dtype and known
    return suits and _choices[-1] != "torch" and numba_compiles()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def numba_compiles() -> bool:
    """Whether numba is installed, works, and has not been told (NUMBA_DISABLE_JIT) to do nothing.

    Asked at the first call that could use it, for numba takes time to import.
    """
    return _numba_compiles()


@cache  # apart, for torch.compile warns of what is both cached and called by it
def _numba_compiles() -> bool:
    if not NUMBA_INSTALLED:
        return False
    try:
        import numba
    except Exception as error:  # of a numpy that is too new, say
        warnings.warn(
            f"numba is installed, but cannot be imported ({type(error).__name__}: {error}): "
            "plain PyTorch computes what numba would have compiled, only slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    settings: Any = numba.config
    return not settings.DISABLE_JIT


_listeners: list[Callable[[], None]] = []


@cache  # once for each module
def tell_of_compiling(module: str, folder: str | None) -> None:
    """Say that a module's functions will now be compiled, in the log and to all that listen.

    Args:
        module: its full name.
        folder: where the result will be kept; None if it cannot be.
    """
    kept = f"once: the result is kept in {folder}" if folder else "in every process anew"
    _LOG.info("numba compiles %s for this processor, which takes some seconds, %s", module, kept)
    for listener in _listeners:
        listener()


@contextmanager
def compiling_heard(listener: Callable[[], None]) -> Iterator[None]:
    """Within the block, the listener is called whenever something is about to be compiled."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def use_numba_layer(x: Tensor, activation: Activation) -> bool:
    """Whether a Mint layer of this input is to run as compiled by numba.

    Threads share samples: of fewer than half as many as there are threads, torch makes more.
    """
    return (
        not is_exported()
        and use_numba(x, activation, torch.float32)
        and (torch.compiler.is_compiling() or 2 * len(x) >= torch.get_num_threads())
        and x.shape[0] > 0
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
    )


def use_float32(x: Tensor, weight: Tensor, activation: Activation | None = None) -> bool:
    """Whether autocast on a CPU is to be answered in float32, being slower there in 16 bits.

    So it is where the processor does not multiply them itself, but emulates it. Of a Mint layer,
    which numba compiles in float32, so it is also where 16 bits go through vector units, which is
    level at the first scale of the CIFAR-10 model and a loss of a tenth or so at the others
    (``python -m bench run``: "layer", bfloat16, against torch).

    Args:
        activation: of a Mint layer; None for a convolution alone, which is not compiled.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or is_exported():
        return False
    if torch.float64 in (x.dtype, weight.dtype):  # which autocast leaves as they are
        return False
    dtype = torch.get_autocast_dtype("cpu")
    if not multiplies(dtype):
        return True
    if activation is None or multiplies_matrices(dtype):
        return False
    with torch.autocast("cpu", enabled=False):
        return use_numba_layer(x.float(), activation)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies bfloat16, or float16, and torch lets it."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        # oneDNN says yes to all that has AVX-512, and converts to float32 where there is no more.
        converts = platform.machine() in ("x86_64", "AMD64") and not (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not converts
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_matrices(dtype: torch.dtype) -> bool:
    """Whether it does so with an instruction for matrices: AMX, or Arm's BFMMLA."""
    if platform.machine() in ("aarch64", "arm64"):
        return dtype == torch.bfloat16 and multiplies(dtype)
    if dtype == torch.bfloat16:
        return torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_amx_fp16_supported()


def is_exported() -> bool:
    """Whether a graph is traced that is to run where this package is not: in plain PyTorch."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def is_capturing(x: Tensor) -> bool:
    """Whether what is done on the device of x goes into a CUDA graph, so that nobody may wait."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward differentiation, is under way."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return functorch or torch.autograd.forward_ad._current_level >= 0


def check_pixels(x: Tensor) -> None:
    """Refuse an input (B, C, H, W) or (B, C, L) that the kernels would count wrongly.

    Raises:
        BackendError: ``x`` has more than :data:`MOST_PIXELS` pixels.
    """
    samples, _, *size = x.shape
    if math.prod((samples, *size)) > MOST_PIXELS:
        pixels = " x ".join(map(str, (samples, *size)))
        raise BackendError(
            f"x has {pixels} pixels, and the Triton kernels count at most {MOST_PIXELS}; give them "
            "fewer samples at once, or use_backend('torch')"
        )


def _obstacle(x: Tensor, activation: Activation | None) -> str:
    """What keeps the kernels from running, or nothing."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if x.ndim not in (3, 4):
        return f"they know images and series alone, and the input is of shape {tuple(x.shape)}"
    if activation is not None and not is_known(activation):
        return f"they know no activation but this package's own, and {activation.name!r} is not one"
    if is_transformed():
        return "they know no transforms of torch.func, nor forward differentiation"
    if x.is_cuda:
        if torch.compiler.is_compiling():  # it cannot look at a device; a launch will
            return ""
        properties = torch.cuda.get_device_properties(x.device)
        if torch.version.hip is None and properties.major < 8:
            return f"compute capability {properties.major}.{properties.minor} is below 8.0"
        return ""
    if x.device.type == "cpu" and INTERPRETED:
        return ""
    return f"the input is on {x.device}, and only a GPU or Triton's interpreter runs them"
