"""What torch puts around a module: averages, replicas, compiled and checkpointed modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mintnet_triton as mint
from tests.guest import (
    KINDS,
    TORCHS_OWN,
    assert_same,
    gradients,
    inputs,
    make,
    make_flow,
    values,
)


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
