"""What a map may be given beside its input: a context, and the networks of layers that read it.

A context changes the biases and the t of Mint layers alone, sample by sample. So triangularity, the
sign condition, the log-determinant and every solver hold as they do without one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from mintnet_triton.checks import check_integer, check_tensor
from mintnet_triton.kernels import convolve

#: a network of a layer, or what makes one for a number of outputs
ContextNetwork = nn.Module | Callable[[int], nn.Module]


class Taker(Protocol):
    """What may take a context."""

    @property
    def context(self) -> int | None:
        """Channels of the context; None if it takes none."""


class ContextLinear(nn.Linear):
    """The default network of a layer: linear in a vector, or in each pixel of a map.

    One weight (outputs, context) for both, which starts at zero, and no bias: a context of zeros
    changes nothing.
    """

    def __init__(self, context: int, outputs: int, **factory: Any) -> None:
        super().__init__(context, outputs, bias=False, **factory)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, context: Tensor) -> Tensor:
        """(B, context) -> (B, outputs), or (B, context, H, W) -> (B, outputs, H, W)."""
        if context.ndim > 2:
            weight = self.weight.reshape(*self.weight.shape, *[1] * (context.ndim - 2))
            return convolve(context, weight, None)
        return F.linear(context, self.weight)


def make_network(
    context: int | None, network: ContextNetwork | None, outputs: int, **factory: Any
) -> tuple[int | None, nn.Module | None]:
    """Channels of a layer's context, and its network.

    Raises:
        TypeError, ValueError: an argument outside its range, or a network without a context.
    """
    if context is None:
        if network is not None:
            raise ValueError("context_network needs context, the number of its channels, got None")
        return None, None
    context = check_integer("context", context, least=1)
    if network is None:
        return context, ContextLinear(context, outputs, **factory)
    made = network if isinstance(network, nn.Module) or not callable(network) else network(outputs)
    if not isinstance(made, nn.Module):
        raise TypeError(
            "context_network must be an nn.Module, or a function of the number of outputs that "
            f"returns one, got {network!r}{'' if made is network else f', which gave {made!r}'}"
        )
    return context, made


def check_maker(network: ContextNetwork | None) -> None:
    """Refuse one network for several layers.

    Raises:
        TypeError: it is a module, or nothing that could make one.
    """
    if isinstance(network, nn.Module) or not (network is None or callable(network)):
        raise TypeError(
            "context_network must be a function of the number of outputs that returns a module, "
            f"for each layer has a network of its own, got {type(network).__name__}"
        )


def check_context(
    taker: Taker,
    context: Tensor | None,
    x: Tensor,
    size: Sequence[int | None],
    like: Tensor | None,
) -> None:
    """Raise a typed error unless a context is given where one is taken, and fits.

    Args:
        taker: that takes one, or none.
        context: (B, channels) or (B, channels, H, W).
        x: whose samples it belongs to.
        size: (H, W) of a map, or its sizes along as many axes as x has.
        like: a parameter, whose dtype and device it must have.

    Raises:
        TypeError: it is missing or superfluous, no tensor, or of another dtype.
        ValueError: it is of another shape or device, or of another number of samples.
        NonFiniteError: it holds a NaN or an infinity.
    """
    name = type(taker).__name__
    if taker.context is None:
        if context is not None:
            raise TypeError(
                f"{name} takes no context, for it was made without context=, got one of type "
                f"{type(context).__name__}"
            )
        return
    sizes = ("L", "H, W", "D, H, W")[len(size) - 1]
    wanted = f"(batch, {taker.context}) or (batch, {taker.context}, {sizes})"
    if context is None:
        raise TypeError(f"{name} was made for a context, and needs one of shape {wanted}, got None")
    rank = 2 + len(size)  # of a batch of maps
    is_map = isinstance(context, Tensor) and context.ndim == rank
    if isinstance(context, Tensor) and context.ndim not in (2, rank):
        raise ValueError(f"context must have shape {wanted}, got {tuple(context.shape)}")
    if isinstance(context, Tensor) and not context.is_floating_point():
        raise TypeError(
            f"context must be of a floating dtype, got {context.dtype}; labels as "
            "torch.nn.functional.one_hot(labels, channels).to(dtype)"
        )
    check_tensor("context", context, (taker.context, *(size if is_map else ())), like)
    if context.shape[0] != x.shape[0]:
        raise ValueError(
            f"context has {context.shape[0]} samples, the input {x.shape[0]}: give one row a sample"
        )


def rows_of_context(context: Tensor | None, n: int, axes: int) -> Tensor | None:
    """The context of n samples, from one for all: (c,), (c, H, W), or of one row.

    Others are left as they are, to be checked; along one axis (c, L) are c rows, and no map.
    """
    if not isinstance(context, Tensor) or not context.ndim:
        return context
    if context.ndim == 1 or context.ndim == 1 + axes > 2:
        context = context.unsqueeze(0)
    return context.expand(n, *context.shape[1:]) if len(context) == 1 else context
