"""Which implementation computes the operations of this package."""

from collections.abc import Iterator
from contextlib import contextmanager


class BackendError(RuntimeError):
    """The chosen backend cannot run here."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation for the calls inside the ``with`` block.

    Args:
        name: ``"torch"``, plain PyTorch on any device; ``"auto"``, the best that is available; or
            ``"triton"``. This version has plain PyTorch only, so the first two are the same.

    Raises:
        ValueError: ``name`` is none of the three.
        BackendError: ``"triton"`` was asked for, and this version has no Triton kernels.
    """
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"name must be 'auto', 'torch' or 'triton', got {name!r}")
    if name == "triton":
        raise BackendError("this version has no Triton kernels; use 'auto' or 'torch'")
    yield
