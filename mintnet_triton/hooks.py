"""Hooks of modules that are computed together, and not called one by one.

A Mint layer computes its three convolutions at once, and an inverse calls no ``forward``. So what
``nn.Module.__call__`` does for the hooks of a module is done here, in two parts:

- forward pre-hooks run before weights are read, for they may compute them, as pruning and the old
  ``weight_norm`` and ``spectral_norm`` do; there is no input yet to show them;
- forward and backward hooks look at inputs and outputs, and run around a convolution that is
  computed on its own, in plain PyTorch.
"""

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import BackwardHook


class HookError(TypeError):
    """A hook wants what there is not where modules are computed together."""


class _NoInput:
    """What a pre-hook gets for the inputs of its module; to look into it raises."""

    def _refuse(self, *_: object) -> NoReturn:
        raise HookError("there is no input yet")

    __getitem__ = __iter__ = __len__ = __bool__ = __contains__ = _refuse


def run_weight_hooks(module: nn.Module, name: str | None = None) -> None:
    """Let the forward pre-hooks of a module compute its weights.

    Args:
        module: whose ``__call__`` will not run them.
        name: of the module, if all of its hooks have to be such. Else hooks run where some weight
            is computed, a plain tensor and no parameter, and those that want an input are left for
            the forward pass.

    Raises:
        HookError: a hook of a module with a name looks at its input, keeps it, or returns another.
    """
    computed = any(isinstance(value, Tensor) for value in vars(module).values())
    if name is None and not computed:
        return
    for key, hook in module._forward_pre_hooks.items():
        nothing = _NoInput()
        alive = weakref.ref(nothing)
        keywords: tuple[dict[str, Any], ...] = ()
        if key in module._forward_pre_hooks_with_kwargs:
            keywords = ({},)
        try:
            wanted = hook(module, nothing, *keywords) is not None
        except HookError:
            wanted = True
        del nothing
        if name is not None and (wanted or alive() is not None):
            raise HookError(
                f"a forward pre-hook of {name} wants its input; inside a layer, pre-hooks run "
                "before there is any, to compute weights. A forward hook gets the input as well"
            )


def is_watched(module: nn.Module) -> bool:
    """Whether hooks look at the inputs, outputs or gradients of a module."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def has_to_be_called(module: nn.Module) -> bool:
    """Whether something would be missed if not ``module(x)`` itself were called."""
    return (
        is_watched(module)
        or bool(module._forward_pre_hooks)
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
        or torch_module._has_any_global_hook()
    )


def call_watched(
    name: str, module: nn.Module, compute: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """``compute(x)``, the forward of a module, with the hooks that look at it.

    Raises:
        HookError: a forward hook returns another output, which would belie the determinant, or
            there are backward hooks of the old kind.
    """
    full, old = module._get_backward_hooks() if module._backward_hooks else ([], [])
    if old:
        raise HookError(
            f"{name} has a hook of register_backward_hook, which torch has deprecated; use "
            "register_full_backward_hook"
        )
    inputs: tuple[Tensor, ...] = (x,)
    around = None
    if full or module._backward_pre_hooks:
        around = BackwardHook(module, full, list(module._backward_pre_hooks.values()))
        inputs = around.setup_input_hook(inputs)
    output = compute(*inputs)
    for key, hook in module._forward_hooks.items():
        with_keywords = key in module._forward_hooks_with_kwargs
        keywords: tuple[dict[str, Any], ...] = ({},) if with_keywords else ()
        returned = hook(module, inputs, *keywords, output)
        if returned is not None and returned is not output:
            raise HookError(
                f"a forward hook of {name} returns another output; the determinant of a Mint layer "
                "holds for what its convolutions compute. Change their weights instead"
            )
    if around is not None:
        output = around.setup_output_hook(output)
    return output
