"""Hooks of modules that are computed together, and not called one by one.

A Mint layer computes its three convolutions at once, and an inverse calls no ``forward``. So what
``nn.Module.__call__`` does for the hooks of a module is done here, in two parts:

- forward pre-hooks run before weights are read, for they may compute them, as pruning and the old
  ``weight_norm`` and ``spectral_norm`` do; there is no input yet to show them;
- hooks that look at inputs, outputs or gradients run around a convolution that is computed on its
  own, in plain PyTorch; pre-hooks that do so are found when they run without an input.
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
    __class__ = property(_refuse)  # what isinstance looks at


def run_weight_hooks(module: nn.Module) -> None:
    """Let the forward pre-hooks of a module compute its weights, where ``__call__`` does not.

    They run where some weight is computed: a plain tensor, and no parameter. One that wants its
    input is left for the forward pass.
    """
    if _tensors(module):
        for key in tuple(module._forward_pre_hooks):  # a hook may remove itself
            _wants_input(module, key)


def run_conv_hooks(conv: nn.Module, watching: set[int], name: str) -> None:
    """Let the forward pre-hooks of a convolution compute its weights, in whatever way.

    Args:
        conv: computed together with others.
        watching: keys of hooks that want their input, which are left for :func:`call_watched`;
            others that are found to do so are added.
        name: of the convolution, for the message.

    Raises:
        HookError: a hook keeps what it gets for an input.
    """
    for key in tuple(conv._forward_pre_hooks):
        if key not in watching and _wants_input(conv, key, name):
            watching.add(key)


def _wants_input(module: nn.Module, key: int, name: str | None = None) -> bool:
    """Run a forward pre-hook without an input, and tell whether it looked for one."""
    nothing = _NoInput()
    alive = weakref.ref(nothing)
    try:
        wanted = _run_pre_hook(module, key, nothing) is not None
    except HookError:
        wanted = True
    del nothing
    if name is not None and not wanted and alive() is not None:
        raise HookError(
            f"a forward pre-hook of {name} keeps its input unseen, and there is none yet: inside a "
            "layer, pre-hooks run first, to compute weights. A forward hook gets the input as well"
        )
    return wanted


def _run_pre_hook(module: nn.Module, key: int, inputs: Any) -> Any:
    with_keywords = key in module._forward_pre_hooks_with_kwargs
    return module._forward_pre_hooks[key](module, inputs, *_keywords(with_keywords))


def _keywords(wanted: bool) -> tuple[dict[str, Any], ...]:
    """What a hook gets for keyword arguments, if it asked for them: a convolution takes none."""
    return ({},) if wanted else ()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Plain tensors where others have parameters: what hooks have computed."""
    return {name: one for name, one in vars(module).items() if isinstance(one, Tensor)}


def has_idle_hooks(module: nn.Module) -> bool:
    """Whether hooks of a module would be missed where it is computed, but not called."""
    return is_watched(module) or (bool(module._forward_pre_hooks) and not _tensors(module))


def is_watched(module: nn.Module) -> bool:
    """Whether hooks look at the outputs or gradients of a module."""
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
    name: str,
    module: nn.Module,
    watching: set[int],
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    """``compute(x)``, the forward of a module, with the hooks that look at it.

    Raises:
        HookError: a hook returns another input or output, which would belie the determinant, or
            there are backward hooks of the old kind.
    """
    full, old = module._get_backward_hooks() if module._backward_hooks else ([], [])
    if old:
        raise HookError(
            f"{name} has a hook of register_backward_hook, which torch has deprecated; use "
            "register_full_backward_hook"
        )
    inputs: tuple[Tensor, ...] = (x,)
    _run_watching(name, module, watching, x)
    around = None
    if full or module._backward_pre_hooks:
        around = BackwardHook(module, full, list(module._backward_pre_hooks.values()))
        inputs = around.setup_input_hook(inputs)
    output = compute(*inputs)
    for key, hook in tuple(module._forward_hooks.items()):
        keywords = _keywords(key in module._forward_hooks_with_kwargs)
        returned = hook(module, inputs, *keywords, output)
        if returned is not None and returned is not output:
            raise _other_value(name, "forward hook", "output")
    if around is not None:
        output = around.setup_output_hook(output)
    return output


def _run_watching(name: str, module: nn.Module, watching: set[int], x: Tensor) -> None:
    """Run the pre-hooks that look at the input."""
    weights = _tensors(module)
    for key in tuple(module._forward_pre_hooks):
        if key not in watching:
            continue
        with_keywords = key in module._forward_pre_hooks_with_kwargs
        returned = _run_pre_hook(module, key, (x,))
        given = returned[0] if with_keywords and returned is not None else returned
        if given is not None and any(
            one is not x for one in (given if isinstance(given, tuple) else (given,))
        ):
            raise _other_value(name, "forward pre-hook", "input")
    if any(weights.get(key) is not one for key, one in _tensors(module).items()):
        raise HookError(
            f"a forward pre-hook of {name} looks at its input and sets a tensor, and weights are "
            "computed before there is an input. Make it two hooks"
        )


def _other_value(name: str, hook: str, value: str) -> HookError:
    return HookError(
        f"a {hook} of {name} returns another {value}; the determinant of a Mint layer holds for "
        "what its convolutions compute. Change their weights instead"
    )
