"""What people do to PyTorch modules, done to ours: it works as it does there, or is refused.

One section a kind. Where ``nn.Conv2d`` defines what is right, it stands beside.
"""

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import mintnet_triton as mint
from mintnet_triton import kernels
from mintnet_triton.calculus import Compose, Elementwise, MaskedAffine, Sum
from mintnet_triton.kernels import backend as backend_module

KINDS = ["layer", "pair", "flow", "classifier"]
INVERTIBLE = KINDS[:3]
BACKENDS = ["auto", "torch"]
#: what is compiled for float32 and for float64, and plain PyTorch
SETTINGS = [("auto", torch.float32), ("auto", torch.float64), ("torch", torch.float32)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with mint.use_backend(request.param):
        yield request.param


@pytest.fixture(params=SETTINGS, ids=lambda setting: f"{setting[0]}-{str(setting[1])[6:]}")
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    name, dtype = request.param
    with mint.use_backend(name):
        yield dtype


CONSTRUCTORS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: mint.MintLayer(2, 4, 3),
    "pair": lambda: mint.MintPair(2, 4, 3),
    "flow": lambda: mint.MintNet(2, 4, 2, 4, squeezes=1),
    "classifier": lambda: mint.MintClassifier(2, 4, 3, pairs=2, squeezes=1, width=4),
    "conv": lambda: mint.MaskedConv2d(2, 6, 3, colours=2),
}


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small module whose weights all matter."""
    module = CONSTRUCTORS[kind]().to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def make_layer(dtype: torch.dtype = torch.float32) -> mint.MintLayer:
    layer = make("layer", dtype)
    assert isinstance(layer, mint.MintLayer)
    return layer


def make_flow(dtype: torch.dtype = torch.float32) -> mint.MintNet:
    flow = make("flow", dtype)
    assert isinstance(flow, mint.MintNet)
    return flow


class Calling(nn.Module):
    """A module that calls a method of another."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor | None = None) -> Any:
        return self.call() if x is None else self.call(x)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 4, 4, dtype=dtype)


def values(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same(
    computed: Any, expected: Any, rtol: float | None = None, atol: float | None = None
) -> None:
    for one, other in zip(values(computed), values(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def assert_rounded(computed: Any, expected: Any) -> None:
    """The same but for rounding, which is relative to the largest value."""
    for one, other in zip(values(computed), values(expected), strict=True):
        size = float(other.detach().abs().max()) if other.numel() else 0.0
        eps = torch.finfo(other.dtype).eps
        assert_same(one, other, rtol=0, atol=100 * eps * max(1.0, size))


def total(results: Any) -> Tensor:
    """A number that depends on all results, each with a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    terms = [
        (one * torch.randn(one.shape, generator=generator, dtype=one.dtype)).sum()
        for one in values(results)
    ]
    return torch.stack([term.double() for term in terms]).sum()


def gradients(module: nn.Module, results: Any) -> dict[str, Tensor]:
    module.zero_grad()
    total(results).backward()
    found = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items()}


def convs_of(module: nn.Module) -> list[mint.MaskedConv2d]:
    return [one for one in module.modules() if isinstance(one, mint.MaskedConv2d)]


def settle(module: nn.Module, x: Tensor) -> None:
    """Let power iterations find the spectral norms, which they do in training."""
    module.train()
    with torch.no_grad():
        for _ in range(20):
            module(x)
    module.eval()


# ---------------------------------------------------------------- weights that hooks compute


def doubled(module: nn.Module, _: Any) -> None:
    module.weight = 2 * module.raw  # type: ignore[assignment,operator]


def compute_by_hook(conv: nn.Module) -> None:
    """The weight is twice a parameter, by a hook of the user's own."""
    weight = conv.weight
    del conv.weight
    conv.raw = nn.Parameter(weight.detach() / 2)  # type: ignore[operator]
    conv.register_forward_pre_hook(doubled)


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "prune": lambda conv: prune.random_unstructured(conv, "weight", 0.3),
    "prune twice": lambda conv: [prune.l1_unstructured(conv, "weight", 0.2) for _ in range(2)],
    "prune bias": lambda conv: prune.random_unstructured(conv, "bias", 0.5),
    "weight_norm": lambda conv: torch.nn.utils.weight_norm(conv),
    "spectral_norm": lambda conv: torch.nn.utils.spectral_norm(conv),
    "parametrized weight_norm": lambda conv: parametrizations.weight_norm(conv),
    "parametrized spectral_norm": lambda conv: parametrizations.spectral_norm(conv),
    "a hook of one's own": compute_by_hook,
}
#: each way in a layer and in torch's own convolution, one in each model
COMPUTED_IN = [
    *((kind, how) for kind in ("layer", "dense") for how in COMPUTED),
    *((kind, "prune") for kind in KINDS[1:]),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "how"), COMPUTED_IN)
def test_computed_weights_are_computed_at_every_call(
    kind: str, how: str, dtype: torch.dtype
) -> None:
    """Trained twice and loaded: what counts are the parameters of the moment."""
    module = nn.Conv2d(2, 2, 3, padding=1).to(dtype) if kind == "dense" else make(kind, dtype)
    targets = [module] if kind == "dense" else convs_of(module)[:3]
    for conv in targets:
        COMPUTED[how](conv)
    x = inputs(dtype)
    settle(module, x)
    before = module(x)
    optimiser = torch.optim.SGD(module.parameters(), 1e-3)
    for _ in range(2):
        found = gradients(module, module(x))
        assert found.keys() == dict(module.named_parameters()).keys()
        optimiser.step()
    after = module(x)
    assert not torch.equal(values(after)[0], values(before)[0])

    other = nn.Conv2d(2, 2, 3, padding=1).to(dtype) if kind == "dense" else make(kind, dtype)
    for conv in [other] if kind == "dense" else convs_of(other)[:3]:
        COMPUTED[how](conv)
    other.eval()
    other.load_state_dict(module.state_dict())
    assert_same(other(x), after)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "how"), [pair for pair in COMPUTED_IN if pair[0] in INVERTIBLE])
def test_an_inverse_has_computed_weights_too(kind: str, how: str, dtype: torch.dtype) -> None:
    module = make(kind, dtype)
    for conv in convs_of(module)[:3]:
        COMPUTED[how](conv)
    assert isinstance(module, mint.Invertible)
    x = inputs(dtype)
    settle(module, x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)  # after which what hooks have left is stale
    z, _ = module(x)
    # The inverse's gradient by the parameters is that of a round trip with the sign changed.
    again, log_det = module.inverse(z.detach())
    loose = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    assert_same(again, x, **loose)
    found = gradients(module, (again, log_det))
    assert found.keys() == dict(module.named_parameters()).keys()
    point = x.clone().requires_grad_()
    generator = torch.Generator().manual_seed(7)
    by_x = torch.randn(x.shape, generator=generator, dtype=dtype)
    by_log_det = torch.randn(log_det.shape, generator=generator, dtype=log_det.dtype)
    y, forward_log_det = module(point)
    through = torch.autograd.grad(forward_log_det, point, -by_log_det, retain_graph=True)[0]
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v)[0], x)
    n = x.numel()
    by_z = torch.linalg.solve(
        jacobian.reshape(n, n).double().T, (by_x + through).double().flatten()
    )
    module.zero_grad()
    torch.autograd.backward((y, forward_log_det), (-by_z.to(dtype).view(y.shape), -by_log_det))
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        scale = 1 + float(parameter.grad.abs().max())
        torch.testing.assert_close(
            found[name] / scale, parameter.grad / scale,
            rtol=0, atol=2e-3 if dtype == torch.float32 else 1e-8,
        )  # fmt: skip


def test_hooks_run_once_a_call_and_once_where_frozen() -> None:
    layer, x = make_layer(), inputs()
    calls = []
    layer.conv2.register_forward_pre_hook(lambda *_: calls.append("weights"))
    layer.conv3.register_forward_pre_hook(lambda *_: calls.append("keywords"), with_kwargs=True)
    for call in (layer, layer.transform, layer.forward_and_diagonal, layer.inverse,
                 lambda x: layer.inverse(x, mint.FixedPoint(safeguard=True)),
                 lambda x: mint.invert(layer, x, certify=True)):  # fmt: skip
        calls.clear()
        call(x)
        assert calls == ["weights", "keywords"]
    calls.clear()
    with mint.frozen(layer):
        for _ in range(2):
            layer(x)
            layer.inverse(x)
    assert calls == ["weights", "keywords"]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def test_parametrizations_are_computed_once_a_call_as_torchs_are() -> None:
    """Some have a state: a spectral norm takes a step of its iteration each time."""
    x = inputs()
    dense = nn.Conv2d(2, 2, 3, padding=1)
    for module in (dense, make("conv"), make_layer(), make("pair"), make_flow()):
        counts = []
        for owner in list(module.modules()):
            for name, _ in list(owner.named_parameters(recurse=False)):
                counts.append(Counting())
                parametrize.register_parametrization(owner, name, counts[-1])
                counts[-1].calls = 0
        results = module(x)
        assert {count.calls for count in counts} == {1}
        if isinstance(module, mint.Invertible):
            module.inverse(results[0].detach())
            assert {count.calls for count in counts} == {2}


@pytest.mark.parametrize("name", ["t", "conv1", "conv2", "conv3"])
def test_a_stale_weight_is_never_used(name: str) -> None:
    """Also t, which belongs to the layer itself, and whose hook an inverse does not call."""
    layer, x = make_layer(), inputs()
    tensor = "t" if name == "t" else "weight"
    prune.identity(layer if name == "t" else layer.get_submodule(name), tensor)
    expected = copy.deepcopy(layer.state_dict())
    y, log_det = layer(x)
    diagonal = layer.forward_and_diagonal(x)[1]

    def loaded() -> mint.MintLayer:
        other = make_layer()
        prune.identity(other if name == "t" else other.get_submodule(name), tensor)
        other.load_state_dict(expected)
        return other

    solvers = (None, mint.FixedPoint(alpha=0.7, iterations=500), mint.FixedPoint(safeguard=True))
    for solver in solvers:
        assert_same(loaded().inverse(y.detach(), solver)[0], x, rtol=1e-3, atol=1e-3)
    assert mint.verify(loaded(), x[:1]).ok
    assert_same(loaded().forward_and_diagonal(x)[1], diagonal)
    assert_same(loaded().transform(x), y)
    assert_same(loaded()(x), (y, log_det))


def test_computed_weights_in_the_calculus() -> None:
    ordering = mint.Ordering("channel", "lower")
    x = inputs(torch.float64)

    def composed() -> tuple[MaskedAffine, mint.TriangularMap]:
        affine = MaskedAffine(torch.randn(2, 2, 3, 3), torch.randn(2), ordering).double()
        prune.identity(affine, "weight")
        return affine, Sum(
            Elementwise("identity"), Compose(Elementwise("tanh"), affine), (4.0, 0.1)
        )

    affine, map_ = composed()
    _, other = composed()
    other.load_state_dict(map_.state_dict())
    z = map_(x)[0].detach()
    assert_same(other.inverse(z)[0], x, rtol=1e-6, atol=1e-8)
    found = gradients(other, other.inverse(z))
    assert float(found["f2.f1.weight_orig"].abs().sum()) > 0
    parametrize.register_parametrization(affine, "bias", nn.Identity())
    assert_same(map_.inverse(z)[0], x, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------- hooks that look


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


# ---------------------------------------------------------------- copies


#: what torch's compiler does itself to a function with a gradient of its own
TORCHS_OWN = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@TORCHS_OWN
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_compiled_and_frozen_modules_are_their_own(kind: str, how: str) -> None:
    module, x = make(kind), inputs()
    module.compile(backend="eager")
    module(x)
    with mint.frozen(module):
        if how == "deepcopy":
            twin = copy.deepcopy(module)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(module))
        else:
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
    assert_same(twin(x), module(x))
    expected = make(kind)
    twin.load_state_dict(expected.state_dict())
    assert_same(twin(x), expected(x))


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
@pytest.mark.parametrize("kind", KINDS)
def test_averaged_models(kind: str, average: Any) -> None:
    module, x = make(kind), inputs()
    averaged = AveragedModel(module, multi_avg_fn=average, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(module)
    assert_same(averaged.eval()(x), module(x))


def replicated(module: nn.Module) -> nn.Module:
    """As torch's DataParallel makes a replica, on the same device."""
    replicas = {one: one._replicate_for_data_parallel() for one in module.modules()}
    for one, twin in replicas.items():
        for name, child in one.named_children():
            setattr(twin, name, replicas[child])
        for name, parameter in one.named_parameters(recurse=False):
            setattr(twin, name, parameter.view_as(parameter))
    found: nn.Module = replicas[module]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_replicas(kind: str) -> None:
    module, x = make(kind), inputs()
    with mint.frozen(module), torch.enable_grad():
        replica = replicated(module)
    assert_same(replica(x), module(x))
    expected = gradients(module, module(x))
    assert_same(tuple(gradients(module, replica(x)).values()), tuple(expected.values()))
    if isinstance(replica, mint.MintNet):
        assert replica.sample(2).shape == (2, 2, 4, 4)


@pytest.mark.parametrize("name", ["t", "conv2.weight", "conv1.bias"])
def test_copies_of_parametrized_layers_are_not_frozen(name: str) -> None:
    """torch copies such a layer without asking it for its state."""
    layer, x = make_layer(), inputs()
    owner, _, tensor = name.rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(owner), tensor, Doubled())
    with mint.frozen(layer):
        twin = copy.deepcopy(layer)
    assert twin._frozen is None
    assert_same(twin(x), layer(x))
    assert gradients(twin, twin(x)).keys() == dict(twin.named_parameters()).keys()


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_blocks_of_two_threads_may_overlap() -> None:
    """Each ends for itself, in whatever order, and leaves nothing behind."""
    layer, x = make_layer(), inputs()
    precision = torch.get_float32_matmul_precision()
    makers: list[Callable[[], Any]] = [
        lambda: mint.frozen(layer),
        lambda: mint.use_backend("torch"),
        kernels.full_float32,
    ]
    torch.set_float32_matmul_precision("high")
    try:
        for make_block in makers:
            entered, left = threading.Event(), threading.Event()

            def first(make_block: Callable[[], Any], entered: Any, left: Any) -> None:
                with make_block():
                    entered.wait(60)
                left.set()

            def second(make_block: Callable[[], Any], entered: Any, left: Any) -> None:
                with make_block():
                    entered.set()
                    left.wait(60)

            threads = [
                threading.Thread(target=target, args=(make_block, entered, left))
                for target in (first, second)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert backend_module._choices == ["auto"]
    before = layer(x)
    with torch.no_grad():
        layer.t.add_(1)
    assert not torch.equal(layer(x)[0], before[0])
    with mint.frozen(layer):
        layer.double()
        with mint.frozen(layer):
            layer(x.double())
        layer(x.double())


class Watcher:
    """A hook with a state that cannot be copied."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def __call__(self, module: nn.Module, given: Any, results: Any) -> None:
        with self.lock:
            pass


@pytest.mark.parametrize("kind", INVERTIBLE)
def test_what_cannot_be_copied_is_left_alone(kind: str, backend: str) -> None:
    module, x = make(kind), inputs()
    assert isinstance(module, mint.Invertible)
    module.lock = threading.Lock()  # type: ignore[assignment]
    module.loss = module(x)[1].sum()
    module.register_forward_hook(Watcher(threading.Lock()))
    z = module(x)[0].detach()
    result = mint.invert(module, z, certify=True)
    assert bool(result.converged.all())
    assert_same(result.x, x, rtol=1e-4, atol=1e-4)
    assert mint.verify(module, x[:1]).ok
    if isinstance(module, mint.MintNet):
        assert module.sample(2).shape == (2, 2, 4, 4)


# ---------------------------------------------------------------- derivatives of all kinds


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_activation_checkpointing(
    kind: str, dtype: torch.dtype, recompute: bool, reentrant: bool
) -> None:
    module, x = make(kind, dtype), inputs(dtype).requires_grad_()
    for layer in module.modules():
        if isinstance(layer, mint.MintLayer):
            layer.recompute = recompute
    expected = gradients(module, module(x))
    results = checkpoint(module, x, use_reentrant=reentrant)
    found = gradients(module, results)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_rounded(found[name], gradient)
    with torch.autograd.graph.save_on_cpu():
        results = module(x)
    assert_same(tuple(gradients(module, results).values()), tuple(expected.values()))


@pytest.mark.parametrize("kind", ["layer", "flow"])
def test_a_gradient_penalty_on_an_inverse(kind: str, backend: str) -> None:
    """Also where the upstream gradient is constant, so that it has no history."""
    module = make(kind, torch.float64)
    assert isinstance(module, mint.Invertible)
    z = module(inputs(torch.float64, 1))[0].detach().requires_grad_()
    parameter = next(module.parameters())

    def penalty() -> Tensor:
        x, log_det = module.inverse(z)
        (gradient,) = torch.autograd.grad(x.sum() + log_det.sum(), z, create_graph=True)
        return total(gradient.square())

    by_z, by_parameter = torch.autograd.grad(penalty(), [z, parameter])
    step = 1e-6
    for tensor, found in ((z, by_z), (parameter, by_parameter)):
        direction = torch.randn_like(tensor)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * step * direction)
            ends.append(float(penalty().detach()))
            with torch.no_grad():
                tensor.sub_(sign * step * direction)
        slope = float((found * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", INVERTIBLE)
def test_transforms_of_inverses(kind: str, dtype: torch.dtype) -> None:
    """jacrev, jacfwd and dual numbers all give the inverse of autograd's Jacobian."""
    module = make(kind, dtype)
    assert isinstance(module, mint.Invertible)
    x = inputs(dtype, 2)
    z = module(x)[0].detach()
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v)[0], x)
    n = x.numel()
    inverse = torch.linalg.inv(jacobian.detach().reshape(n, n).double())
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}

    def run(z: Tensor) -> Tensor:
        return module.inverse(z)[0]

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_same(transform(run)(z).detach().reshape(n, n).double(), inverse, **close)
    by_log_det = [transform(lambda z: module.inverse(z)[1])(z).detach()
                  for transform in (torch.func.jacrev, torch.func.jacfwd)]  # fmt: skip
    assert_same(*by_log_det, **close)
    tangent = torch.randn_like(z)
    expected = (inverse @ tangent.double().flatten()).view(x.shape).to(dtype)
    with forward_ad.dual_level():
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                dual, dual_log_det = module.inverse(forward_ad.make_dual(z, tangent))
                assert_same(forward_ad.unpack_dual(dual).tangent, expected, **close)
                along = torch.einsum("abchw,bchw->a", by_log_det[0], tangent)
                assert_same(forward_ad.unpack_dual(dual_log_det).tangent, along, **close)


def test_gradients_by_functional_parameters(backend: str) -> None:
    flow = make_flow(torch.float64)
    z = torch.randn(2, *flow.latent_shape, dtype=torch.float64)
    for module in (
        Calling(flow, lambda: flow.inverse(z)),
        Calling(flow, lambda: flow.sample_and_log_prob(2, torch.Generator().manual_seed(1))),
    ):
        parameters = {name: one.detach() for name, one in module.named_parameters()}

        def loss(given: dict[str, Tensor], module: nn.Module = module) -> Tensor:
            return total(functional_call(module, given, ()))

        found = torch.func.grad(loss)(parameters)
        expected = gradients(module, module())
        assert_same(tuple(found.values()), tuple(expected.values()))


def test_transforms_that_an_inverse_does_not_know_are_refused() -> None:
    layer, z = make_layer(), inputs()

    def norm(z: Tensor) -> Tensor:
        return layer.inverse(z)[0].square().sum()

    with pytest.raises(NotImplementedError, match=r"vmap over an inverse, which takes a batch"):
        torch.func.vmap(layer.inverse)(z[:, None])
    with pytest.raises(NotImplementedError, match="take both in reverse mode"):
        torch.func.hessian(norm)(z)
    twice = torch.func.jacrev(torch.func.grad(norm))(z)
    assert twice.shape == z.shape * 2


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients_of_the_forward_pass(kind: str, backend: str) -> None:
    module, x = make(kind, torch.float64), inputs(torch.float64)
    parameters = {name: one.detach() for name, one in module.named_parameters()}

    def loss(given: dict[str, Tensor], one: Tensor) -> Tensor:
        return values(functional_call(module, given, (one[None],)))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    module.zero_grad()
    values(module(x))[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert_rounded(each[name].sum(0), parameter.grad)


def test_anomaly_detection_finds_nothing(backend: str) -> None:
    for kind in KINDS:
        module = make(kind)
        with torch.autograd.set_detect_anomaly(True):
            gradients(module, module(inputs()))
            if isinstance(module, mint.Invertible):
                gradients(module, module.inverse(torch.randn_like(module(inputs())[0])))


# ---------------------------------------------------------------- layouts, devices, dtypes


@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_weights_and_inputs_in_any_layout(kind: str, dtype: torch.dtype) -> None:
    module, x = make(kind, dtype), inputs(dtype)
    expected = module(x)
    by_parameters = gradients(module, expected)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layouts = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": torch.stack([x, x], -1)[..., 0],
        "negated": torch._neg_view(-x),
    }
    for given in (x, *layouts.values()):
        results = module(given)
        assert_rounded(results, expected)
        assert_rounded(tuple(gradients(module, results).values()), tuple(by_parameters.values()))
        if isinstance(module, mint.Invertible):
            y = values(expected)[0].detach()
            y = y.contiguous(memory_format=torch.channels_last)
            assert_same(module.inverse(y)[0], x, rtol=1e-4, atol=1e-4)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 4:
            turned = parameter.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
            parameter.data = turned
            assert not parameter.is_contiguous() or parameter.numel() == 1, name
    assert_rounded(module(x), expected)
    with mint.frozen(module):
        assert_rounded(module(x), expected)


@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_the_meta_device(kind: str) -> None:
    module, x = make(kind), inputs()
    expected = [one.shape for one in values(module(x))]
    ghost = copy.deepcopy(module).to("meta")
    assert [one.shape for one in values(ghost(x.to("meta")))] == expected
    with torch.device("meta"):
        ghost = make(kind)
    assert [one.shape for one in values(ghost(x.to("meta")))] == expected
    if isinstance(ghost, mint.Invertible):
        with pytest.raises(NotImplementedError, match="z has no values"):
            ghost.inverse(values(ghost(x.to("meta")))[0])
    ghost = ghost.to_empty(device="cpu")
    ghost.load_state_dict(module.state_dict())
    with torch.inference_mode():  # what is made in it may not be kept for a gradient
        assert_same(ghost(x), module(x))
    assert gradients(ghost, ghost(x))


@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_fake_tensors(kind: str) -> None:
    module, x = make(kind), inputs()
    expected = [one.shape for one in values(module(x))]
    with FakeTensorMode() as mode:
        ghost = CONSTRUCTORS[kind]()
        results = ghost(mode.from_tensor(x))
        values(results)[0].sum().backward()
    assert [one.shape for one in values(results)] == expected
    traced = make_fx(lambda x: module(x))(x)
    assert_same(traced(x), module(x))


@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_a_default_device_that_is_another(kind: str, backend: str) -> None:
    module, x = make(kind), inputs()
    expected = module(x)
    with torch.device("meta"):
        assert_same(module(x), expected)
        values(module(x))[0].sum().backward()
        if isinstance(module, mint.Invertible):
            z = values(expected)[0].detach()
            for solver in (None, mint.FixedPoint(safeguard=True), mint.Wavefront()):
                result = mint.invert(module, z, solver, certify=True, trace=True)
                assert_same(result.x, x, rtol=1e-4, atol=1e-4)
            module.inverse(z)[0].sum().backward()
        if isinstance(module, mint.MintNet):
            module.sample(1)


@pytest.mark.parametrize("kind", [*KINDS, "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_made_in_inference_mode_and_loaded(kind: str, dtype: torch.dtype) -> None:
    expected = make(kind, dtype)
    with torch.inference_mode():
        module = make(kind)
    module.load_state_dict(expected.state_dict(), assign=True)
    results = module(inputs(dtype))
    assert values(results)[0].dtype == dtype
    if kind != "classifier":  # whose statistics are buffers, which torch cannot put in place
        gradients(module, results)


def test_parameters_start_anew_where_torch_asks() -> None:
    for make_one in (
        lambda **given: mint.MintLayer(2, 4, 3, **given),
        lambda **given: mint.MintLayer(2, 4, 3, initialisation="classifier", **given),
        lambda **given: mint.MaskedConv2d(2, 6, 3, colours=2, **given),
    ):
        torch.manual_seed(3)
        expected = make_one(dtype=torch.float64)
        ghost = make_one(device="meta", dtype=torch.float64).to_empty(device="cpu")
        torch.manual_seed(3)
        ghost.reset_parameters()
        for name, parameter in ghost.named_parameters():
            other = expected.get_parameter(name)
            assert parameter.dtype == torch.float64
            scale = float(other.detach().std()) if other.numel() > 1 else 0.0
            assert float(parameter.detach().std()) == pytest.approx(scale, rel=0.5)
        if isinstance(ghost, mint.MaskedConv2d):
            dense = nn.Conv2d(2, 6, 3, dtype=torch.float64)
            torch.manual_seed(3)
            dense.reset_parameters()
            torch.manual_seed(3)
            ghost.reset_parameters()
            assert torch.equal(dense.weight, ghost.weight)
    skipped = nn.utils.skip_init(mint.MintLayer, 2, 4, 3, device="cpu")
    assert skipped.t.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_in_half_precision_are_what_the_flow_takes(dtype: torch.dtype) -> None:
    flow = mint.MintNet(2, 4, 2, 4, squeezes=1).to(dtype)
    x = flow.sample(3)
    assert x.dtype == dtype
    assert flow.log_prob(x).isfinite().all()
    x, log_prob = flow.sample_and_log_prob(3)
    assert x.dtype == dtype
    assert_same(flow.log_prob(x), log_prob, rtol=0.05, atol=0.5)
    z, _ = flow(x)
    assert mint.invert(flow, z).x.dtype == torch.float32  # which says how exact it is
    assert mint.invert(flow, z.float()).x.dtype == torch.float32


@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_empty_batches(kind: str, dtype: torch.dtype) -> None:
    module, x = make(kind, dtype), inputs(dtype, 0).requires_grad_()
    results = module(x)
    found = gradients(module, results)
    assert found.keys() == dict(module.named_parameters()).keys()
    assert not any(bool(gradient.any()) for gradient in found.values())
    assert x.grad is not None
    assert x.grad.shape == x.shape
    checkpoint(module, x, use_reentrant=False)
    if not isinstance(module, mint.Invertible):
        return
    z = values(results)[0].detach().requires_grad_()
    for solver in (None, mint.FixedPoint(), mint.FixedPoint(safeguard=True), mint.Wavefront()):
        again, log_det = module.inverse(z, solver)
        assert again.shape == x.shape
        assert log_det.shape == (0,)
        gradients(module, (again, log_det))
        assert z.grad is not None
        assert z.grad.shape == z.shape
        mint.invert(module, z.detach(), solver, trace=True, reference=x.detach(), certify=True)
    (gradient,) = torch.autograd.grad(module.inverse(z)[0].sum(), z, create_graph=True)
    gradient.sum().backward()
    with mint.frozen(module):
        module(x)
        module.inverse(z)


def test_empty_batches_elsewhere() -> None:
    flow = make_flow()
    gradients(flow, flow.sample_and_log_prob(0))
    assert flow.sample(0).shape == (0, 2, 4, 4)
    images = torch.zeros(0, 2, 4, 4, dtype=torch.uint8)
    assert mint.bits_per_dim(flow, images).shape == (0,)
    ordering = mint.Ordering("channel", "lower")
    affine = MaskedAffine(torch.randn(2, 2, 3, 3), torch.randn(2), ordering)
    matrix = MaskedAffine(torch.randn(3, 3), torch.randn(3), ordering)
    for map_, shape in ((Compose(Elementwise("tanh"), affine), (0, 2, 4, 4)), (matrix, (0, 3))):
        x = torch.zeros(shape, requires_grad=True)
        gradients(map_, map_(x))
        gradients(map_, map_.inverse(x))


def test_uninitialised_memory_is_never_read(backend: str) -> None:
    """Where torch fills what is allocated with NaN."""
    expected = [values(make_seeded(kind)(inputs_seeded())) for kind in KINDS]
    torch.use_deterministic_algorithms(True)
    try:
        for kind, results in zip(KINDS, expected, strict=True):
            module = make_seeded(kind)
            again = values(module(inputs_seeded()))
            assert_rounded(again, results)
            assert all(one.isfinite().all() for one in gradients(module, again).values())
            if isinstance(module, mint.Invertible):
                assert_same(module.inverse(again[0].detach())[0], inputs_seeded(),
                            rtol=1e-4, atol=1e-4)  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)


def make_seeded(kind: str) -> nn.Module:
    torch.manual_seed(5)
    return make(kind)


def inputs_seeded() -> Tensor:
    torch.manual_seed(6)
    return inputs()


# ---------------------------------------------------------------- parts that are replaced


@pytest.mark.parametrize(
    "head",
    [nn.Identity(), nn.Sequential(nn.Dropout(), nn.Linear(16, 7)), nn.Linear(16, 7, bias=False)],
    ids=["none", "two", "another"],
)
def test_a_replaced_head(head: nn.Module) -> None:
    classifier = make("classifier")
    classifier.fc = head.eval()
    log_probs = classifier(inputs())
    assert log_probs.shape[0] == 3
    assert_same(log_probs.exp().sum(1), torch.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda one: setattr(one, "t", nn.Parameter(torch.ones(2, 1, 1))),
            r"t of a MintLayer must",
        ),
        (lambda one: setattr(one, "t", nn.Parameter(torch.ones(1, 2, 4, 4))), r"t of .* must have"),
        (
            lambda one: setattr(one.conv1, "bias", nn.Parameter(torch.ones(1))),
            r"bias1 of a MintLayer must",
        ),
        (
            lambda one: setattr(one, "conv1", mint.MaskedConv2d(2, 2, 3, colours=2)),
            r"weight2 of a MintLayer must",
        ),
        (
            lambda one: setattr(one, "conv3", mint.MaskedConv2d(6, 4, 3, colours=2)),
            r"weight3 of a MintLayer must",
        ),
        (
            lambda one: setattr(one.conv1, "weight", nn.Parameter(torch.ones(6, 2, 1, 1))),
            r"weight must have shape \(6, 2, 3, 3\), got \(6, 2, 1, 1\)",
        ),
        (lambda one: one.conv3.to("meta"), r"weight3 of a MintLayer is on meta"),
        (lambda one: one.conv2.double(), r"weight2 of a MintLayer is torch.float64"),
        (
            lambda one: setattr(one, "t", nn.Parameter(one.t.double())),
            r"t of .* is torch.float64|parameters are torch",
        ),
        (
            lambda one: setattr(one, "conv2", mint.MaskedConv2d(6, 6, 3, colours=1)),
            "conv2 of a MintLayer must be a MaskedConv2d of its order and colours",
        ),
        (
            lambda one: setattr(
                one, "conv2", mint.MaskedConv2d(6, 6, 3, colours=2, triangle="upper")
            ),
            "conv2 of a MintLayer must be a MaskedConv2d of its order and colours",
        ),
        (lambda one: setattr(one, "conv2", nn.Conv2d(6, 6, 3)), "conv2 .* must be a MaskedConv2d"),
        (lambda one: setattr(one, "conv2", nn.Sequential(one.conv2)), "must be a MaskedConv2d"),
        (lambda one: setattr(one, "conv2", Adapted(6, 6, 3, colours=2)), "forward of its own"),
        (lambda one: setattr(one.conv2, "forward", lambda x: x), "forward of its own"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "transform", "inverse", "frozen"])
def test_a_part_that_does_not_fit_is_refused(
    change: Callable[[mint.MintLayer], None], message: str, call: str, backend: str
) -> None:
    """Compiled kernels would read beyond it, and a forward of its own would not be called."""
    layer = make_layer()
    change(layer)
    with pytest.raises((TypeError, ValueError), match=message):
        mint.frozen(layer).__enter__() if call == "frozen" else getattr(layer, call)(inputs())


class Adapted(mint.MaskedConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 100


class LowRank(mint.MaskedConv2d):
    """What is right: a weight of another making."""

    def masked_weight(self) -> Tensor:
        return 2 * super().masked_weight()


def test_a_convolution_with_a_weight_of_another_making(backend: str) -> None:
    layer, x = make_layer(), inputs()
    state = layer.conv2.state_dict()
    layer.conv2 = LowRank(6, 6, 3, colours=2)
    layer.conv2.load_state_dict(state)
    other = make_layer()
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        other.conv2.weight.mul_(2)
    assert_same(layer(x), other(x))
    assert_same(layer.inverse(x), other.inverse(x))


class Twice(mint.TriangularMap):
    """A map of a user's own, that has another inside."""

    def __init__(self, module: mint.MintLayer) -> None:
        super().__init__()
        self.module, self.ordering = module, module.ordering

    def evaluator(self) -> Any:
        evaluate = self.module.evaluator()
        return lambda x: tuple(2 * one for one in evaluate(x))


def test_a_map_with_another_inside_is_not_taken_for_it() -> None:
    map_, x = Twice(make_layer(torch.float64)), inputs(torch.float64)
    z = map_(x)[0].detach()
    assert_same(mint.invert(map_, z, mint.FixedPoint(alpha=0.7, iterations=900)).x, x)


class Residual(mint.TriangularMap):
    """A map of a user's own, that calls a module."""

    def __init__(self) -> None:
        super().__init__()
        self.ordering = None
        self.child = Doubled()

    def evaluator(self) -> Any:
        return lambda x: (3 * x + self.child(x), torch.full_like(x, 5))


def test_hooks_of_what_a_map_calls_are_part_of_it() -> None:
    map_, x = Residual(), inputs()
    map_.child.register_forward_hook(lambda module, given, output: output / 2)
    z, _ = map_(x)
    assert_same(z, 4 * x)
    assert_same(mint.invert(map_, z, mint.FixedPoint(alpha=0.9)).x, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learnt", [True, False])
def test_gradients_of_inverses_of_constant_slope(learnt: bool) -> None:
    ordering = mint.Ordering("channel", "lower")
    affine = MaskedAffine(torch.eye(2)[..., None, None], torch.randn(2), ordering).double()
    affine.requires_grad_(learnt)
    x = inputs(torch.float64, 1)
    for map_ in (
        affine,
        Compose(make_layer(torch.float64), affine),
        Sum(Elementwise("identity"), affine),
        Elementwise("identity"),
        Elementwise("leaky_relu"),
    ):
        z = map_(x)[0].detach().requires_grad_()
        found, *_ = torch.autograd.grad(map_.inverse(z)[0].sum(), z)
        by_x = torch.autograd.functional.jacobian(lambda v, map_=map_: map_(v)[0], x)
        n = x.numel()
        expected = torch.linalg.solve(by_x.reshape(n, n).T, torch.ones(n, dtype=torch.float64))
        assert_same(found.flatten(), expected, rtol=1e-6, atol=1e-6)


class Bent(mint.MintLayer):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward(x)
        return y + 1, log_det


def test_a_layer_with_a_forward_of_its_own_is_called_by_a_classifier() -> None:
    classifier, x = make("classifier"), inputs()
    layer = classifier.get_submodule("layers.0.1")
    assert isinstance(layer, mint.MintLayer)
    handle = layer.register_forward_hook(lambda module, given, out: (out[0] + 1, out[1]))
    expected = classifier(x)
    handle.remove()
    bent = Bent(4, 4, 1, activation="leaky_relu")
    bent.load_state_dict(layer.state_dict())
    block = classifier.get_submodule("layers.0")
    setattr(block, "1", bent)
    assert_same(classifier(x), expected)


def test_verify_sees_what_is_around_the_layers() -> None:
    flow, x = make_flow(), inputs(batch=1)
    assert mint.verify(flow, x).ok
    layer = flow.get_submodule("layers.0.0")
    handle = layer.register_forward_hook(
        lambda module, given, results: (2 * results[0], results[1])
    )
    report = mint.verify(flow, x)
    assert not report.ok
    assert float(report.forward_error) > 0.1
    handle.remove()
    handle = flow.register_forward_pre_hook(lambda module, given: (given[0] / 2,))
    assert not mint.verify(flow, x).ok
    handle.remove()
    layer.register_forward_hook(lambda module, given, results: (results[0], results[1] + 1))
    assert not mint.verify(flow, x).ok


def test_a_flow_that_is_cut() -> None:
    flow, x = make_flow(), inputs()
    assert flow.latent_shape == (8, 2, 2)
    flow.layers = flow.layers[:1]
    assert flow.latent_shape == (2, 4, 4)
    assert_same(flow.inverse(flow(x)[0].detach())[0], x, rtol=1e-4, atol=1e-4)
    assert flow.sample(2).shape == (2, 2, 4, 4)
    with pytest.raises(TypeError, match=r"a MintPair is not sliced"):
        mint.MintPair(2, 4, 3)[:1]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.ao")
def test_a_quantised_head() -> None:
    classifier, x = make("classifier"), inputs()
    quantised = torch.ao.quantization.quantize_dynamic(classifier, {nn.Linear})
    assert_same(quantised(x), classifier(x), rtol=0.1, atol=0.1)
    with pytest.raises(TypeError, match=r"images is torch.float64"):
        quantised(x.double())


@TORCHS_OWN
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compiled_inside_a_model(kind: str) -> None:
    module, x = make(kind), inputs()
    expected = module(x)
    if kind == "layer":
        module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    else:
        parent = module if kind == "pair" else module.get_submodule("layers.0")
        last, inner = list(parent.named_children())[-1]
        setattr(parent, last, torch.compile(inner, backend="eager"))
    assert_same(module(x), expected)
    if kind != "classifier":
        z = values(expected)[0].detach()
        assert_same(mint.invert(module, z).x, x, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
        assert mint.verify(module, x[:1]).ok  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrap", [AveragedModel, nn.DataParallel, checkpoint_wrapper, torch.compile]
)
def test_a_flow_inside_a_module_of_torchs(wrap: Callable[[nn.Module], nn.Module]) -> None:
    flow, x = make_flow(), inputs()
    wrapped = wrap(flow)
    z = flow(x)[0].detach()
    assert_same(mint.invert(wrapped, z).x, x, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    assert mint.verify(wrapped, x[:1]).ok  # type: ignore[arg-type]


def test_what_is_not_invertible_is_named() -> None:
    flow = make_flow()
    flow.layers[0] = nn.Identity()
    with pytest.raises(TypeError, match=r"layers.0 must be an Invertible, got Identity"):
        flow.sample(1)


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize(
    ("kind", "strict"), [*((kind, False) for kind in (*KINDS, "conv", "log_prob")), ("layer", True)]
)
def test_export_with_a_batch_of_any_size(kind: str, strict: bool) -> None:
    """In plain operators of torch, so that it runs where this package is not."""
    flow = make_flow()
    module = Calling(flow, flow.log_prob) if kind == "log_prob" else make(kind)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(module, (inputs(),), dynamic_shapes=({0: batch},), strict=strict)
    assert not any("mintnet" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 3, 6):
        x = inputs(batch=size)
        assert_rounded(loaded(x), module(x))


def test_export_in_a_fresh_process() -> None:
    """Where nothing has been imported before that cannot be while a graph is traced."""
    program = """
import sys, torch, mintnet_triton as mint
flow, x = mint.MintNet(2, 4, 2, 4, squeezes=1), torch.randn(3, 2, 4, 4)
batch = torch.export.Dim("batch")
exported = torch.export.export(flow, (x,), dynamic_shapes=({0: batch},)).module()
assert "numba" not in sys.modules
torch.testing.assert_close(exported(x[:2]), flow(x[:2]))
compiled = torch.compile(mint.MintLayer(2, 4, 4), backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x), compiled._orig_mod(x))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_an_inverse_is_not_exported_but_compiled_around() -> None:
    flow = make_flow()
    z = torch.randn(2, *flow.latent_shape)

    with pytest.raises(NotImplementedError, match=r"z has no values while a graph is exported"):
        torch.export.export(Calling(flow, flow.inverse), (z,), strict=False)
    compiled = torch.compile(lambda z: flow.inverse(2 * z), backend="eager")
    assert_same(compiled(z), flow.inverse(2 * z))


# ---------------------------------------------------------------- in Triton's interpreter


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where no GPU is")
@pytest.mark.parametrize("kind", ["layer", "conv"])
def test_the_same_in_kernels(kind: str) -> None:
    module, x = make(kind), inputs(batch=2).requires_grad_()
    expected = module(x)
    by_parameters = gradients(module, expected)
    with mint.use_backend("triton"):
        found = gradients(module, checkpoint(module, x, use_reentrant=False))
        assert_same(tuple(found.values()), tuple(by_parameters.values()), rtol=1e-4, atol=1e-4)
        gradients(module, module(inputs(batch=0)))
        twin = copy.deepcopy(module)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        results = module(x.detach().contiguous(memory_format=torch.channels_last))
        assert_same(results, expected, rtol=1e-4, atol=1e-4)
        if isinstance(twin, mint.MintLayer):
            prune.random_unstructured(twin.conv2, "weight", 0.3)
            results = twin(x)
            with mint.use_backend("torch"):
                assert_same(results, twin(x), rtol=1e-4, atol=1e-4)
            z = results[0].detach()
            assert_same(twin.inverse(z)[0], x.detach(), rtol=1e-4, atol=1e-4)
            twin.conv1.register_forward_hook(lambda *_: None)
            with pytest.raises(mint.BackendError, match="hooks look at its convolutions"):
                twin(x)
