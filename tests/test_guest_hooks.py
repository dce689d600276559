"""Hooks that look at layers and convolutions run as they do in torch, or are refused."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mintnet_triton as mint
from mintnet_triton.calculus import Compose, Elementwise
from tests.guest import (
    KINDS,
    assert_rounded,
    assert_same,
    compute_by_hook,
    convs_of,
    doubled,
    inputs,
    make,
    make_flow,
    make_layer,
    total,
)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_hooks_of_layers_run_in_any_model(
    kind: str, dtype: torch.dtype
) -> None:
    module, x = make(kind, dtype), inputs(dtype).requires_grad_()
    expected = module(x)
    seen: list[str] = []

    def forward_hook(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, given: tuple[Tensor, ...], results: Any) -> None:
            y, log_det = results
            assert y.shape == given[0].shape
            assert log_det.shape == (len(y),)
            seen.append(f"forward {name}")

        return hook

    def backward_hook(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, by_inputs: Any, by_outputs: Any) -> None:
            assert by_inputs[0].shape == by_outputs[0].shape
            seen.append(f"backward {name}")

        return hook

    layers = [n for n, one in module.named_modules() if isinstance(one, mint.MintLayer)]
    for name in layers:
        layer = module.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.append(f"before {name}"))
        layer.register_forward_hook(forward_hook(name))
        layer.register_full_backward_hook(backward_hook(name))
    results = module(x)
    assert_rounded(results, expected)
    total(results).backward()
    events = [f"{event} {name}" for name in layers for event in ("before", "forward")]
    assert seen == events + [f"backward {name}" for name in reversed(layers)]


def test_hooks_of_blocks_and_all_modules_run_in_a_classifier() -> None:
    classifier, x = make("classifier"), inputs()
    seen = []
    block = classifier.get_submodule("layers.0")
    block.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, result: seen.append(type(module))
    )
    try:
        expected = classifier(x)
    finally:
        handle.remove()
    assert seen.count(mint.MintLayer) == 4
    assert torch.Size([3, 4, 4, 4]) in seen
    assert_same(classifier(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_hooks_for_features_of_convolutions(kind: str, dtype: torch.dtype, frozen: bool) -> None:
    module, x = make(kind, dtype), inputs(dtype)
    expected = module(x)
    conv1, conv2, conv3 = convs_of(module)[:3]
    features: dict[mint.MaskedConv2d, tuple[Tensor, Tensor]] = {}

    def keep(conv: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, mint.MaskedConv2d)
        features[conv] = given[0], output

    def keep_all(conv: nn.Module, given: Any, keywords: dict[str, Any], output: Tensor) -> None:
        assert keywords == {}
        keep(conv, given, output)

    conv1.register_forward_hook(keep)
    conv2.register_forward_hook(keep_all, with_kwargs=True)
    conv3.register_forward_hook(keep)
    with mint.frozen(module) if frozen else contextlib.nullcontext():
        results = module(x)
    assert_rounded(results, expected)
    activation = next(one for one in module.modules() if isinstance(one, mint.MintLayer)).activation
    for before, after in ((conv1, conv2), (conv2, conv3)):
        assert_same(activation.function(features[before][1]), features[after][0])
    assert_same(conv1(features[conv1][0]), features[conv1][1])
    assert_same(conv3(features[conv3][0]), features[conv3][1])


def test_backward_hooks_of_convolutions_may_change_gradients(backend: str) -> None:
    layer, x = make_layer(), inputs().requires_grad_()
    expected = torch.autograd.grad(total(layer(x)), [x, layer.conv2.weight])
    seen: list[str] = []

    def before(conv: nn.Module, by_outputs: tuple[Tensor, ...]) -> None:
        seen.append("before")

    def after(conv: nn.Module, by_inputs: Any, by_outputs: Any) -> tuple[Tensor, ...]:
        seen.append("after")
        return (0 * by_inputs[0],)

    layer.conv2.register_full_backward_pre_hook(before)
    handle = layer.conv2.register_full_backward_hook(lambda *_: seen.append("looked"))
    assert_rounded(torch.autograd.grad(total(layer(x)), [x, layer.conv2.weight]), expected)
    handle.remove()
    layer.conv2.register_full_backward_hook(after)
    y = layer.transform(x)
    _, by_weight1 = torch.autograd.grad(total(y), [x, layer.conv1.weight])
    assert not bool(by_weight1.any())
    assert seen == ["before", "looked", "before", "after"]


def test_pre_hooks_that_look_get_the_input(backend: str) -> None:
    """And those that compute weights beside them do not run twice."""
    layer, x = make_layer(), inputs()
    expected = layer(x)
    features: list[Tensor] = []
    events: list[str] = []

    def look(conv: nn.Module, given: tuple[Tensor, ...]) -> None:
        features.append(given[0])
        events.append("looked")

    layer.conv2.register_forward_pre_hook(look)
    layer.conv2.register_forward_pre_hook(lambda conv, given: events.append("weights"))
    layer.conv3.register_forward_hook(lambda conv, given, output: features.append(given[0]))
    for _ in range(2):
        features.clear()
        events.clear()
        assert_same(layer(x), expected)
        assert_same(features[0], layer.activation.function(layer.conv1(x)))
        assert features[1].shape == features[0].shape
        assert events == ["weights", "looked"]
    events.clear()
    layer.inverse(x)
    assert events == ["weights"]


@pytest.mark.parametrize("with_kwargs", [False, True])
@pytest.mark.parametrize("look", [len, tuple, lambda given: isinstance(given, tuple)])
def test_pre_hooks_may_look_in_any_way_and_give_back_what_they_got(
    look: Callable[[Any], Any], with_kwargs: bool
) -> None:
    layer, x = make_layer(), inputs()
    expected, calls = layer(x), []

    def hook(conv: nn.Module, given: Any, *keywords: Any) -> Any:
        look(given)
        calls.append(given[0].shape)
        return (given, *keywords) if keywords else given

    layer.conv1.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
    layer.conv1.register_forward_pre_hook(lambda *_: calls.append("first"), prepend=True)
    assert_same(layer(x), expected)
    assert calls == ["first", x.shape]


def test_hooks_may_remove_themselves() -> None:
    layer, x = make_layer(), inputs()
    expected = layer(x)
    seen: list[str] = []

    def once(register: Callable[[Any], Any], name: str) -> None:
        def hook(*_: Any) -> None:
            seen.append(name)
            handle.remove()

        handle = register(hook)

    for conv in (layer.conv1, layer.conv2):
        once(conv.register_forward_pre_hook, "before")
        once(conv.register_forward_hook, "after")
    for _ in range(2):
        assert_same(layer(x), expected)
    assert sorted(seen) == ["after", "after", "before", "before"]


def test_a_hook_that_computes_a_weight_after_a_look_is_refused() -> None:
    """It would do so too late for the layer, which needs all weights at first."""
    layer, x = make_layer(), inputs()
    compute_by_hook(layer.conv2)

    def hook(conv: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert given[0].ndim == 4
        doubled(conv, given)

    layer.conv2._forward_pre_hooks.clear()
    doubled(layer.conv2, ())
    layer.conv2.register_forward_pre_hook(hook)
    with pytest.raises(mint.HookError, match="looks at its input and sets a tensor"):
        layer(x)


def test_keys_of_hooks_are_forgotten_with_them() -> None:
    layer, x = make_layer(), inputs()
    handle = layer.conv2.register_forward_pre_hook(lambda conv, given: given[0] and None)
    handle.remove()
    handle = layer.conv2.register_forward_pre_hook(lambda conv, given: None if given[0].ndim else 1)
    layer(x)
    assert len(layer._watching) == 1
    assert not copy.deepcopy(layer)._watching
    handle.remove()
    layer(x)
    assert not layer._watching


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda conv, given: (2 * given[0],), "of 'conv2' of a MintLayer returns another input"),
        (lambda conv, given: (torch.ones(1),), "of 'conv2' of a MintLayer returns another input"),
        (lambda conv, given, kept=[]: kept.append(given), "of 'conv2' .* keeps its input unseen"),
    ],
)
def test_a_pre_hook_that_changes_or_keeps_the_input_is_refused(hook: Any, message: str) -> None:
    layer = make_layer()
    layer.conv2.register_forward_pre_hook(hook)
    with pytest.raises(mint.HookError, match=message):
        layer(inputs())


def test_hooks_that_would_belie_the_determinant_or_not_run_are_refused() -> None:
    layer, x = make_layer(), inputs()
    handle = layer.conv1.register_forward_hook(lambda conv, given, output: 2 * output)
    with pytest.raises(mint.HookError, match=r"'conv1' of a MintLayer returns another output"):
        layer(x)
    handle.remove()
    layer.conv1.register_backward_hook(lambda *_: None)
    with pytest.raises(mint.HookError, match="register_full_backward_hook"):
        layer(x)
    inner = make_layer()
    composed = Compose(Elementwise("identity"), inner)
    inner.register_forward_hook(lambda *_: None)
    with pytest.raises(mint.HookError, match=r"f1 \(MintLayer\) has hooks that would not run"):
        composed(x)
    inner._forward_hooks.clear()
    composed(x)
    inner.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(mint.HookError, match=r"f1 \(MintLayer\) has hooks that would not run"):
        composed(x)


def test_an_inverse_and_its_gradient_call_no_forward_hook() -> None:
    flow, calls = make_flow(), []
    for module in flow.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    x, log_det = flow.inverse(torch.randn(2, *flow.latent_shape))
    (x.sum() + log_det.sum()).backward()
    mint.invert(flow, x.detach().new_zeros(1, *flow.latent_shape), certify=True)
    assert not calls
