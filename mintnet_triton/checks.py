"""Input checks of all modules: an error names the argument, what came, what is expected."""

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from mintnet_triton.kernels import is_capturing

_UNREAD = ContextVar("unread", default=False)


@contextmanager
def unread() -> Iterator[None]:
    """In the block, nobody looks at values off the CPU, for somebody judges what comes of them."""
    token = _UNREAD.set(True)
    try:
        yield
    finally:
        _UNREAD.reset(token)


class NonFiniteError(ValueError):
    """A tensor that must be finite holds a NaN or an infinity."""


def check_tensor(name: str, x: Tensor, shape: Sequence[int | None], like: Tensor | None) -> None:
    """Check type, shape, dtype, device and finiteness of an input.

    Args:
        name: of the argument, for the message.
        x: the input.
        shape: expected sizes after the batch dimension; None accepts any size.
        like: a parameter whose dtype and device the input must have; under autocast any floating
            dtype is accepted.

    Raises:
        TypeError: not a tensor, not floating, or of another dtype than ``like``.
        ValueError: wrong number of dimensions, wrong size, or another device than ``like``.
        NonFiniteError: NaN or infinity in ``x`` (on a CPU; see :func:`check_finite`).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {type(x).__name__} of {x.layout}")
    got = x.shape
    if len(got) != len(shape) + 1:
        raise ValueError(
            f"{name} must have {len(shape) + 1} dimensions, shape {_wanted(shape)}, "
            f"got {x.ndim}, shape {tuple(got)}"
        )
    for dimension, size in enumerate(shape, start=1):
        if size is not None and got[dimension] != size:
            raise ValueError(
                f"{name} must have shape {_wanted(shape)}, got {tuple(got)}: "
                f"dimension {dimension} is {got[dimension]}, expected {size}"
            )
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be of a floating dtype, got {x.dtype}; ImagePreprocess and bits_per_dim "
            "take images of integers"
        )
    if like is not None:
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device}, the module's parameters on {like.device}")
        if x.dtype != like.dtype and not _autocast_takes(x, like):
            raise TypeError(
                f"{name} is {x.dtype}, the module's parameters are {like.dtype}; take one to the "
                "other with .to(dtype)"
            )
    if x.device.type == "cpu":
        check_finite(name, x)


def _wanted(shape: Sequence[int | None]) -> str:
    return "(batch, " + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def _autocast_takes(x: Tensor, like: Tensor) -> bool:
    """Whether autocast casts between the dtypes of both: never from or to float64."""
    place = x.device.type
    return (
        torch.amp.is_autocast_available(place)
        and torch.is_autocast_enabled(place)
        and torch.float64 not in (x.dtype, like.dtype)
    )


def is_traced(x: Tensor) -> bool:
    """Whether values are not known: in a graph (CUDA's, too), in ``torch.func``, or when faked.

    Nor are they where :func:`unread` says so.
    """
    return (
        torch.compiler.is_compiling()
        or isinstance(x, FakeTensor)
        or get_proxy_mode() is not None
        or torch._C._get_tracing_state() is not None
        or bool(torch._C._functorch.peek_interpreter_stack())
        or (_UNREAD.get() and x.device.type != "cpu")
        or is_capturing(x)
    )


def check_finite(name: str, x: Tensor) -> None:
    """Raise if ``x`` holds a NaN or an infinity, and say where.

    A forward pass calls this on a CPU only, for on a GPU it would wait for the device; ``log_prob``
    and ``invert`` call it anywhere. It does nothing where :func:`is_traced`.

    Raises:
        NonFiniteError: with the number of such values and the index of the first.
    """
    if is_traced(x):
        return
    # A sum is finite only if all that it adds up is, and takes one pass; it may itself overflow.
    total = x.sum(dtype=torch.float32) if x.dtype is torch.float16 else x.sum()
    if math.isfinite(total.item()):
        return
    bad = ~torch.isfinite(x.detach())
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"{name} holds {int(x.isnan().sum())} NaN and {int(x.isinf().sum())} infinite values, "
            f"the first at index {first}"
        )


def check_positive(**arguments: Any) -> tuple[int, ...]:
    """The arguments as Python integers of at least 1, in their order.

    Raises:
        TypeError: not an integer.
        ValueError: below 1.
    """
    return tuple(check_integer(name, value, least=1) for name, value in arguments.items())


def check_integer(name: str, value: Any, least: int) -> int:
    """``value`` as a Python integer, of at least ``least``.

    An integer is what Python takes for one (``__index__``), a scalar of numpy or torch included;
    but no truth value.

    Raises:
        TypeError: not an integer.
        ValueError: too small.
    """
    scalar = _scalar(value)
    if isinstance(scalar, bool) or hasattr(scalar, "ndim") or not hasattr(scalar, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    integer = operator.index(scalar)
    if integer < least:
        raise ValueError(f"{name} must be at least {least}, got {integer}")
    return integer


def check_axes(axes: Any) -> int:
    """``axes`` of images as a Python integer: 1, 2 or 3.

    Raises:
        TypeError, ValueError: it is none of them.
    """
    integer = check_integer("axes", axes, least=1)
    if integer > 3:
        raise ValueError(f"axes must be 1, 2 or 3, got {integer}")
    return integer


def check_number(name: str, value: Any) -> float:
    """``value`` as a Python float; a scalar of numpy or torch will do.

    Raises:
        TypeError: not a real number, or a tensor whose gradient would be lost.
    """
    scalar = _scalar(value)
    if isinstance(scalar, bool) or not isinstance(scalar, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} must be a number, got a tensor that requires a gradient: {value}")
    return float(scalar)


def _scalar(value: Any) -> Any:
    """What an array or tensor without dimensions holds; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def as_size(name: str, size: Any) -> tuple[int, ...]:
    """Sizes along one, two or three axes, from as many integers; one alone is height and width.

    Raises:
        TypeError, ValueError: not one to three positive integers.
    """
    several = "(height, width), (length,) or (depth, height, width)"
    return tuple(_one_or_several(name, size, 2, (1, 2, 3), several))


def as_kernel_sizes(kernel_size: Any) -> tuple[int, int, int]:
    """Kernel sizes of a layer's three convolutions, from an odd integer or three of them.

    Raises:
        TypeError, ValueError: not one or three odd positive integers.
    """
    first, second, third = (
        check_odd("kernel_size", value)
        for value in _one_or_several("kernel_size", kernel_size, 3, (3,), "three of them")
    )
    return first, second, third


def _one_or_several(
    name: str, value: Any, count: int, counts: Sequence[int], several: str
) -> list[int]:
    """``count`` positive integers from one, or those of a sequence or an array of ``counts``."""
    sequence = isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1
    values = list(value) if sequence else [value] * count
    if len(values) not in counts:
        raise ValueError(f"{name} must be an integer or {several}, got {value!r}")
    return [check_integer(name, each, least=1) for each in values]


def check_odd(name: str, value: Any) -> int:
    """``value`` as an odd positive Python integer.

    Raises:
        TypeError, ValueError: it is not.
    """
    integer = check_integer(name, value, least=1)
    if integer % 2 == 0:
        raise ValueError(f"{name} must be odd, so that a kernel has a centre, got {integer}")
    return integer
