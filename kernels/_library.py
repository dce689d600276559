"""The operators of this package in torch's dispatcher, for ``torch.compile`` and autocast.

An operator is defined, implemented and given a fake (shapes alone) here in one call. Its gradient
lies outside, in an ``autograd.Function`` beside it: the cheapest way that ``torch.compile`` traces.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "mintnet_triton"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``.
        implementation: launches kernels; for CUDA, and for a CPU in Triton's interpreter.
        fake: gives outputs of the right shape, dtype and strides, without values.

    Returns:
        The operator, to be called.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of products: the weights', or autocast's unless they are float64."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def opposite(triangle: str) -> str:
    """The triangle of a transposed map."""
    return "upper" if triangle == "lower" else "lower"
