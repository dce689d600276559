"""The same map with other tensors for its weights: in another dtype, or as variables of a gradient.

A view shares everything else with the map it is made of, and copies nothing: whatever a user's
module carries (hooks, locks, open files) stays where it is.
"""

from collections.abc import Mapping
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mintnet_triton.hooks import run_weight_hooks

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@runtime_checkable
class Viewable(Protocol):
    """A module that says for itself what its weights are."""

    def tensors(self) -> dict[str, Tensor]:
        """All that the map depends on but its input, by name, with gradients; computed once."""

    def view(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The same map with these for what :meth:`tensors` gave."""


def twin(module: AnyModule) -> AnyModule:
    """Another module of the same attributes and hooks, whose own attributes may be set."""
    other: AnyModule = object.__new__(type(module))
    other.__dict__.update(vars(module))
    return other


def shallow(module: AnyModule) -> AnyModule:
    """Another module with the same attributes, whose own may be set."""
    # Not by the class itself, which may be one that a library has put in place of the user's.
    other: AnyModule = object.__new__(parametrize.type_before_parametrizations(module))
    other.__dict__.update(vars(module))
    kind: object = module
    if isinstance(kind, Viewable):  # it is computed, not called, and its weights are there
        for hooks in _HOOKS:
            other.__dict__[hooks] = {}
    return other


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module of any kind: parameters, buffers, and what is computed from them."""
    run_weight_hooks(module)
    found = {
        name: value
        for group in (module._parameters, module._buffers, vars(module))
        for name, value in group.items()
        if isinstance(value, Tensor)
    }
    for name in _parametrized(module):
        found[name] = getattr(module, name)
    for name, child in _children(module).items():
        inner = child.tensors() if isinstance(child, Viewable) else tensors_of(child)
        found |= {f"{name}.{key}": value for key, value in inner.items()}
    return found


def view_of(module: AnyModule, tensors: Mapping[str, Tensor]) -> AnyModule:
    """A module of any kind with other values of what :func:`tensors_of` gave."""
    view = shallow(module)
    own = {name: value for name, value in tensors.items() if "." not in name}
    for group in ("_parameters", "_buffers"):
        left = {name: one for name, one in getattr(module, group).items() if name not in own}
        view.__dict__[group] = left
    # Without parametrizations: their values are here, and a view of this view has the right type.
    view.__dict__["_modules"] = _children(module)
    for name, child in _children(module).items():
        start = f"{name}."
        inner = {
            key.removeprefix(start): value
            for key, value in tensors.items()
            if key.startswith(start)
        }
        view._modules[name] = (
            child.view(inner) if isinstance(child, Viewable) else view_of(child, inner)
        )
    view.__dict__.update(own)
    return view


def in_dtype(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, *, detached: bool
) -> dict[str, Tensor]:
    """Floating tensors in that dtype, or their own if that is wider."""

    def cast(one: Tensor) -> Tensor:
        one = one.detach() if detached and one.requires_grad else one
        return one.to(torch.promote_types(one.dtype, dtype)) if one.is_floating_point() else one

    return {name: cast(one) for name, one in tensors.items()}


def _parametrized(module: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    return list(module.parametrizations)  # type: ignore[arg-type]  # a ModuleDict


def _children(module: nn.Module) -> dict[str, nn.Module]:
    computed = {"parametrizations"} if _parametrized(module) else set()
    return {
        name: child
        for name, child in module._modules.items()
        if child is not None and name not in computed
    }
