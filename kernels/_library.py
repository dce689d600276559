"""The operators of this package in torch's dispatcher, for ``torch.compile`` and autocast.

An operator is defined, implemented and given a fake (shapes alone) here in one call. Its gradient
lies outside, in an ``autograd.Function`` beside it: the cheapest way that ``torch.compile`` traces.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mintnet_triton.kernels.backend import BackendError

NAMESPACE = "mintnet_triton"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    devices: Sequence[str] = ("CUDA", "CPU"),
) -> Any:
    """Register an operator.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``.
        implementation: launches kernels.
        fake: gives outputs of the right shape, dtype and strides, without values.
        devices: that it is for; a CPU, too, for the sake of Triton's interpreter.

    Returns:
        The operator, to be called.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in devices:
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class _OnlyOnce(torch.autograd.Function):
    """A gradient that depends on tensors in a way that nobody has written down."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *dependencies: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise BackendError(
            "gradients of the Triton kernels cannot be differentiated again; use_backend('torch') "
            "for second derivatives"
        )


def only_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward pass whose gradients raise where they are differentiated again.

    torch's ``once_differentiable`` lets them pass for constants if the upstream gradient is one.

    Args:
        backward: gets the saved tensors after the context: what unpacks them may do so only once,
            as activation checkpointing does.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, saved, *upstream)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        tensors = [one for one in (*saved, *upstream) if isinstance(one, Tensor)]
        once: Any = _OnlyOnce.apply
        return tuple(None if one is None else once(one, *tensors) for one in gradients)

    return wrapper


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of products: the weights', or autocast's unless they are float64."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def opposite(triangle: str) -> str:
    """The triangle of a transposed map."""
    return "upper" if triangle == "lower" else "lower"
