"""Stages beyond the paper bear what torch does to modules: copies, files, hooks, transforms."""

import copy
import pickle
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import mintnet_triton as mint
from mintnet_triton.parts import (
    ActNorm,
    ConditionalPrior,
    FactorOut,
    InvertibleSequential,
    LevelSpline,
    LogisticMixture,
    PointwiseConv,
)
from tests.jacobian import jacobian
from tests.stages import (
    ON_IMAGES,
    assert_same,
    gradients,
    make,
    small_flow,
    some_kinds,
    total,
)

# ---------------------------------------------------------------- copies and files


@some_kinds
def test_copies(kind: str) -> None:
    module, x = make(kind)
    expected = module(x)
    other, _ = make(kind)
    other.load_state_dict(module.state_dict())
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), other):
        assert_same(copied(x), expected, 0)
        assert_same(copied.inverse(expected[0].detach())[0], x, 1e-8)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
    assert_same(module(x), expected, 0)


@pytest.mark.parametrize("size", [(4, 4), (8,)], ids=str)
def test_saved_and_loaded(size: tuple[int, ...], tmp_path: Path) -> None:
    flow = small_flow(*size)
    x = torch.randn(5, 2, *size)
    flow.initialise(x)
    mint.save(flow, tmp_path / "flow.safetensors")
    loaded = mint.load(tmp_path / "flow.safetensors")
    assert isinstance(loaded, mint.MintNet)
    assert loaded.arguments == flow.arguments
    assert_same(loaded(x), flow(x), 0)
    assert_same(loaded.sample(2, torch.Generator().manual_seed(1)),
                flow.sample(2, torch.Generator().manual_seed(1)), 0)  # fmt: skip


# ---------------------------------------------------------------- what torch's own modules bear


@some_kinds
def test_batches_and_layouts(kind: str) -> None:
    module, x = make(kind)
    z, log_det = (one.detach() for one in module(x))
    for count in (0, 1):
        some, own = module(x[:count])
        assert_same((some, own), (z[:count], log_det[:count]), 1e-12)
        result = mint.invert(module, z[:count], certify=True)
        assert_same(result.x, x[:count], 1e-8)
        assert result.error_bound is not None
        assert result.error_bound.shape == result.converged.shape == (count,)
    assert all(bool((one == 0).all()) for one in gradients(module, module(x[:0])).values())
    assert_same(module.inverse(z[:0].requires_grad_())[1].sum().item(), 0.0)
    last = {"memory_format": torch.channels_last}
    for other in (
        x.contiguous(**last),
        x.mT.contiguous().mT,
        x.repeat(1, 2, 1, 1)[:, ::2][:, [0, 0]],
    ):
        plain = other.contiguous()
        assert_same(module(other), module(plain), 1e-12)
    for other in (z.contiguous(**last), z.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_same(module.inverse(other), module.inverse(z), 1e-8)
    assert_same(module.to(**last)(x), (z, log_det), 1e-12)


@pytest.mark.parametrize(
    "kind", [*list(ON_IMAGES)[:-1], pytest.param("flow", marks=pytest.mark.full)]
)
def test_compiled_exported_and_transformed(kind: str) -> None:
    module, x = make(kind)
    expected = module(x)
    compiled: Any = torch.compile(module, fullgraph=True, backend="eager")
    assert_same(compiled(x), expected)
    assert_same(gradients(module, compiled(x)), gradients(module, module(x)))
    exported = torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    assert_same(exported.module()(x[:2]), tuple(one[:2] for one in expected))
    found = torch.func.jacrev(lambda v: module(v[None])[0][0])(x[0])
    assert_same(found.reshape(32, 32), jacobian(module, x[0]))
    assert_same(torch.func.vmap(lambda v: module(v[None])[0][0])(x), expected[0])
    parameters = {name: one.detach() for name, one in module.named_parameters()}
    by_parameters = torch.func.grad(lambda given: total(functional_call(module, given, (x,))))
    found_by = by_parameters(parameters)
    assert_same(found_by, gradients(module, module(x)))
    single = x.float()
    with FakeTensorMode() as mode:
        ghost = ON_IMAGES[kind]()
        assert [one.shape for one in ghost(mode.from_tensor(single))] == [
            one.shape for one in expected
        ]


@some_kinds
def test_the_meta_device(kind: str) -> None:
    module, x = make(kind)
    expected = [one.shape for one in module(x)]
    with torch.device("meta"):
        made = ON_IMAGES[kind]().double()
    for ghost in (copy.deepcopy(module).to("meta"), made):
        assert [one.shape for one in ghost(x.to("meta"))] == expected
        with pytest.raises(NotImplementedError, match="z has no values"):
            ghost.inverse(ghost(x.to("meta"))[0])
    ghost.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_same(ghost(x), module(x), 0)


@some_kinds
def test_parameters_start_anew(kind: str) -> None:
    with torch.device("meta"):
        module = ON_IMAGES[kind]()
    module.to_empty(device="cpu")
    for one in module.modules():
        if callable(start := getattr(one, "reset_parameters", None)):
            start()
    x = torch.randn(2, 2, 4, 4)
    assert_same(module.inverse(module(x)[0].detach())[0], x, 1e-4)


@some_kinds
def test_autocast(kind: str) -> None:
    module, x = make(kind, torch.float32)
    exact, exact_log_det = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = module(x)
        assert log_det.dtype == torch.float32
        back, _ = module.inverse(exact.detach())
    assert back.dtype == torch.float32
    assert_same(back, x, 1e-2)
    assert_same(z.float(), exact, 0.3)
    assert_same(log_det, exact_log_det, 1.0)


@some_kinds
def test_parameters_that_are_not_trained(kind: str) -> None:
    module, x = make(kind)
    z = module(x)[0].detach()
    calls = ((module, x.requires_grad_()), (module.inverse, z.requires_grad_()))
    expected = [torch.autograd.grad(total(call(at)), at)[0] for call, at in calls]
    module.requires_grad_(False)
    for (call, at), gradient in zip(calls, expected, strict=True):
        assert_same(torch.autograd.grad(total(call(at)), at)[0], gradient, 1e-9)
    assert not module.inverse(z.detach())[0].requires_grad


@some_kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind: str, reentrant: bool) -> None:
    module, x = make(kind)
    expected = gradients(module, module(x.requires_grad_()))
    found = gradients(module, checkpoint(module, x, use_reentrant=reentrant))
    assert_same(found, expected, 1e-10)


class Counting(nn.Module):
    calls = 0

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        return value


@some_kinds
def test_computed_parameters(kind: str) -> None:
    """Parametrized: once a call, as torch's modules do; pruned: seen forward and backward."""
    module, x = make(kind)
    expected = module(x)
    z = expected[0].detach()
    counts = []
    for owner in list(module.modules()):
        for name, _ in list(owner.named_parameters(recurse=False)):
            counts.append(Counting())
            parametrize.register_parametrization(owner, name, counts[-1])
            counts[-1].calls = 0
    assert_same(module(x), expected, 1e-12)
    assert {count.calls for count in counts} == {1}
    assert_same(module.inverse(z)[0], x, 1e-8)
    assert {count.calls for count in counts} == {2}

    module, x = make(kind)
    for owner in list(module.modules()):
        if isinstance(owner, ActNorm | PointwiseConv | LevelSpline | LogisticMixture | nn.Conv2d):
            names = {nn.Conv2d: "weight", LevelSpline: "log_slope"}
            name = names.get(type(owner), "log_scale")
            prune.random_unstructured(owner, name, 0.5)
            with torch.no_grad():
                owner.get_parameter(f"{name}_orig").add_(1.0)
    before = module(x)
    assert_same(module.inverse(before[0].detach())[0], x, 1e-7)
    found = gradients(module, module.inverse(before[0].detach()))
    assert all(bool(one.isfinite().all()) for one in found.values())
    pruned = [one for name, one in found.items() if name.endswith("_orig")]
    assert all(float(one.abs().sum()) > 0 for one in pruned)


def test_hooks_that_compute_run_once_a_call() -> None:
    for module in (ActNorm(2), PointwiseConv(2), LevelSpline(2, 5), LogisticMixture(2, 4),
                   ConditionalPrior(2, 1)):  # fmt: skip
        calls: list[int] = []
        x = torch.randn(2, 2, 4, 4)
        if isinstance(module, ConditionalPrior):
            module.network[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        else:
            module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        module(x)
        assert len(calls) == 1, type(module)


def test_spectral_and_weight_norm() -> None:
    layer = PointwiseConv(3)
    parametrizations.weight_norm(layer, "upper")
    parametrizations.spectral_norm(layer, "lower")
    norm = nn.utils.parametrizations.weight_norm(ActNorm(3, 4), "shift")
    with torch.no_grad():
        norm.parametrizations.shift.original1.add_(1.0)
    x = torch.randn(2, 3, 4, 4)
    for module in (layer.eval(), norm.eval()):
        z = module(x)[0].detach()
        assert_same(module.inverse(z)[0], x, 1e-4)
        assert gradients(module, module.inverse(z))


@pytest.mark.parametrize("kind", ["factor out", "flow"])
def test_hooks_of_parts_run_where_they_are_called(kind: str) -> None:
    """As in any chain: all forward hooks in a forward pass, none in an inverse."""
    module, x = make(kind)
    parts = [one for one in module.modules() if isinstance(one, mint.Invertible)]
    seen: list[nn.Module] = []
    for part in parts:
        part.register_forward_hook(lambda one, *_: seen.append(one))
        part.register_full_backward_hook(lambda one, *_: None)
    x.requires_grad_()
    z = module(x)[0]
    total((z,)).backward()
    assert Counter(map(id, seen)) == Counter(map(id, parts))
    seen.clear()
    module.inverse(z.detach())
    assert seen == []
    # One that changes what a part gives is found out.
    part = next(one for one in parts if isinstance(one, PointwiseConv))
    part.register_forward_hook(lambda _m, _i, output: (output[0] + 1, output[1]))
    assert not mint.verify(module, x[:1].detach()).ok


def test_modules_of_torchs_around_parts() -> None:
    x = torch.randn(2, 3, 4, 4)
    inner = torch.compile(mint.MintPair(2, 4, 2), backend="eager")
    assert isinstance(inner, nn.Module)
    first: Any = torch.compile(PointwiseConv(3), backend="eager")
    module = InvertibleSequential(first,
                                  FactorOut(inner, 1))  # fmt: skip
    assert module.input_shape == (3, None, None)
    assert module.output_shape == (3, 4, 4)
    with torch.no_grad():
        assert_same(module.inverse(module(x)[0])[0], x, 1e-4)
    assert mint.verify(module, x[:1]).ok


def test_sequences_are_those_of_torch() -> None:
    norm = ActNorm(2)
    nn.init.constant_(norm.log_scale, 0.5)
    module = InvertibleSequential(norm, PointwiseConv(2), norm)  # the same one again
    x = torch.randn(2, 2, 3, 3)
    z, log_det = module(x)
    assert_same(log_det, torch.full((2,), 2 * 2 * 9 * 0.5))
    assert_same(module.inverse(z)[0], x, 1e-5)
    assert isinstance(module[1:], InvertibleSequential)
    assert_same(module[2:](module[:2](x)[0])[0], z)
    assert module[0] is module[-1] is norm
    nothing = InvertibleSequential()
    named: Any = OrderedDict(norm=norm)
    assert_same(nothing(x)[0], x)
    assert_same(nothing.inverse(x)[1], torch.zeros(2))
    assert (nothing.input_shape, nothing.output_shape) == (None, None)
    nothing.append(norm)
    assert nothing.input_shape == (2, None, None)
    with pytest.raises(TypeError, match="map 1 must be an Invertible, got Linear"):
        InvertibleSequential(norm, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="map 0 must be an Invertible, got OrderedDict"):
        InvertibleSequential(named)
