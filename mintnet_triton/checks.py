"""Input checks of all modules: an error names the argument, what came, what is expected."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    wanted = "(batch, " + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    if x.ndim != len(shape) + 1:
        raise ValueError(
            f"{name} must have {len(shape) + 1} dimensions, shape {wanted}, "
            f"got {x.ndim}, shape {tuple(x.shape)}"
        )
    for dimension, size in enumerate(shape, start=1):
        if size is not None and x.shape[dimension] != size:
            raise ValueError(
                f"{name} must have shape {wanted}, got {tuple(x.shape)}: "
                f"dimension {dimension} is {x.shape[dimension]}, expected {size}"
            )
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be of a floating dtype, got {x.dtype}; ImagePreprocess and bits_per_dim "
            "take images of integers"
        )
    if like is not None:
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device}, the module's parameters on {like.device}")
        # Autocast casts between the others, but never from or to float64.
        cast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (
            x.dtype,
            like.dtype,
        )
        if x.dtype != like.dtype and not cast:
            raise TypeError(
                f"{name} is {x.dtype}, the module's parameters are {like.dtype}; take one to the "
                "other with .to(dtype)"
            )
    if x.device.type == "cpu":
        check_finite(name, x)


def is_traced() -> bool:
    """Under ``torch.compile`` or a transform of ``torch.func``, where values are not known."""
    return torch.compiler.is_compiling() or bool(torch._C._functorch.peek_interpreter_stack())


def check_finite(name: str, x: Tensor) -> None:
    """Raise if ``x`` holds a NaN or an infinity, and say where.

    A forward pass calls this on a CPU only, for on a GPU it would wait for the device; ``log_prob``
    and ``invert`` call it anywhere. It does nothing where :func:`is_traced`.

    Raises:
        NonFiniteError: with the number of such values and the index of the first.
    """
    if is_traced():
        return
    bad = ~torch.isfinite(x.detach())
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"{name} holds {int(x.isnan().sum())} NaN and {int(x.isinf().sum())} infinite values, "
            f"the first at index {first}"
        )


def check_positive(**arguments: int) -> None:
    """Check that integer arguments are at least 1.

    Raises:
        TypeError: not an integer.
        ValueError: below 1.
    """
    for name, value in arguments.items():
        check_integer(name, value, least=1)


def check_integer(name: str, value: object, least: int) -> None:
    """Check that ``value`` is an integer of at least ``least``.

    Raises:
        TypeError: not an integer.
        ValueError: too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def as_size(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from an integer or a pair.

    Raises:
        TypeError, ValueError: not one or two positive integers.
    """
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or (height, width), got {size!r}")
    for value in pair:
        check_integer(name, value, least=1)
    return pair


def as_kernel_sizes(kernel_size: int | Sequence[int]) -> tuple[int, int, int]:
    """Kernel sizes of a layer's three convolutions, from an odd integer or three of them.

    Raises:
        TypeError, ValueError: not one or three odd positive integers.
    """
    sizes = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size,) * 3
    if len(sizes) != 3:
        raise ValueError(f"kernel_size must be an integer or three of them, got {kernel_size!r}")
    for value in sizes:
        check_odd("kernel_size", value)
    return sizes


def check_odd(name: str, value: object) -> None:
    """Check that ``value`` is an odd positive integer.

    Raises:
        TypeError, ValueError: it is not.
    """
    check_integer(name, value, least=1)
    if isinstance(value, int) and value % 2 == 0:
        raise ValueError(f"{name} must be odd, so that a kernel has a centre, got {value}")
