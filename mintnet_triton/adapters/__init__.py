"""Layers and flows of this library inside others: a file a library, imported where it is asked for.

Every adapter takes an :class:`mintnet_triton.Invertible` as it is: a layer, a pair, a network, or a
map of the calculus. The module inside, ``adapter.model``, is the caller's own: its parameters are
shared, and all that is done to it is seen.
"""

import importlib
import warnings
from collections.abc import Callable
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from mintnet_triton.invertible import Invertible, as_invertible
from mintnet_triton.solvers import Solver


def library(name: str, extra: str) -> Any:
    """Import a module of another library.

    Raises:
        ModuleNotFoundError: names the extra of this package that brings it.
    """
    try:
        with warnings.catch_warnings():
            # Of Python and torch, as older libraries are compiled and imported: not of their use.
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = name.split(".")[0]
        if str(error.name).split(".")[0] != missing:  # what it needs itself
            raise
        message = f"{missing} is not installed: pip install 'mintnet-triton[{extra}]'"
        raise ModuleNotFoundError(message, name=missing) from error


def check_model(model: nn.Module) -> Invertible:
    """The invertible map that a module is or has inside.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an Invertible, got {type(model).__name__}")
    return as_invertible("model", model)


def event_shapes(model: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a sample and of its latent, without the batch.

    Raises:
        TypeError: model is no invertible map.
        ValueError: it takes samples of any shape.
    """
    inner = check_model(model)
    shapes = []
    for shape in (inner.input_shape, inner.output_shape):
        if shape is None or None in shape:
            raise ValueError(
                f"model must be for samples of one shape, and this {type(inner).__name__} is not"
            )
        shapes.append(tuple(int(size) for size in shape if size is not None))
    return shapes[0], shapes[1]


def given(model: nn.Module, context: Tensor | None) -> dict[str, Tensor]:
    """The context as an argument, where there is one and the model takes it.

    Flows of other libraries hand theirs to all their parts, and those that take none ignore it.
    """
    takes = getattr(check_model(model), "context", None) is not None
    return {"context": context} if takes and context is not None else {}


def to_latent(model: nn.Module, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (..., event) -> z (..., latent), and log|det dz/dx| (...), for a batch of any shape."""
    shape, _ = event_shapes(model)
    return _over_batch(model, lambda *one, **more: model(*one, **more), "x", x, shape, context)


def to_data(
    model: nn.Module, z: Tensor, solver: Solver | None = None, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z (..., latent) -> x (..., event), and log|det dx/dz| (...), for a batch of any shape."""
    inner = check_model(model)
    _, shape = event_shapes(model)
    return _over_batch(
        model, lambda one, **more: inner.inverse(one, solver, **more), "z", z, shape, context
    )


def _over_batch(
    model: nn.Module,
    function: Callable[..., tuple[Tensor, Tensor]],
    name: str,
    values: Tensor,
    shape: tuple[int, ...],
    context: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
    batch = values.shape[: max(0, values.ndim - len(shape))]
    if values.shape[len(batch) :] != shape:
        raise ValueError(
            f"{name} must have shape (..., {', '.join(map(str, shape))}), got {tuple(values.shape)}"
        )
    own = {key: _flat_context(model, one, batch) for key, one in given(model, context).items()}
    result, log_det = function(values.reshape(prod(batch), *shape), **own)
    return result.reshape(*batch, *result.shape[1:]), log_det.reshape(batch)


def _flat_context(model: nn.Module, context: Tensor, batch: torch.Size) -> Tensor:
    """A context (..., channels) or map (..., channels, H, W) for a batch, in one dimension.

    Leading dimensions of the batch that it lacks are those of samples drawn for each context.
    """
    if not isinstance(context, Tensor):
        raise TypeError(f"context must be a torch.Tensor, got {type(context).__name__}")
    inner = check_model(model)
    (_, *size), _ = event_shapes(model)
    channels = cast(int, inner.context)
    vector, map_ = torch.Size([channels]), torch.Size([channels, *size])
    ends = [own for own in (vector, map_) if context.shape[-len(own) :] == own] or [vector]
    leading = {own: context.shape[: max(0, context.ndim - len(own))] for own in ends}
    fitting = [own for own in ends if _broadcasts(leading[own], batch)]
    if not fitting:
        raise ValueError(
            f"context must be one for each of a batch of {tuple(batch)}, got {tuple(context.shape)}"
        )
    # Of as many vectors as there are channels, one may look like a map: then none is left out.
    chosen = [own for own in fitting if leading[own] == batch] or fitting
    if len(chosen) > 1:
        raise ValueError(
            f"context of shape {tuple(context.shape)} may be vectors {tuple(vector)} or maps "
            f"{tuple(map_)} for a "
            f"batch of {tuple(batch)}: expand it to one for each of the batch"
        )
    own_shape = context.shape[len(leading[chosen[0]]) :]
    return context.expand(*batch, *own_shape).reshape(prod(batch), *own_shape)


def _broadcasts(leading: torch.Size, batch: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(leading, batch) == batch)
    except RuntimeError:
        return False
