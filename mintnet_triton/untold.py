"""What a constructor's arguments and a state dict do not tell of a module that was changed."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

# What a module has besides: no part of the function, or (compile) the same one.
_BESIDES = {*vars(nn.Module()), "_compiled_call_impl", "arguments", "recompute"}


def untold(model: nn.Module, rebuilt: nn.Module) -> str | None:
    """The first thing in which a model differs from its constructor's work and a state dict.

    Modes, hooks, ``requires_grad``, dtypes, devices and the layout of dense memory do not count,
    nor what :meth:`torch.nn.Module.compile` does.

    Args:
        model: as it is.
        rebuilt: by the same constructor; it may be on the meta device.

    Returns:
        A sentence that names the module or the tensor; None where there is no difference.
    """
    return next(_differences(model, rebuilt), None)


def _differences(model: nn.Module, rebuilt: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    expected = dict(rebuilt.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if name in expected:
            yield from _module_differences(name or "the model", module, expected[name])
    yield from _name_differences("module", modules, expected)
    if list(modules) != list(expected):
        yield "its modules stand in another order"
    for kind in ("parameters", "buffers"):
        theirs, ours = (
            dict(getattr(whole, f"named_{kind}")(remove_duplicate=False))
            for whole in (model, rebuilt)
        )
        yield from _name_differences(kind.removesuffix("s"), theirs, ours)
    state, expected_state = model.state_dict(), rebuilt.state_dict()
    yield from _name_differences("entry of the state dict", state, expected_state)
    for name, tensor in state.items():
        yield from _tensor_differences(name, tensor, expected_state[name])
    yield from _shared_memory(state)


def _module_differences(name: str, module: nn.Module, expected: nn.Module) -> Iterator[str]:
    kind = type(expected)
    if type(module) is not kind:
        yield f"{name!r} is of the type {type(module).__name__}, not {kind.__name__}"
        return
    for attribute, value in vars(expected).items():
        if attribute in _BESIDES or attribute.startswith("_") or isinstance(value, Tensor):
            continue
        theirs = vars(module).get(attribute)
        if not isinstance(theirs, type(value)) or theirs != value:
            yield f"{attribute!r} of {name!r} is {theirs!r}, not {value!r}"
    for attribute, value in vars(module).items():
        if attribute not in _BESIDES and attribute not in vars(expected):
            usual = getattr(kind, attribute, None)
            compiled = getattr(value, "_torchdynamo_orig_callable", value)
            if usual is not None and getattr(compiled, "__func__", None) is not usual:
                yield f"{name!r} has a {attribute!r} of its own"


def _name_differences(
    what: str, names: Mapping[str, object], expected: Mapping[str, object]
) -> Iterator[str]:
    for name in expected:
        if name not in names:
            yield f"the {what} {name!r} is missing"
    for name in names:
        if name not in expected:
            yield f"the {what} {name!r} has been added"


def _tensor_differences(name: str, tensor: Any, expected: Tensor) -> Iterator[str]:
    if type(tensor) is not Tensor:
        yield f"{name!r} is a {type(tensor).__name__}, not a plain tensor"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        yield f"{name!r} is not dense, but {tensor.layout}, {tensor.dtype}"
    elif tensor.is_meta:
        yield f"{name!r} has no values, for it is on the meta device"
    elif tensor.shape != expected.shape:
        yield f"{name!r} is of shape {tuple(tensor.shape)}, not {tuple(expected.shape)}"
    elif tensor.is_floating_point() != expected.is_floating_point() or tensor.is_complex():
        yield f"{name!r} is of {tensor.dtype}, not like {expected.dtype}"


def _shared_memory(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Tensors that change together would not do so once they are read back."""
    spans = []
    for name, tensor in state.items():
        if tensor.numel():
            reach = sum(
                (size - 1) * stride
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            end = start + (reach + 1) * tensor.element_size()
            spans.append((str(tensor.device), start, end, name))
    spans.sort()
    for (device, _, end, name), (other_device, start, _, other) in pairwise(spans):
        if device == other_device and start < end:
            yield f"{name!r} and {other!r} share memory"
