"""Weights that hooks compute (pruning, norms, parametrizations): at every call, as in torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import mintnet_triton as mint
from mintnet_triton.calculus import Compose, Elementwise, MaskedAffine, Sum
from tests.guest import (
    INVERTIBLE,
    KINDS,
    assert_same,
    compute_by_hook,
    convs_of,
    gradients,
    inputs,
    make,
    make_flow,
    make_layer,
    values,
)


def settle(module: nn.Module, x: Tensor) -> None:
    """Let power iterations find the spectral norms, which they do in training."""
    module.train()
    with torch.no_grad():
        for _ in range(20):
            module(x)
    module.eval()


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
