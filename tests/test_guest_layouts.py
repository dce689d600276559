"""Layouts, devices and dtypes; the meta device and empty batches."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import mintnet_triton as mint
from mintnet_triton.calculus import Compose, Elementwise, MaskedAffine
from tests.guest import (
    CONSTRUCTORS,
    KINDS,
    assert_rounded,
    assert_same,
    gradients,
    inputs,
    make,
    make_flow,
    values,
)


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
