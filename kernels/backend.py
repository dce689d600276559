"""Which implementation computes the operations of this package."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mintnet_triton.kernels.activation import Activation, is_known

_LOG = logging.getLogger("mintnet_triton")

_NAMES = ("auto", "torch", "triton")
_choice = "auto"

#: most pixels in a batch: kernels count them in 32 bits, by tiles that may reach beyond the last
MOST_PIXELS = 2**31 - 2**16

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
            PyTorch;
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
    global _choice
    if name not in _NAMES:
        raise ValueError(f"name must be 'auto', 'torch' or 'triton', got {name!r}")
    if name == "triton" and not TRITON_INSTALLED:
        raise BackendError("Triton is not installed; use 'auto' or 'torch'")
    previous, _choice = _choice, name
    try:
        yield
    finally:
        _choice = previous


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block, float32 is not multiplied in TensorFloat-32, by any backend."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


def use_triton(x: Tensor, activation: Activation | None = None) -> bool:
    """Whether a call with this input is to run Triton kernels.

    Raises:
        BackendError: the chosen backend is ``"triton"``, and the kernels cannot run; or they can,
            but ``x`` has more pixels than they can count.
    """
    if _choice == "torch" or (_choice == "auto" and not x.is_cuda):
        return False
    obstacle = _obstacle(x, activation)
    if obstacle and _choice == "triton":
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
    return suits and _choice != "torch" and numba_compiles()


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
        use_numba(x, activation, torch.float32)
        and (torch.compiler.is_compiling() or 2 * len(x) >= torch.get_num_threads())
        and len(x) > 0
        and not torch.is_autocast_enabled("cpu")
        and not _transformed()
    )


def _transformed() -> bool:
    """Whether a transform of torch.func, or forward differentiation, is under way."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return functorch or torch.autograd.forward_ad._current_level >= 0


def check_pixels(x: Tensor) -> None:
    """Refuse an input (B, C, H, W) that the kernels would count wrongly.

    Raises:
        BackendError: ``x`` has more than :data:`MOST_PIXELS` pixels.
    """
    samples, _, height, width = x.shape
    if samples * height * width > MOST_PIXELS:
        raise BackendError(
            f"x has {samples} x {height} x {width} pixels, and the Triton kernels count at most "
            f"{MOST_PIXELS}; give them fewer samples at once, or use_backend('torch')"
        )


def _obstacle(x: Tensor, activation: Activation | None) -> str:
    """What keeps the kernels from running, or nothing."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if activation is not None and not is_known(activation):
        return f"they know no activation but this package's own, and {activation.name!r} is not one"
    if _transformed():
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
